"""Synthetic studies: complete runs whose scores have known effects, and the same for the same arguments."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np

from kdx.roles import BALANCE, GAIN, LIKENESS
from kdx.runs import schema
from kdx.runs.training_scores import TrainingScores, write_training_scores
from kdx.study.table import Cell, CellStatus, measurements_of, write_plan, write_table
from tests.made_runs import edit, make_run

PARAMETERS = {"small": 200_000, "large": 3_200_000}


def make_study(
    folder: Path,
    *,
    data: Sequence[str] = ("digits",),
    chains: Sequence[tuple[str, tuple[str, ...]]] = (("small", ()), ("large", ()), ("large", ("middle",))),
    students: Sequence[str] = ("tiny",),
    methods: Sequence[str] = ("kd", "at"),
    seeds: int = 5,
    side: int = 8,
    missing: int = 0,
) -> Path:
    """Write a study with a run of 24 images and 6 pictures per cell, except the last ``missing`` cells; return its folder.

    At layer3 every student is closer to its teacher and more relevant than its base. At layer1, `at` has less relevance than its base. The
    larger teacher lowers FSS(S,T) by 0.1, and the assistant raises it by 0.05.
    """
    rng = np.random.default_rng(0)
    templates = {
        name: make_run(folder / f".template{place}", images=24, gallery=6, sides=(side, max(1, side // 2)), seed=place)
        for place, name in enumerate(product(students, methods))
    }
    cells = [
        Cell(name, teacher, above, student, method, seed, f"{key}/run", key)
        for name, (teacher, above), student, method, seed in product(data, chains, students, methods, range(seeds))
        for key in [f"{name}/{'+'.join((teacher, *above))}/{student}/{method}/seed{seed}"]
    ]
    complete = cells[: len(cells) - missing]
    measurements = []
    for cell in complete:
        run = folder / cell.folder
        _link(templates[cell.student, cell.method], run)
        changes = _scores(rng, run, cell)
        write_training_scores(run, _probe(rng))
        edit(run / schema.MANIFEST, configuration__models__teacher__parameters=PARAMETERS[cell.teacher], configuration__data=cell.data)
        measurements += list(measurements_of(cell.key, changes))
    plan = {"design": {"seeds": [*range(seeds)]}, "kdx": "0.2.0", "environment": {"python": "3.11.9"}, "command": ["kdx", "study", *data]}
    status = {cell.key: CellStatus("complete" if cell in complete else "missing") for cell in cells}
    write_plan(folder, plan, cells, status)
    write_table(folder, complete, measurements)
    return folder


def _link(template: Path, run: Path) -> None:
    """A run with manifest and scores of its own, and with links to the template's other files, of which there are many."""
    run.mkdir(parents=True)
    for path in template.iterdir():
        if path.name in (schema.MANIFEST, schema.SCORES_FILE):
            shutil.copy(path, run)
        else:
            (run / path.name).symlink_to(path)


def _scores(rng: np.random.Generator, run: Path, cell: Cell) -> schema.StoredScores:
    """Give the run's scores.json the effects of the cell and the noise of a seed."""
    stored: schema.StoredScores = json.loads((run / schema.SCORES_FILE).read_text())
    shift = -0.1 * (cell.teacher == "large") + 0.05 * bool(cell.assistants)
    values = {
        "layer1": {"FSS(S,T)": 0.72 + shift, "FSS(B,T)": 0.7 + shift, "RS(S|B)": 0.05 - 0.04 * (cell.method == "at"), "RS(B|S)": 0.04},
        "layer3": {"FSS(S,T)": 0.85 + shift, "FSS(B,T)": 0.7 + shift, "RS(S|B)": 0.3, "RS(B|S)": 0.05},
    }
    for layer, of_layer in values.items():
        scores = stored["layers"][layer]["scores"]
        for name, entry in scores.items():
            noisy = of_layer.get(name, entry["value"]) + float(rng.normal(0, 0.006))
            scores[name] |= {"value": noisy, "interval": [noisy - 0.03, noisy + 0.03]}
        for name in (LIKENESS, BALANCE, GAIN):
            more, less = name.split(" - ")
            difference = scores[more]["value"] - scores[less]["value"]
            stored["layers"][layer]["contrasts"][name] |= {
                "value": difference,
                "interval": [difference - 0.04, difference + 0.04],
            }
    for role, accuracy in (("teacher", 0.97), ("base", 0.85), ("student", 0.9 + shift / 4)):
        value = accuracy + float(rng.normal(0, 0.01))
        stored["accuracy"][role] |= {"value": value, "interval": [value - 0.05, value + 0.03]}
    (run / schema.SCORES_FILE).write_text(json.dumps(stored))
    return stored


def _probe(rng: np.random.Generator) -> TrainingScores:
    rise: list[float | None] = [float(x) for x in 0.8 - 0.5 * np.exp(-np.arange(6) / 2) + rng.normal(0, 0.01, 6)]
    return TrainingScores(64, [*range(1, 7)], 6, {layer: {"FSS(S,T)": rise, "RS(S)": rise[::-1]} for layer in ("layer1", "layer3")})

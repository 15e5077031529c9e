"""The accuracy of students per distillation method, beside the base, on the digits that come with scikit-learn.

    python -m benchmarks.methods                   every method, five seeds, a few minutes on one core
    python -m benchmarks.methods --quick           two methods, two seeds; stores nothing

The setting is that of `make demo`, smaller: a teacher that has seen the whole train split, and a student with half its width that sees
eight images per class. All methods have their default weights, which were not tuned here. Teacher and base are trained once per seed. A
seed changes the initial weights, the student's images and the order of the batches; the test images are always the same.

The interval is that of a paired t-test over the seeds (95 %) for the student's accuracy minus the base's, with the same seed.

It prints a table and stores it in benchmarks/results/methods.json; `python -m benchmarks.readme` writes it into docs/distillation.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.markdown import header, joined, row
from benchmarks.record import RESULTS, store
from kdx.distill import METHODS, EpochResult, TrainingSettings, distill
from kdx.models import models_file

MODULE = "benchmarks.methods"
TEACHER, ASSISTANT, STUDENT = "kdx:resnet,width=16,depth=1", "kdx:resnet,width=12,depth=1", "kdx:resnet,width=8,depth=1"
SETTINGS = TrainingSettings(epochs=40, teacher_epochs=8, batch=32, augment=True, student_images=80, image_size=(16, 16))
COMBINED = ("kd+at:0.1", "kd+rkd")
WITH_ASSISTANT = "kd with an assistant"
SEEDS = 5
T_QUANTILE = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""The 97.5 % quantile of Student's t with n - 1 degrees of freedom, by n."""

Accuracies = dict[str, float]


def _ignore(_result: EpochResult) -> None:
    pass


def run(seed: int, methods: list[str]) -> Accuracies:
    """The test accuracy of the teacher, the base and the student of each method, for one seed."""
    accuracies: Accuracies = {}
    with tempfile.TemporaryDirectory() as name:
        folder, teacher, base = Path(name), TEACHER, None
        for number, method in enumerate(methods):
            chain = method == WITH_ASSISTANT
            settings = replace(SETTINGS, method="kd" if chain else method, seed=seed)
            path = distill(
                "digits", teacher=teacher, student=STUDENT, out=folder / str(number), assistants=[ASSISTANT] if chain else [],
                settings=settings, base=base, device="cpu", report=_ignore,
            )  # fmt: skip
            training = models_file.read_models(path).training
            if base is None:
                base = path.parent / "base.safetensors"
                teacher = f"{TEACHER}@{path.parent / 'teacher.safetensors'}"
                accuracies |= {role: float(training[f"{role}_accuracy"]) for role in ("teacher", "base")}
            accuracies[method] = float(training["student_accuracy"])
    return accuracies


def gain(record: Mapping[str, Any], method: str) -> tuple[float, float]:
    """The mean over seeds of the student's accuracy minus the base's, and half the width of its 95 % interval."""
    difference = np.array(record["accuracies"][method]) - np.array(record["accuracies"]["base"])
    half = T_QUANTILE[len(difference)] * difference.std(ddof=1) / np.sqrt(len(difference))
    return float(difference.mean()), float(half)


def rows(record: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Network or method, mean accuracy, and the gain over the base with its interval."""
    lines = []
    for name, values in record["accuracies"].items():
        mean, half = gain(record, name)
        cell = "" if name in ("teacher", "base") else f"{100 * mean:+.1f} ± {100 * half:.1f}"
        lines.append((name, f"{100 * np.mean(values):.1f}", cell))
    return lines


def conclusion(record: Mapping[str, Any]) -> str:
    """Which methods help: those whose whole interval lies above 0."""
    kinds: dict[str, list[str]] = {"help": [], "harm": [], "make no difference that these seeds show": []}
    for name in record["accuracies"]:
        if name not in ("teacher", "base"):
            mean, half = gain(record, name)
            kinds["help" if mean > half else "harm" if mean < -half else "make no difference that these seeds show"].append(_code(name))
    return " ".join(f"Here {_and(names)} {kind if len(names) > 1 else _singular(kind)}." for kind, names in kinds.items() if names)


def _code(name: str) -> str:
    return name if name in ("teacher", "base", WITH_ASSISTANT) else f"`{name}`"


def _and(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _singular(kind: str) -> str:
    verb, _, rest = kind.partition(" ")
    return f"{verb}s {rest}".rstrip()


@cache
def stored() -> Mapping[str, Any]:
    record: Mapping[str, Any] = json.loads((RESULTS / "methods.json").read_text())
    return record


def markdown() -> str:
    """The table of docs/distillation.md."""
    record = stored()
    lines = header("network or method", "accuracy (%)", "minus the base's (points)")
    lines += [row(_code(name), *cells) for name, *cells in rows(record)]
    environment = record["environment"]
    origin = f"{record['seeds']} seeds; {environment['processor']}, PyTorch {environment['torch']}; commit {record['commit']}."
    return f"{joined(lines)}\n\n{conclusion(record)}\n\n{origin}\n"


def main() -> None:
    """Train, print, and store unless --quick."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)  # for networks this small, threads cost more than they save
    methods, seeds = (["kd", "dist"], 2) if quick else ([*METHODS, *COMBINED, WITH_ASSISTANT], SEEDS)
    runs = [run(seed, methods) for seed in range(seeds)]
    measurement = {"seeds": seeds, "accuracies": {name: [accuracies[name] for accuracies in runs] for name in runs[0]}}
    table = Table("network or method", "accuracy (%)", "minus the base's (points, 95 % interval)")
    for cells in rows(measurement):
        table.add_row(*cells)
    Console().print(table)
    Console().print(conclusion(measurement), markup=False)
    if not quick:
        store("methods", MODULE, measurement)


if __name__ == "__main__":
    main()

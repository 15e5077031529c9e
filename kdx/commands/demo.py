"""`kdx demo`: handwritten digits or composites, from training to the page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from kdx.choices import DemoName
from kdx.commands import explain, explain_students
from kdx.distill import DEMOS, distill
from kdx.errors import resumable
from kdx.explain.shared_features import SharedFeatures
from kdx.report import wording
from kdx.report.comparison_page import write_comparison
from kdx.roles import READING_ORDER, contrast_name, contrasts_among
from kdx.runs import schema
from kdx.runs.measured import Entry
from kdx.runs.record import read_run
from kdx.runs.run import RunOptions

_SHOWN = list(dict.fromkeys(name for pair in contrasts_among(READING_ORDER) for name in (*pair, contrast_name(*pair))))
"""Each contrast after its two scores, which may belong to an earlier one as well."""


def run(out: Path, *, data: DemoName = "digits", seed: int = 0, announce: Callable[[str], None] = print) -> dict[str, Path]:
    """Train a teacher, a base and one student per distillation method, and explain both students. Returns the run's folder per method.

    data: which of `kdx.distill.DEMOS`. Both students have the same teacher and base, so that the runs differ only in the method, and
    teacher and base run once for both. The page ``report.html`` in ``out`` compares the students.
    """
    with resumable(lambda: any(out.rglob("*.safetensors")) or any(out.rglob("*.state.pt"))):
        return _run(out, DEMOS[data], seed, announce)


def _run(out: Path, demo: Mapping[str, Any], seed: int, announce: Callable[[str], None]) -> dict[str, Path]:
    runs = {}
    shared = out / explain_students.SHARED
    data, teacher, base = demo["data"], demo["teacher"], None
    for method in ("kd", "at"):
        announce(
            f"Distilling {data} with {method}: a teacher, a base and a student." if base is None else f"Distilling {data} with {method}."
        )
        folder = out / method / "models"
        models = distill(data, teacher=teacher, student=demo["student"], out=folder, settings=replace(demo[method], seed=seed), base=base)
        teacher, base = f"{demo['teacher']}@{(folder / 'teacher.safetensors').resolve()}", folder / "base.safetensors"
        runs[method] = out / method / "run"
        explain.run(
            data,
            models,
            runs[method],
            options=RunOptions(seed=seed),
            networks=out / "networks",
            command=["kdx", "explain", data, "--models", str(models), "--out", str(runs[method]), "--seed", str(seed)],
            shared_features=shared,
            announce=announce,
        )
    write_comparison(runs, out / schema.PAGE)
    SharedFeatures(shared).remove()
    return runs


def table(runs: dict[str, Path]) -> Table:
    """The methods side by side: accuracies, and per layer the similarity to the teacher and the relevance, with 95% intervals."""
    records = [read_run(folder) for folder in runs.values()]
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="What the students learned, with 95% intervals", title_justify="left")
    for heading in ("", "", *(f"student by {method}" for method in runs)):
        result.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for role in READING_ORDER:
        cells = [_cell(record.networks[role].accuracy) for record in records]
        result.add_row("accuracy", role, *cells, end_section=role == READING_ORDER[-1])
    for layer in records[0].layers:
        for name in _SHOWN:
            cells = [
                _cell((record.scores[layer] | record.contrasts[layer])[name], sign=name in record.contrasts[layer]) for record in records
            ]
            result.add_row(
                layer if name == _SHOWN[0] else "", name.replace(" - ", " \N{MINUS SIGN} "), *cells, end_section=name == _SHOWN[-1]
            )
    return result


def _cell(entry: Entry, sign: bool = False) -> str:
    value, interval = wording.span(entry, 3, sign)
    return f"{value} ({interval})"

"""Write the tables of figures in README.md and of docs/ from the stored results.

Only this module writes the text between the pages' markers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import evidence_claims, evidence_tables, gpu_model, gpu_tables, growth, methods, planted_tables, training
from benchmarks.busy import BUSY as BESIDE
from benchmarks.busy import IDLE as ALONE
from benchmarks.cases import CASES, PROCESS_KINDS
from benchmarks.cold import COMMANDS, IMPORTS
from benchmarks.folder import MORE, PICTURE
from benchmarks.growth import Records
from benchmarks.markdown import counted, header, joined, row
from benchmarks.record import RESULTS, quartiles
from benchmarks.stored import SUITE, read

ROOT = Path(__file__).parents[1]
README, PERFORMANCE, PLANTED = ROOT / "README.md", ROOT / "docs" / "performance.md", ROOT / "docs" / "planted.md"
EVIDENCE = ROOT / "docs" / "evidence.md"
GPU = ROOT / "docs" / "gpu.md"
DISTILLATION, TRAINING = ROOT / "docs" / "distillation.md", ROOT / "docs" / "training.md"
DRAWING = ROOT / "docs" / "growth.svg"

NONE = "–"
HEADLINE = "explain resnet50 layer4 x32"
HEADLINE_VARIANTS = ("published", "fair", "compiled", "kdx")
"""The case and the variants of README.md's table."""

FORMER_NAMES = {
    "a call a batch": "one call per batch",
    "the fastest ordering": "SuperLU, fastest ordering",
    "the same, a thread a core": "SuperLU, one thread per core",
}
"""Present names of variants that older results are stored under."""

REMOVED = ("kdx, ONNX Runtime TensorRT",)
"""Variants of older results that no longer exist. None of them ran."""


# ---- tables ----


def headline(records: Records) -> str:
    """README.md's table: one case, four variants."""
    if HEADLINE not in records:
        return "No result is stored.\n"
    record = records[HEADLINE]
    lines = header(_title(HEADLINE), "median", f"relative to {record['over']}", "peak memory")
    for variant in HEADLINE_VARIANTS:
        if variant in record["samples"]:
            lines.append(row(variant, _seconds(record, variant), _ratio(record, variant), _peak(record, variant)))
    return f"{joined(lines)}\n\n{_machine(record)} {_rounds({HEADLINE: record})}\n"


def explain(records: Records) -> str:
    """A table for each end-to-end case."""
    selected = _of_kinds(records, "explain")
    tables = []
    for name, record in selected.items():
        lines = header(
            _title(name), "median", f"relative to {record['over']}", "peak memory", "relative to the lower bound", "difference of the maps"
        )
        for variant in record["samples"]:
            cells = (_seconds, _ratio, _peak, _lower_bound, _difference)
            lines.append(row(variant, *(cell(record, variant) for cell in cells)))
        tables.append(joined(lines))
    return _with_notes("\n\n".join(tables), selected, "explain")


def geometry(records: Records) -> str:
    """A row for each case of the geometry alone."""
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "median of kdx": lambda record: _seconds(record, "kdx"),
        "published relative to kdx": lambda record: _ratio(record, "published"),
        "fair relative to kdx": lambda record: _ratio(record, "fair"),
        "peak memory of kdx, fair, published": lambda record: ", ".join(_peak(record, name) for name in ("kdx", "fair", "published")),
        "kdx relative to the lower bound": lambda record: _lower_bound(record, "kdx"),
    }
    selected = _of_kinds(records, "geometry")
    lines = header("batch size and feature shape", *columns)
    for name, record in selected.items():
        lines.append(row(name.removeprefix("geometry "), *(column(record) for column in columns.values())))
    return _with_notes(joined(lines), selected, "geometry")


def variants(*kinds: str) -> Callable[[Records], str]:
    """A table with a row for each variant of each case of these kinds: cases whose variants differ share no columns."""

    def table(records: Records) -> str:
        selected = _of_kinds(records, *kinds)
        lines = header("case", "variant", "median", "relative to the baseline", "peak memory", "relative to the lower bound")
        for record in selected.values():
            for variant in record["samples"]:
                name = FORMER_NAMES.get(variant, variant) + _file_size(record, variant)
                cells = (_seconds, _ratio, _peak, _lower_bound)
                lines.append(row(record["case"], name, *(cell(record, variant) for cell in cells)))
        return _with_notes(joined(lines) if selected else "", selected, *kinds)

    return table


def folder(_: Records) -> str:
    """The table of `benchmarks.folder`, whose parts are whole commands and not variants of one result."""
    path = RESULTS / "folder.json"
    if not path.exists():
        return "No result is stored.\n"
    record = json.loads(path.read_text())
    images, speed, ratios = record["images"], record["images_per_second"], record["ratios"]
    few, many = (record["peak_bytes"][part] / 1e9 for part in ("whole", "whole of more"))
    rows = {
        "decoding alone": "decoding",
        "networks and geometry alone, on decoded images": "inference",
        f"`kdx explain`, {images:,} images from start to page": "whole",
        f"`kdx explain`, {MORE * images:,} images from start to page": "whole of more",
        "`kdx explain`, each additional image": "each image more",
    }
    lines = header(f"JPEGs of {PICTURE[0]} x {PICTURE[1]}, {record['case']}, batches of {record['batch']}", "images per second")
    lines += [row(label, f"{speed[part][1]:.1f}") for label, part in rows.items()]
    costs = (
        f"Each additional image costs {ratios['each image more over the slower'][1]:.3f} times the slower stage, and "
        f"{ratios['each image more over the sum'][1]:.3f} times both stages together, which share the cores. Peak memory: {few:.2f} GB "
        f"with {images:,} images, {many:.2f} GB with {MORE * images:,}. A run writes {record['bytes_per_1000_images'] / 1e6:.2f} MB per "
        f"1,000 images."
    )
    rounds = _medians(record, len(record["samples"]["whole"]))
    return "\n\n".join([joined(lines), costs, _machine(record), rounds]) + "\n"


def whole(_: Records) -> str:
    """The table of `benchmarks.whole`, whose cases are sweeps of their own."""
    path = RESULTS / "whole.json"
    if not path.exists():
        return "No result is stored.\n"
    record = json.loads(path.read_text())
    lines = header("two networks", "both sweeps", "bare products", "share of the passes", "peak memory", "features on disk")
    for case in record["cases"]:
        name = f"{case['n']:,} images, {case['channels']} x {case['side']} x {case['side']}"
        share = f"{case['seconds'] / case['pass_seconds']:.1%} of {case['pass_seconds']:.0f} s" if "pass_seconds" in case else NONE
        sizes = (f"{case[key] / 1e9:.2f} GB" for key in ("peak_bytes", "feature_bytes"))
        lines.append(row(name, f"{case['seconds']:.1f} s", f"{case['bare_seconds']:.1f} s", share, *sizes))
    rounds = _medians(record, len(record["cases"][0]["samples"]))
    return "\n\n".join([joined(lines), _machine(record), rounds]) + "\n"


def busy(_: Records) -> str:
    """The table of `benchmarks.busy`."""
    path = RESULTS / "busy.json"
    if not path.exists():
        return "No result is stored.\n"
    record = json.loads(path.read_text())
    lines = header("case", "variant", ALONE, BESIDE, "ratio")
    missed = []
    for case in record["cases"]:
        for variant, measured in case["variants"].items():
            alone, beside = (quartiles(measured["samples"][condition])[1] for condition in (ALONE, BESIDE))
            lines.append(row(case["case"], variant, _duration(alone), _duration(beside), f"{measured['ratio'][1]:.2f}"))
            missed += [f"{case['case']}, {variant}"] if measured["ratio"][1] > record["goal"] else []
    rounds = _medians(record, len(next(iter(record["cases"][0]["variants"].values()))["samples"][ALONE]), "paired rounds")
    goal = f"The goal of at most {record['goal']} times is missed by: {'; '.join(missed)}." if missed else "All cases reach the goal."
    return "\n\n".join([joined(lines), goal, _machine(record), rounds]) + "\n"


def planted(table: Callable[[planted_tables.Record], str]) -> Callable[[Records], str]:
    """A table of `benchmarks.planted`, which stores one result of its own."""
    return lambda _: table(planted_tables.stored()) if planted_tables.PATH.exists() else "No result is stored.\n"


def evidence(table: Callable[[evidence_claims.Record], str]) -> Callable[[Records], str]:
    """A table of `benchmarks.evidence`, which stores a result of its own."""
    return lambda _: table(evidence_tables.stored()) if evidence_tables.PATH.exists() else "No result is stored.\n"


def process_start(records: Records) -> str:
    """A row for each process that only starts, with its goal. Without a stored result the goals are shown alone."""
    (case,) = (case for case in CASES if case.kind == "process start")
    selected = _of_kinds(records, case.kind)
    samples = selected[case.name]["samples"] if case.name in selected else {}
    goals = {goal.variant: goal for goal in case.goals}
    lines = header("process", "median (quartiles)", f"difference from `{case.baseline}`", "goal", "result")
    for name in (*COMMANDS, *IMPORTS):
        cells = [_spread(samples[name]) if name in samples else NONE, NONE, NONE, NONE]
        if name in IMPORTS and name != case.baseline and {name, case.baseline} <= set(samples):
            cells[1] = _spread(np.array(samples[name]) - np.array(samples[case.baseline]))
        if name in goals:
            goal = goals[name]
            subject = "the median" if goal.quantity == "seconds" else "the difference"
            holds = goal.judged(case.baseline, samples)["holds"]
            cells[2:] = f"{subject} at {goal.bound} {goal.value:g} s", {True: "reached", False: "missed", None: "not measured"}[holds]
        lines.append(row(f"`{name}`" if name in COMMANDS else f'`python -c "{name}"`', *cells))
    return _with_notes(joined(lines), selected, case.kind, goals=False)


def growing(records: Records) -> str:
    """The fitted exponents of `benchmarks.growth`."""
    lines = header("size", "variant", "exponent", "sizes")
    for title, curves in growth.curves(records).items():
        for curve in curves:
            lines.append(row(title, curve.label, f"{curve.exponent:.2f}", ", ".join(f"{size:,.0f}" for size in curve.sizes)))
    return joined(lines) + "\n"


PAGES: dict[Path, dict[str, Callable[[Records], str]]] = {
    README: {"explain": headline, "gpu": lambda _: gpu_tables.headline()},
    PERFORMANCE: {
        "explain": explain,
        "geometry": geometry,
        "decomposition": variants("decomposition"),
        "scores": variants("scores", "estimators", "beside dcor", "permutations", "batches"),
        "imputation": variants("imputation"),
        "neighbours": variants("neighbours of unicam", "neighbours of compare"),
        "busy": busy,
        "folder": folder,
        "whole": whole,
        "growth": growing,
        "files": variants("gradients", "export", "cold start"),
        "start": process_start,
    },
    GPU: {
        "batch": lambda _: gpu_tables.batch(),
        "kernels": lambda _: gpu_tables.kernels(),
        "command": lambda _: gpu_tables.stored_command(),
        "counts": lambda _: gpu_model.counts(),
        "estimates": lambda _: gpu_model.estimates(),
    },
    DISTILLATION: {"methods": lambda _: methods.markdown()},
    TRAINING: {"training": lambda _: training.markdown()},
    PLANTED: {name: planted(table) for name, table in planted_tables.TABLES.items()},
    EVIDENCE: {
        **{name: evidence(table) for name, table in evidence_tables.TABLES.items()},
        "imagenet": lambda _: evidence_tables.imagenet(),
    },
}


def filled(page: Path) -> str:
    """The page's text, with the tables of the stored results between its markers."""
    records, text = read(SUITE), page.read_text()
    for name, table in PAGES[page].items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, rest = text.split(start)
        text = f"{before}{start}{table(records)}{end}{rest.split(end)[1]}"
    return text


def _of_kinds(records: Records, *kinds: str) -> dict[str, Mapping[str, Any]]:
    return {name: record for name, record in records.items() if record["kind"] in kinds}


def _title(name: str) -> str:
    return f"{name.removeprefix('explain ').replace(' x', ', batch ')}, side 224"


# ---- notes below a table ----


def _with_notes(table: str, records: Records, *kinds: str, goals: bool = True) -> str:
    """The table, the goals that were missed or not measured, what is not stored or cannot run, and where the figures come from.

    goals: False if the table itself shows the goals.
    """
    known = {case.name for case in CASES if case.kind in kinds}
    missed, unknown = (_goals(records, holds) if goals else [] for holds in (False, None))
    not_stored = sorted(known - set(records))
    notes = [
        f"Missed goals: {'; '.join(missed)}." if missed else "",
        f"Goals without a measurement: {'; '.join(unknown)}." if unknown else "",
        f"Cases without a stored result: {', '.join(not_stored)}." if not_stored else "",
        *_not_run(records),
        *sorted({_machine(record) for record in records.values()}),
        _rounds(records),
    ]
    return "\n\n".join(filter(None, [table, *notes])) + "\n"


def _goals(records: Records, holds: bool | None) -> list[str]:
    """The goals that hold, do not hold (False) or were not measured (None)."""
    goals = []
    for name, record in records.items():
        for goal in record["goals"]:
            if goal["holds"] is holds:
                unit = goal.get("unit", "")  # the first records hold ratios only
                measured = "" if goal["found"] is None else f" (measured {goal['found']:.4g}{unit})"
                goals.append(f"{name}, {goal['ratio']} at {goal['bound']} {goal['wanted']:.3g}{unit}{measured}")
    return goals


def _not_run(records: Records) -> list[str]:
    """A sentence per variant and reason; it names the cases unless they are all of them."""
    cases: dict[tuple[str, str], list[str]] = {}
    for name, record in records.items():
        for variant, reason in record["missing"].items():
            if variant not in REMOVED:
                cases.setdefault((variant, reason), []).append(name)
    notes = []
    for (variant, reason), names in sorted(cases.items()):
        among = "" if len(names) == len(records) else f" ({', '.join(names)})"
        notes.append(f"*{variant}* was not run{among}: {reason.rstrip('.')}.")
    return notes


def _rounds(records: Records) -> str:
    """The number of rounds, the cases with fewer rounds than most, and the commits."""
    cases: dict[int, list[str]] = {}
    for name, record in records.items():
        cases.setdefault(len(next(iter(record["samples"].values()))), []).append(name)
    if not cases:
        return ""
    most = max(cases)
    fewer = [f"{rounds} for {' and '.join(names)}" for rounds, names in sorted(cases.items()) if rounds != most]
    commits = sorted({record["commit"] for record in records.values()})
    return f"Medians of {most} paired rounds{''.join(f', {part}' for part in fewer)}; commit {', '.join(commits)}."


def _medians(record: Mapping[str, Any], rounds: int, kind: str = "rounds") -> str:
    """The number of rounds and the commit of a record that is no result of the suite."""
    return f"{f'Medians of {rounds} {kind}' if rounds > 1 else 'One round'}; commit {record['commit']}."


def _machine(record: Mapping[str, Any]) -> str:
    environment = record["environment"]
    versions = f"PyTorch {environment['torch']}, ONNX Runtime {environment['onnxruntime']}"
    return f"{environment['processor']}, {counted(environment['threads'], 'thread')}, {versions}."


# ---- cells ----


def _seconds(record: Mapping[str, Any], variant: str) -> str:
    if variant not in record["samples"]:
        return NONE
    return _duration(quartiles(record["samples"][variant])[1])


def _duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if abs(seconds) >= 1 else f"{seconds * 1e3:.3g} ms"


def _spread(seconds: NDArray[np.float64] | list[float]) -> str:
    low, median, high = quartiles(seconds)
    return f"{_duration(median)} ({_duration(low)} to {_duration(high)})"


def _ratio(record: Mapping[str, Any], variant: str) -> str:
    """The median and the quartiles, to three digits; 1 for the baseline itself."""
    if variant not in record["ratios"]:
        return "1" if variant == record["over"] else NONE
    low, middle, high = (f"{value:.{2 - min(2, int(value >= 10) + int(value >= 100))}f}" for value in record["ratios"][variant])
    return f"{middle} ({low} to {high})"


def _difference(record: Mapping[str, Any], variant: str) -> str:
    """The larger of the two maps' mean absolute differences from the first variant's maps, whose values lie in [0, 1]."""
    differences = [record["figures"].get(f"{which} map of {variant}") for which in ("distilled", "residual")]
    return NONE if None in differences else f"{max(differences):.1g}"


def _peak(record: Mapping[str, Any], variant: str) -> str:
    """The memory of a variant's own process; a variant that starts processes has no figure for theirs."""
    if variant not in record["peak_bytes"] or record["kind"] in PROCESS_KINDS:
        return NONE
    return f"{record['peak_bytes'][variant] / 1e9:.2f} GB"


def _file_size(record: Mapping[str, Any], variant: str) -> str:
    """The size of the file that a variant writes."""
    size = record["figures"].get(f"{variant}, bytes")
    return "" if size is None else f", {size / 1e6:.1f} MB"


def _lower_bound(record: Mapping[str, Any], variant: str) -> str:
    if variant not in record.get("over_floor", {}):
        return NONE
    times = record["over_floor"][variant]
    return f"{times:.2g}" if times < 10 else f"{times:,.0f}"


def main() -> None:
    growth.draw(read(SUITE), DRAWING)
    for page in PAGES:
        page.write_text(filled(page))


if __name__ == "__main__":
    main()

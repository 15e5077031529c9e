"""The tables of figures in the README and in docs/performance.md, from the stored results: what stands between their markers is
written here and nowhere else."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import growth
from benchmarks.cases import CASES
from benchmarks.folder import MORE, PICTURE
from benchmarks.growth import Records
from benchmarks.record import RESULTS, quartiles
from benchmarks.run import SUITE, read

ROOT = Path(__file__).parents[1]
README, PERFORMANCE, DRAWING = ROOT / "README.md", ROOT / "docs" / "performance.md", ROOT / "docs" / "growth.svg"

NONE = "–"
SHOWN = ("explain resnet50 layer4 x32", "explain resnet18 layer4 x32")
"""The end-to-end cases of the README; the others are in docs/performance.md."""


def explain(*, shown: bool) -> Callable[[Records], str]:
    """A table for each end-to-end case that is among the README's (shown) or is not."""

    def tables(records: Records) -> str:
        found = {name: record for name, record in _of(records, "explain").items() if (name in SHOWN) == shown}
        parts = []
        for name, record in found.items():
            title = name.removeprefix("explain ").replace(" x", ", batch ")
            lines = [f"| {title}, side 224 | median | times kdx's | peak memory | over the floor | maps differ by |", "| --- " * 6 + "|"]
            for way in record["samples"]:
                cells = (way, _seconds(record, way), _ratio(record, way), _peak(record, way), _floor(record, way), _difference(record, way))
                lines.append(f"| {' | '.join(cells)} |")
            parts.append("\n".join(lines))
        known = {case.name for case in CASES if case.kind == "explain" and (case.name in SHOWN) == shown}
        return _with_notes("\n\n".join(parts), found, known)

    return tables


def geometry(records: Records) -> str:
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "kdx": lambda record: _seconds(record, "kdx"),
        "published, times kdx's": lambda record: _ratio(record, "published"),
        "fair, times kdx's": lambda record: _ratio(record, "fair"),
        "peak memory of kdx, fair and published": lambda record: ", ".join(_peak(record, way) for way in ("kdx", "fair", "published")),
        "kdx over the floor": lambda record: _floor(record, "kdx"),
    }
    found = _of(records, "geometry")
    lines = [f"| Geometry alone, both maps | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
    for name, record in found.items():
        lines.append(f"| {name.removeprefix('geometry ')} | {' | '.join(column(record) for column in columns.values())} |")
    return _with_notes("\n".join(lines), found, {case.name for case in CASES if case.kind == "geometry"})


def ways(*kinds: str) -> Callable[[Records], str]:
    """A row for every way of every case of these kinds: cases whose ways differ have no columns in common."""

    def table(records: Records) -> str:
        found = _of(records, *kinds)
        lines = ["| | median | ratio of times (quartiles) | peak memory | over the floor |", "| --- " * 5 + "|"]
        for record in found.values():
            for way in record["samples"]:
                ratio = _ratio(record, way)
                over = NONE if ratio == NONE else f"{ratio}, to {record['over']}"
                label = f"{record['case']}: {way}{_file(record, way)}"
                lines.append(f"| {label} | {_seconds(record, way)} | {over} | {_peak(record, way)} | {_floor(record, way)} |")
        return _with_notes("\n".join(lines) if found else "", found, {case.name for case in CASES if case.kind in kinds})

    return table


def folder(_: Records) -> str:
    """From the record of `benchmarks.folder`, whose parts are whole commands and no ways to one result."""
    path = RESULTS / "folder.json"
    if not path.exists():
        return "No result is stored.\n"
    record = json.loads(path.read_text())
    images, speed, ratios = record["images"], record["images_per_second"], record["ratios"]
    few, many = (record["peak_bytes"][part] / 1e9 for part in ("whole", "whole of more"))
    rows = {
        "decoding alone": "decoding",
        "networks and geometry alone, of decoded images": "inference",
        f"`kdx explain`, {images:,} images from start to page": "whole",
        f"`kdx explain`, {MORE * images:,} images from start to page": "whole of more",
        "`kdx explain`, each image more": "each image more",
    }
    lines = [f"| JPEGs of {PICTURE[0]} x {PICTURE[1]}, {record['case']}, batches of {record['batch']} | images a second |", "| --- | --- |"]
    lines += [f"| {label} | {speed[part][1]:.1f} |" for label, part in rows.items()]
    said = (
        f"An image more takes {ratios['each image more over the slower'][1]:.3f} of the time of the slower part, and "
        f"{ratios['each image more over the sum'][1]:.3f} of both parts' together, which share the cores. Peak memory: {few:.2f} GB at "
        f"{images:,} images, {many:.2f} GB at {MORE * images:,}. {record['bytes_per_1000_images'] / 1e6:.2f} MB are written for "
        f"1,000 images."
    )
    rounds = len(record["samples"]["whole"])
    taken = f"Medians of {rounds} rounds" if rounds > 1 else "One round"
    return "\n\n".join(["\n".join(lines), said, _machine(record), f"{taken}; at commit {record['commit']}."]) + "\n"


def growing(records: Records) -> str:
    rows = [(title, curve) for title, lines in growth.curves(records).items() for curve in lines]
    lines = ["| over | way | power | sizes |", "| --- | --- | --- | --- |"]
    for title, curve in rows:
        lines.append(f"| {title} | {curve.label} | {curve.exponent:.2f} | {', '.join(f'{size:,.0f}' for size in curve.sizes)} |")
    return "\n".join(lines) + "\n"


PAGES: dict[Path, dict[str, Callable[[Records], str]]] = {
    README: {
        "explain": explain(shown=True),
        "geometry": geometry,
        "scores": ways("scores", "estimators", "beside dcor", "permutations", "batches"),
        "imputation": ways("imputation"),
        "folder": folder,
    },
    PERFORMANCE: {"explain": explain(shown=False), "growth": growing, "files": ways("gradients", "export", "cold start")},
}


def filled(page: Path) -> str:
    """The page with its tables of the stored results between their markers."""
    records, text = read(SUITE), page.read_text()
    for name, table in PAGES[page].items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, rest = text.split(start)
        text = f"{before}{start}{table(records)}{end}{rest.split(end)[1]}"
    return text


def _of(records: Records, *kinds: str) -> dict[str, Mapping[str, Any]]:
    return {name: record for name, record in records.items() if record["kind"] in kinds}


def _with_notes(table: str, records: Records, known: set[str]) -> str:
    """The table; then which goals are not reached or not known, what is not stored of the ``known`` cases, what cannot run, and where."""
    missed, unknown = (
        [
            f"{name}, {goal['ratio']} at {goal['bound']} {goal['wanted']:.3g}"
            + ("" if goal["found"] is None else f" (found {goal['found']:.4g})")
            for name, record in records.items()
            for goal in record["goals"]
            if goal["holds"] is holds
        ]
        for holds in (False, None)
    )
    missing: dict[str, list[str]] = {}
    for name, record in records.items():
        for way, why in record["missing"].items():
            missing.setdefault(f"{way}: {why}", []).append(name)
    not_stored = sorted(known - set(records))
    notes = [
        f"Wanted and not reached: {'; '.join(missed)}." if missed else "",
        f"Wanted and not known: {'; '.join(unknown)}." if unknown else "",
        f"No result is stored of {', '.join(not_stored)}." if not_stored else "",
        *(f"Not run: {why.rstrip('.')}{_among(names, records)}." for why, names in sorted(missing.items())),
        *sorted({_machine(record) for record in records.values()}),
        _rounds(records),
    ]
    return "\n\n".join(filter(None, [table, *notes])) + "\n"


def _among(names: Sequence[str], records: Records) -> str:
    return "" if len(names) == len(records) else f" ({', '.join(names)})"


def _rounds(records: Records) -> str:
    """How many rounds there were, and of which cases not so many as of most; and at which commits."""
    cases: dict[int, list[str]] = {}
    for name, record in records.items():
        cases.setdefault(len(next(iter(record["samples"].values()))), []).append(name)
    if not cases:
        return ""
    most = max(cases)
    fewer = [f"{rounds} of {', '.join(names)}" for rounds, names in sorted(cases.items()) if rounds != most]
    commits = sorted({record["commit"] for record in records.values()})
    return f"Medians of {most} paired rounds{''.join(f', {each}' for each in fewer)}; at commit {', '.join(commits)}."


def _machine(record: Mapping[str, Any]) -> str:
    environment = record["environment"]
    versions = f"PyTorch {environment['torch']}, ONNX Runtime {environment['onnxruntime']}"
    return f"{environment['processor']}, {environment['threads']} threads, {versions}."


def _seconds(record: Mapping[str, Any], way: str) -> str:
    if way not in record["samples"]:
        return NONE
    seconds = quartiles(record["samples"][way])[1]
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _ratio(record: Mapping[str, Any], way: str) -> str:
    """The median and the quartiles, to three digits."""
    if way not in record["ratios"]:
        return NONE
    low, middle, high = (f"{value:.{2 - min(2, int(value >= 10) + int(value >= 100))}f}" for value in record["ratios"][way])
    return f"{middle} ({low} to {high})"


def _difference(record: Mapping[str, Any], way: str) -> str:
    """The larger of the two maps' mean absolute differences, of maps from 0 to 1, from the first way's."""
    found = [record["figures"].get(f"{which} map of {way}") for which in ("distilled", "residual")]
    return NONE if None in found else f"{max(found):.1g}"


def _peak(record: Mapping[str, Any], way: str) -> str:
    return f"{record['peak_bytes'][way] / 1e9:.2f} GB" if way in record["peak_bytes"] else NONE


def _file(record: Mapping[str, Any], way: str) -> str:
    """What a way that writes a file says of its size."""
    size = record["figures"].get(f"{way}, bytes")
    return "" if size is None else f", {size / 1e6:.1f} MB"


def _floor(record: Mapping[str, Any], way: str) -> str:
    if way not in record.get("over_floor", {}):
        return NONE
    times = record["over_floor"][way]
    return f"{times:.2g}" if times < 10 else f"{times:,.0f}"


def main() -> None:
    growth.draw(read(SUITE), DRAWING)
    for page in PAGES:
        page.write_text(filled(page))


if __name__ == "__main__":
    main()

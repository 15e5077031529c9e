"""The tables of figures in the README and in docs/performance.md, from the stored results: what stands between their markers is
written here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import growth
from benchmarks.record import quartiles
from benchmarks.run import SUITE, read

ROOT = Path(__file__).parents[1]
README, PERFORMANCE, DRAWING = ROOT / "README.md", ROOT / "docs" / "performance.md", ROOT / "docs" / "growth.svg"

Records = Mapping[str, Mapping[str, Any]]
NONE = "–"


def explain(records: Records) -> str:
    found = _of(records, "explain")
    columns = {
        "kdx": lambda record: _seconds(record, "kdx"),
        "published eager path over kdx": lambda record: _ratio(record, "published"),
        "fair eager path": lambda record: _ratio(record, "fair"),
        "compiled": lambda record: _ratio(record, "compiled"),
        "two bare passes": lambda record: _ratio(record, "bare passes", 3),
        "kdx on OpenVINO": lambda record: _ratio(record, "kdx, OpenVINO"),
        "in bfloat16": lambda record: _ratio(record, "kdx, OpenVINO bf16"),
        "peak memory, kdx and published": lambda record: f"{_peak(record, 'kdx')}, {_peak(record, 'published')}",
        "kdx over the floor": lambda record: _floor(record, "kdx"),
    }
    return _table("Explained end to end (side 224)", found, columns)


def geometry(records: Records) -> str:
    columns = {
        "kdx": lambda record: _seconds(record, "kdx"),
        "published over kdx": lambda record: _ratio(record, "published"),
        "fair over kdx": lambda record: _ratio(record, "fair"),
        "peak memory of kdx": lambda record: _peak(record, "kdx"),
        "kdx over the floor": lambda record: _floor(record, "kdx"),
    }
    return _table("Geometry alone, both maps", _of(records, "geometry"), columns)


def ways(*kinds: str) -> Callable[[Records], str]:
    """A row for every way of every case of these kinds: cases whose ways differ have no columns in common."""

    def table(records: Records) -> str:
        found = _of(records, *kinds)
        if not found:
            return f"No result of {', '.join(kinds)} is stored.\n"
        lines = ["| | median | ratio (quartiles) | peak memory |", "| --- | --- | --- | --- |"]
        for record in found.values():
            for way in record["samples"]:
                ratio = _ratio(record, way, spread=True)
                over = NONE if ratio == NONE else f"{ratio} of {record['over']}"
                lines.append(f"| {record['case']}: {way} | {_seconds(record, way)} | {over} | {_peak(record, way)} |")
        return _with_notes("\n".join(lines), found)

    return table


def growing(records: Records) -> str:
    rows = [(title, curve) for title, lines in growth.curves(records).items() for curve in lines]
    lines = ["| over | way | power | sizes |", "| --- | --- | --- | --- |"]
    for title, curve in rows:
        lines.append(f"| {title} | {curve.label} | {curve.exponent:.2f} | {', '.join(f'{size:,.0f}' for size in curve.sizes)} |")
    return "\n".join(lines) + "\n"


PAGES: dict[Path, dict[str, Callable[[Records], str]]] = {
    README: {
        "explain": explain,
        "geometry": geometry,
        "scores": ways("scores", "permutations", "batches", "beside dcor"),
        "imputation": ways("imputation"),
    },
    PERFORMANCE: {"growth": growing, "files": ways("gradients", "export", "cold start")},
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


def _table(title: str, records: Records, columns: Mapping[str, Callable[[Mapping[str, Any]], str]]) -> str:
    lines = [f"| {title} | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
    for name, record in records.items():
        label = name.removeprefix(f"{record['kind']} ").replace(" x", ", batch ") if record["kind"] == "explain" else name
        lines.append(f"| {label} | {' | '.join(column(record) for column in columns.values())} |")
    return _with_notes("\n".join(lines), records)


def _with_notes(table: str, records: Records) -> str:
    """The table, what of the goals is not reached, what cannot run, and on which machine."""
    wanted = [
        f"{name}, {goal['ratio']} at {goal['bound']} {goal['wanted']:.3g} (found {goal['found']:.3g})"
        for name, record in records.items()
        for goal in record["goals"]
        if goal["holds"] is False
    ]
    missing = {f"{way}: {why}" for record in records.values() for way, why in record["missing"].items()}
    notes = [f"Wanted and not reached: {'; '.join(wanted)}." if wanted else "", *(f"Not run: {each}" for each in sorted(missing))]
    machines = {_machine(record) for record in records.values()}
    return "\n\n".join([table, *filter(None, notes), *sorted(machines)]) + "\n"


def _machine(record: Mapping[str, Any]) -> str:
    environment = record["environment"]
    versions = f"PyTorch {environment['torch']}, ONNX Runtime {environment['onnxruntime']}"
    rounds: Sequence[float] = next(iter(record["samples"].values()))
    return f"{environment['processor']}, {environment['threads']} threads, {versions}; {len(rounds)} paired rounds, medians."


def _seconds(record: Mapping[str, Any], way: str) -> str:
    if way not in record["samples"]:
        return NONE
    seconds = quartiles(record["samples"][way])[1]
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _ratio(record: Mapping[str, Any], way: str, digits: int = 2, *, spread: bool = False) -> str:
    if way not in record["ratios"]:
        return NONE
    low, middle, high = (f"{value:.{max(0, digits - (value >= 10) - (value >= 100))}f}" for value in record["ratios"][way])
    return f"{middle} ({low} to {high})" if spread else middle


def _peak(record: Mapping[str, Any], way: str) -> str:
    return f"{record['peak_bytes'][way] / 1e9:.2f} GB" if way in record["peak_bytes"] else NONE


def _floor(record: Mapping[str, Any], way: str) -> str:
    return f"{record['over_floor'][way]:.2g}" if way in record.get("over_floor", {}) else NONE


def main() -> None:
    growth.draw(read(SUITE), DRAWING)
    for page in PAGES:
        page.write_text(filled(page))


if __name__ == "__main__":
    main()

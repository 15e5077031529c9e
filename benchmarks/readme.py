"""The README's tables of figures, from the stored results: what stands between their markers is written here and nowhere else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, quartiles

README = Path(__file__).parents[1] / "README.md"


def batch(record: dict[str, Any]) -> str:
    samples = record["samples"]
    return _table(
        record["case"],
        {
            "two bare forward passes (ONNX Runtime)": f"{_median(samples['passes']):.2f} s",
            "the same passes, explained": f"{_median(samples['explained']):.2f} s",
            "explained over bare, paired (quartiles)": _quartiles(record["ratio"], 3),
            "the geometry alone": f"{_median(samples['geometry']) * 1e3:.0f} ms",
            "peak memory of the process": f"{record['peak_bytes'] / 1e9:.2f} GB",
        },
        f"{_machine(record)}, ONNX Runtime {record['environment']['onnxruntime']}; {len(samples['passes'])} rounds in alternating order.",
    )


def scores(record: dict[str, Any]) -> str:
    large, huge, batches, most = (record[name] for name in ("large", "huge", "batches", "dcor"))
    extra = record["permutations"]["extra"]
    return _table(
        "RS(X\\|Y) of random features to ten classes, with its interval",
        {
            f"{_size(large)}: over the bare Gram products of both": _quartiles(large["ratio"], 2),
            "the same with 999 permutations": _quartiles(large["ratio_permutations"], 2),
            "its memory over the features": f"{large['memory']['over'] / 1e6:.0f} MB",
            f"{_size(huge)}, with 999 permutations": f"{huge['seconds']:.0f} s, {huge['peak'] / 1e9:.2f} GB for the process",
            f"{_size(record['permutations'])}: 999 permutations over the score itself": f"{extra['classes'][1]:.2f}",
            "10,000 images in batches of 64, three models, all scores: a call a batch over one call": f"{batches['ratio']:.1f}",
            f"{_size(most)}: dcor over kdx, at the largest N that dcor holds": f"{most['dcor'] / most['kdx']:.0f}",
        },
        f"{_machine(record)}; {len(large['samples']['bare'])} rounds in alternating order.",
    )


def imputation(record: dict[str, Any]) -> str:
    rows = {}
    for mask, found in record["masks"].items():
        rows[f"{mask}: kdx"] = f"{_median(found['samples']['kdx']) * 1e3:.0f} ms"
        plain, best, threads = (found["ratios"][name][1] for name in ("spsolve", "direct", "threads"))
        rows[f"{mask}: spsolve over kdx; its fastest ordering; that with a thread a core"] = f"{plain:.1f}; {best:.1f}; {threads:.1f}"
    return _table(record["case"], rows, f"{_machine(record)}.")


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {"batch": batch, "scores": scores, "imputation": imputation}


def filled(readme: str) -> str:
    """The README with a table of each stored result between its markers."""
    for name, table in TABLES.items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, rest = readme.split(start)
        readme = f"{before}{start}{table(json.loads((RESULTS / f'{name}.json').read_text()))}{end}{rest.split(end)[1]}"
    return readme


def _table(title: str, rows: dict[str, str], below: str) -> str:
    body = "".join(f"| {label} | {value} |\n" for label, value in rows.items())
    return f"| {title} | |\n| --- | --- |\n{body}\n{below}\n"


def _machine(record: dict[str, Any]) -> str:
    environment = record["environment"]
    return f"{environment['processor']}, {environment['threads']} threads, PyTorch {environment['torch']}"


def _median(samples: list[float]) -> float:
    return quartiles(samples)[1]


def _quartiles(values: list[float], digits: int) -> str:
    low, middle, high = (f"{value:.{digits}f}" for value in values)
    return f"{middle} ({low} to {high})"


def _size(case: dict[str, Any]) -> str:
    return f"N = {case['n']:,}, d = {case['d']:,}"


def main() -> None:
    README.write_text(filled(README.read_text()))


if __name__ == "__main__":
    main()

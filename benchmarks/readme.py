"""The README's table of figures, from the stored results: what stands between its markers is written here and nowhere else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "batch.json"
START, END = "<!-- bench -->\n", "<!-- /bench -->"


def table(record: dict[str, Any]) -> str:
    """The stored record of `benchmarks.batch` as Markdown: medians, and quartiles of the paired ratio."""

    def median(name: str) -> float:
        values = sorted(record["samples"][name])
        return float(values[len(values) // 2])

    low, middle, high = record["ratio"]
    environment = record["environment"]
    return (
        f"| {record['case']} | |\n| --- | --- |\n"
        f"| two bare forward passes (ONNX Runtime) | {median('passes'):.2f} s |\n"
        f"| the same passes, explained | {median('explained'):.2f} s |\n"
        f"| explained over bare, paired (quartiles) | {middle:.3f} ({low:.3f} to {high:.3f}) |\n"
        f"| the geometry alone | {median('geometry') * 1e3:.0f} ms |\n"
        f"| peak memory of the process | {record['peak_bytes'] / 1e9:.2f} GB |\n\n"
        f"{environment['processor']}, {environment['threads']} threads, PyTorch {environment['torch']}, "
        f"ONNX Runtime {environment['onnxruntime']}; {len(record['samples']['passes'])} rounds in alternating order.\n"
    )


def filled(readme: str, record: dict[str, Any]) -> str:
    """The README with the table of ``record`` between its markers."""
    before, rest = readme.split(START)
    return f"{before}{START}{table(record)}{END}{rest.split(END)[1]}"


def main() -> None:
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text(), json.loads(RESULT.read_text())))


if __name__ == "__main__":
    main()

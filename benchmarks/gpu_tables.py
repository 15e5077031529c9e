"""The tables of docs/gpu.md, from the stored result of `benchmarks.gpu`. `benchmarks.readme` writes them into the page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from benchmarks.markdown import header, joined, row
from benchmarks.record import RESULTS, quartiles

PATH = RESULTS / "gpu.json"

BATCH = {
    "passes, float32": "two forward passes, float32",
    "passes, TF32": "two forward passes, TensorFloat-32",
    "passes, float16": "two forward passes, float16",
    "geometry": "the kernels: distances, weights, products and two maps",
    "geometry and decomposition maps": "the same, with the shares of both networks",
    "maps and scores, 0 permutations": "everything that kdx computes per batch, without permutations",
    "maps and scores, 999 permutations": "everything that kdx computes per batch",
}
"""The stored times of a batch, and what they are called on the page."""

Record = Mapping[str, Any]


def stored() -> Record | None:
    return json.loads(PATH.read_text()) if PATH.exists() else None


def batch() -> str:
    """The times of one batch, and the published method beside the kernels on as many images as fit."""
    record = stored()
    if record is None:
        return "No result is stored.\n"
    times = record["batch"]
    passes = quartiles(times["passes, float16"])[1]
    lines = header("one batch of 256", "median", "relative to the float16 passes")
    for name, title in BATCH.items():
        median = quartiles(times[name])[1]
        lines.append(row(title, _milliseconds(median), f"{median / passes:.3g}"))
    images = times["published images"]
    published, beside = (quartiles(times[name])[1] for name in ("published", "geometry beside published"))
    note = (
        f"The published method takes {_milliseconds(published)} on {images} images, which is what fits into memory. "
        f"The kernels take {_milliseconds(beside)} on the same images, {published / beside:.0f} times less, and give the same weights."
    )
    return f"{joined(lines)}\n\n{note}\n\n{_goals(record)}\n\n{_machine(record)}\n"


def kernels() -> str:
    """A row per kernel: its time and its lower bound."""
    record = stored()
    if record is None:
        return "No result is stored.\n"
    lines = header("kernel", "median", "lower bound", "lower bound relative to the median", "largest error against float64")
    errors: dict[str, float] = {}
    for check in record["checks"]:
        errors[check["name"]] = max(errors.get(check["name"], 0.0), check["error"])
    for result in record["kernels"]:
        bound = (_microseconds(result["floor"]), f"{result['share']:.0%}") if "floor" in result else ("–", "–")
        lines.append(row(result["name"], _microseconds(quartiles(result["samples"])[1]), *bound, f"{errors[result['name']]:.0e}"))
    return f"{joined(lines)}\n\nA copy moves {record['bandwidth'] / 1e12:.2f} TB/s, read and written together. {_machine(record)}\n"


def headline() -> str:
    """README.md's sentence."""
    record = stored()
    if record is None:
        return "No result is stored.\n"
    times = {name: quartiles(record["batch"][name])[1] for name in (*BATCH, "published", "geometry beside published")}
    everything, passes = times["maps and scores, 999 permutations"], times["passes, float16"]
    ratio = times["published"] / times["geometry beside published"]
    return (
        f"On an {record['device']['name']}, maps, scores and 999 permutations of 256 images (two ResNet-50, layer4) take "
        f"{_milliseconds(everything)}; the float16 forward passes take {_milliseconds(passes)}, "
        f"and the published geometry {ratio:.0f} times as long as the kernels.\n"
    )


def _goals(record: Record) -> str:
    missed = [f"{goal['goal']} {goal['found']:.3g}, wanted {goal['wanted']:g}" for goal in record["goals"] if not goal["holds"]]
    return f"Missed goals: {'; '.join(missed)}." if missed else "All goals are reached."


def _machine(record: Record) -> str:
    device, environment = record["device"], record["environment"]
    samples = len(record["batch"]["geometry"])
    return (
        f"{device['name']}, driver {device['driver']}, CUDA {device['cuda']}, {device['compiler']}, PyTorch {environment['torch']}. "
        f"Medians of {samples} samples, by events of the GPU; commit {record['commit']}."
    )


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f} µs" if seconds < 1e-3 else _milliseconds(seconds)

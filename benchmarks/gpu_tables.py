"""The tables of docs/gpu.md, from the stored result of `benchmarks.gpu`. `benchmarks.readme` writes them into the page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from benchmarks.markdown import header, joined, row
from benchmarks.record import RESULTS, quartiles

PATH = RESULTS / "gpu.json"

PASSES = {
    "passes, float32": "two forward passes, PyTorch, float32",
    "passes, TF32": "two forward passes, PyTorch, TensorFloat-32",
    "passes, float16": "two forward passes, PyTorch, float16",
    "passes, ONNX Runtime float16": "two forward passes, ONNX Runtime, float16",
    "passes, TensorRT float16": "two forward passes, TensorRT, float16",
}
BATCH = {
    **PASSES,
    "geometry": "the kernels: distances, weights, products and two maps",
    "geometry and decomposition maps": "the same, with the shares of both networks",
    "maps and scores, 0 permutations": "everything that kdx computes per batch, without permutations",
    "maps and scores, 999 permutations": "everything that kdx computes per batch",
    "maps and scores, one CUDA graph": "the same as one CUDA graph, as in `kdx explain`",
    "maps and scores, by the clock": "everything that kdx computes per batch, by the clock",
    "maps and scores, one CUDA graph, by the clock": "the same as one CUDA graph, by the clock",
    "upload": "the upload of the images, and their division by 255",
    "target and permutations": "the target and the table of permutations",
    "results to the host": "the copy of the results to the host",
    "full path": "everything except the passes, one step after another",
}
"""The stored times of a batch, and what they are called on the page."""

Record = Mapping[str, Any]


def everything(times: Mapping[str, Any]) -> str:
    """The name of the stored times of what `kdx explain` computes per batch: one CUDA graph, or single launches where none was measured."""
    graph = "maps and scores, one CUDA graph"
    return graph if graph in times else "maps and scores, 999 permutations"


def stored() -> Record | None:
    return json.loads(PATH.read_text()) if PATH.exists() else None


def batch() -> str:
    """The times of one batch, and the published method beside the kernels on as many images as fit."""
    record = stored()
    return "No result is stored.\n" if record is None else _batch(record)


def _batch(record: Record) -> str:
    times, compared = record["batch"], record.get("baseline", "passes, float16")
    passes = quartiles(times[compared])[1]
    lines = header("one batch of 256", "median", f"relative to the {PASSES[compared].removeprefix('two forward ')}")
    for name, title in BATCH.items():
        if name in times:
            median = quartiles(times[name])[1]
            lines.append(row(title, _milliseconds(median), f"{median / passes:.3g}"))
    images = times["published images"]
    published, beside = (quartiles(times[name])[1] for name in ("published", "geometry beside published"))
    note = (
        f"The published method takes {_milliseconds(published)} on {images} images, which is what fits into memory. "
        f"The kernels take {_milliseconds(beside)} on the same images, {published / beside:.0f} times less, and give the same weights."
    )
    missing = [f"{BATCH[name][0].upper()}{BATCH[name][1:]}: not measured ({reason})." for name, reason in record.get("missing", {}).items()]
    return "\n\n".join([joined(lines), note, *missing, _goals(record), _machine(record)]) + "\n"


def kernels() -> str:
    """A row per kernel: its time and its lower bound."""
    record = stored()
    return "No result is stored.\n" if record is None else _kernels(record)


def _kernels(record: Record) -> str:
    lines = header("kernel", "median", "lower bound", "lower bound relative to the median", "largest error against float64")
    errors: dict[str, float] = {}
    for check in record["checks"]:
        errors[check["name"]] = max(errors.get(check["name"], 0.0), check["error"])
    for result in record["kernels"]:
        bound = (_microseconds(result["floor"]), f"{result['share']:.0%}") if "floor" in result else ("–", "–")
        lines.append(row(result["name"], _microseconds(quartiles(result["samples"])[1]), *bound, f"{errors[result['name']]:.0e}"))
    return f"{joined(lines)}\n\nA copy moves {record['bandwidth'] / 1e12:.2f} TB/s, read and written together. {_machine(record)}\n"


def checked(record: Record) -> list[str]:
    """Lines on the tests and on the decoder."""
    tests, decoder = record["tests"], record["decoder"]
    lines = ["Tests: none were run."]
    if tests is not None and tests["timed out"]:
        lines = [f"Tests: not finished after {tests['seconds']:.0f} s."]
    elif tests is not None:
        lines = [f"Tests: {tests['passed']} passed, {len(tests['failed'])} failed, {tests['skipped']} skipped, {tests['seconds']:.0f} s."]
        lines += [f"Failed: {name}" for name in tests["failed"]]
    if "reason" in decoder:
        return [*lines, f"The decoder on the GPU was not compared: {decoder['reason']}"]
    return [
        *lines,
        f"The decoder on the GPU differs from Pillow by {decoder['mean']:.2f} levels on average over {decoder['images']} JPEGs; "
        f"99.9% of the values differ by at most {decoder['99.9%']:.0f}, and all by at most {decoder['largest']:.0f}.",
    ]


def command(record: Record) -> str:
    """Where the time of `kdx explain` goes."""
    measured = record["command"]
    if measured is None:
        return "The command was not timed.\n"
    lines = header("part", "images/s")
    lines += [row(name, f"{rate:,.0f}") for name, rate in measured["images_per_second"].items()]
    lines += [
        row(f"`kdx explain`, geometry {each['geometry']}", f"{each['images'] / each['seconds']:,.0f}") for each in measured["commands"]
    ]
    tables = []
    for each in measured["commands"]:
        stages = header(f"stage, geometry {each['geometry']}", "seconds", "share of the command")
        stages += [row(name, f"{seconds:.2f}", f"{seconds / each['seconds']:.0%}") for name, seconds in each["stages"].items()]
        tables.append(joined(stages))
    case = f"{measured['case'][0].upper()}{measured['case'][1:]}; {measured['cores']} cores."
    return "\n\n".join([joined(lines), *tables, case]) + "\n"


def stored_command() -> str:
    """`command` of the stored record, with its machine."""
    record = stored()
    if record is None:
        return "No result is stored.\n"
    return f"{command(record)}\n{record['device']['name']}. One run; commit {record['commit']}.\n"


def page(record: Record) -> str:
    """The whole record as a page in Markdown."""
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in record["seconds"].items())
    return "\n\n".join(
        [
            f"# kdx on {record['device']['name']}",
            f"{record['case']}. TensorFloat-32 is {record['tf32']}. Seed {record['seed']}. Time of each part: {seconds}.",
            "## One batch",
            _batch(record).rstrip(),
            "## The kernels",
            _kernels(record).rstrip(),
            "## Checks",
            "\n\n".join(checked(record)),
            "## `kdx explain`",
            command(record),
        ]
    )


def headline() -> str:
    """README.md's sentence."""
    record = stored()
    if record is None:
        return "No result is stored.\n"
    names = (everything(record["batch"]), "passes, float16", "published", "geometry beside published")
    times = {name: quartiles(record["batch"][name])[1] for name in names}
    per_batch, passes = times[names[0]], times["passes, float16"]
    ratio = times["published"] / times["geometry beside published"]
    return (
        f"On an {record['device']['name']}, maps, scores and 999 permutations of 256 images (two ResNet-50, layer4) take "
        f"{_milliseconds(per_batch)}; the float16 forward passes take {_milliseconds(passes)}, "
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
        f"Medians of {samples} samples; commit {record['commit']}."
    )


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f} µs" if seconds < 1e-3 else _milliseconds(seconds)

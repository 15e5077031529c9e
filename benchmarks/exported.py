"""What a file's gradients and maps cost: an explainer file against two bare passes, a gradients file against one, eager beside.

ResNet-50, 224 x 224, batch 32, ONNX Runtime on the CPU; paired rounds in alternating order, every sample kept. The files are exported
in a child process, whose time and peak memory are part of the result.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.batch import BATCH, NETWORK, SIDE
from benchmarks.record import child, paired, peak_bytes, ratio, store
from kdx import models
from kdx.explainer import explainer_graph
from kdx.export import onnx_file
from kdx.export.graphs import FeatureGraph, GradientGraph, Preprocessing
from kdx.export.onnx_file import Origin
from kdx.models import Network
from kdx.runtime import OrtRunner

PREPROCESSING = Preprocessing((SIDE, SIDE), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
TO = ("layer4", "layer4.1", "layer3")
"""Where gradients are taken: the last block's output, its input, and the last stage's input."""


def network(seed: int) -> Network:
    torch.manual_seed(seed)
    return Network(NETWORK, models.load(NETWORK).module, PREPROCESSING)


def export(folder: Path) -> dict[str, Any]:
    """Write the files; the seconds of each, and the most memory that the process ever held."""
    student, base = network(0), network(1)
    origin = Origin(NETWORK, "random")
    graphs: dict[str, onnx_file.Graph] = {}
    for role, each in (("student", student), ("base", base)):
        graphs[role] = FeatureGraph(each.module, ["layer4"], PREPROCESSING)
    for layer in TO:
        graphs[f"gradients-{layer}"] = GradientGraph(student.module, [layer], PREPROCESSING)
    seconds = {}
    for name, graph in graphs.items():
        start = time.perf_counter()
        onnx_file.write(graph, folder / f"{name}.onnx", origin=origin, image_size=(SIDE, SIDE))
        seconds[name] = time.perf_counter() - start
        peak = peak_bytes()  # of one network, before the pair
    start = time.perf_counter()
    pair = explainer_graph({"student": student, "base": base}, {"layer4": "layer4"})
    onnx_file.write(pair, folder / "explainer.onnx", origin={"student": origin, "base": origin}, image_size=(SIDE, SIDE))
    seconds["explainer"] = time.perf_counter() - start
    return {"seconds": seconds, "peak_bytes": peak, "peak_bytes_explainer": peak_bytes()}


def measure(folder: Path, rounds: int) -> dict[str, list[float]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(BATCH, 3, SIDE, SIDE, generator=generator)
    target = torch.nn.functional.one_hot(torch.arange(BATCH) % 10).float()
    cotangent = torch.nn.functional.one_hot(torch.arange(BATCH), 1000).float()
    with OrtRunner(folder / "student.onnx") as student, OrtRunner(folder / "base.onnx") as base:
        with OrtRunner(folder / "explainer.onnx") as explainer:
            both = {
                "two passes": lambda: (student.infer(images), base.infer(images)),
                "explainer file": lambda: explainer.run({"images": images, "target": target}),
            }
            samples = paired(both, rounds)
        runners = {layer: OrtRunner(folder / f"gradients-{layer}.onnx") for layer in TO}
        feeds = {"images": images, "cotangent": cotangent}
        graphs = {layer: GradientGraph(network(0).module, [layer], PREPROCESSING) for layer in ("layer4", "layer3")}
        whole = network(0).module
        pixels = images.clone().requires_grad_()
        cases: dict[str, Callable[[], object]] = {"one pass": lambda: student.infer(images)}
        for layer, runner in runners.items():
            cases[f"gradients to {layer}"] = lambda runner=runner: runner.run(feeds)  # type: ignore[misc]
        for layer, graph in graphs.items():
            cases[f"eager gradients to {layer}"] = lambda graph=graph: graph(images, cotangent)  # type: ignore[misc]
        cases["eager, a full backward pass"] = lambda: torch.autograd.grad(whole(pixels), pixels, cotangent)
        return samples | paired(cases, rounds)


def ratios(samples: dict[str, list[float]]) -> dict[str, list[float]]:
    """Quartiles of what each case costs over its bare passes, pair by pair."""
    found = {"explainer file": ratio(samples, "explainer file", "two passes")}
    return found | {name: ratio(samples, name, "one pass") for name in samples if "gradients" in name or "backward" in name}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # the child's: export there
    options = parser.parse_args()
    if options.folder is not None:
        print(json.dumps(export(options.folder)))
        return
    module = "benchmarks.exported"
    with tempfile.TemporaryDirectory() as name:
        exported = child(module, "--folder", name)
        sizes = {path.stem: path.stat().st_size for path in sorted(Path(name).glob("*.onnx"))}
        samples = measure(Path(name), options.rounds)
    found = {"case": f"ResNet-50, {SIDE} x {SIDE}, batch {BATCH}", "export": exported, "bytes": sizes, "samples": samples}
    record = store("exported", module, {**found, "ratios": ratios(samples)})
    for case, (low, middle, high) in record["ratios"].items():
        print(f"{case:32} {middle:.3f} of the bare passes ({low:.3f} to {high:.3f})")
    print({key: round(value, 1) for key, value in exported["seconds"].items()}, f"peak {exported['peak_bytes'] / 1e9:.2f} GB")


if __name__ == "__main__":
    main()

"""What gradients cost: a gradients file in ONNX Runtime against one pass of a features file, and against PyTorch's hooks.

Gradients of a class's logit at the last block's output, at its input, and at the last stage's input, as Grad-CAM and HiResCAM take them.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.explain import MEAN, STD, forward_work
from benchmarks.subject import Run, Subject, Way, demand_agreement
from kdx import models
from kdx.explain.graph import explainer_graph
from kdx.export import onnx_file
from kdx.export.description import Origin
from kdx.export.graphs import FeatureGraph, GradientGraph, Graph, Preprocessing
from kdx.models.network import Network
from kdx.runtimes.onnx_runtime import OnnxRuntimeRunner

WITHIN = 1e-2
"""Mean difference of gradients from PyTorch's, as a share of their mean magnitude: where an activation is all but zero, rounding decides
whether its gradient is."""


def load(network: str, side: int, seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return Network(network, models.load(network).module, Preprocessing((side, side), MEAN, STD))


def prepare(folder: Path, *, network: str, layers: tuple[str, ...], batch: int, side: int) -> None:
    loaded = load(network, side)
    graphs: dict[str, Graph] = {layer: GradientGraph(loaded.module, [layer], loaded.preprocessing) for layer in layers}
    graphs["features"] = FeatureGraph(loaded.module, [layers[0]], loaded.preprocessing)
    for name, graph in graphs.items():
        onnx_file.write(graph, folder / f"{name}.onnx", origin=Origin(network, "random"), image_size=(side, side))


def subject(folder: Path, *, network: str, layers: tuple[str, ...], batch: int, side: int) -> Subject:
    images = torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    picked = torch.arange(batch)

    def one_pass(held: ExitStack) -> Run:
        runner = held.enter_context(OnnxRuntimeRunner(folder / "features.onnx"))
        return lambda: runner.infer(images)

    def file(layer: str) -> Way:
        def opened(held: ExitStack) -> Run:
            runner = held.enter_context(OnnxRuntimeRunner(folder / f"{layer}.onnx"))
            classes = runner.outputs["logits"][1]
            assert isinstance(classes, int)
            cotangent = torch.nn.functional.one_hot(picked, classes).float()
            return lambda: runner.run({"images": images, "cotangent": cotangent})[f"gradient/{layer}"]

        return opened

    def hooks(layer: str) -> Way:
        def opened(_: ExitStack) -> Run:
            module = load(network, side).module

            def run() -> Tensor:
                kept: list[Tensor] = []
                handle = module.get_submodule(layer).register_forward_hook(lambda _module, _inputs, output: kept.append(output))
                try:
                    logits = module((images - mean) / std)
                finally:
                    handle.remove()
                kept[0].retain_grad()
                module.zero_grad()
                logits[picked, picked].sum().backward()
                assert kept[0].grad is not None
                return kept[0].grad

            return run

        return opened

    ways: dict[str, Way] = {"one pass": one_pass}
    for name, way in (("file", file), ("hooks", hooks)):
        ways |= {f"{name}, {layer}": way(layer) for layer in layers}

    def alike(results: Mapping[str, Any]) -> dict[str, float]:
        figures = {}
        for layer in layers:
            known = results[f"hooks, {layer}"]
            figures[f"gradients at {layer}"] = float((results[f"file, {layer}"] - known).abs().mean() / known.abs().mean())
        demand_agreement(figures, WITHIN)
        return figures

    return Subject(ways, alike, lambda: forward_work(load(network, side).module, batch, side))


def export(folder: Path, *, network: str, layer: str, side: int) -> Subject:
    """How long each kind of file takes to export and to check, and how large it is."""
    student, base = load(network, side), load(network, side, 1)

    def written(kind: str, make: Any, origin: Any) -> Way:
        def opened(_: ExitStack) -> Run:
            def run() -> int:
                path = folder / f"{kind}.onnx"
                onnx_file.write(make(), path, origin=origin, image_size=(side, side))
                return path.stat().st_size

            return run

        return opened

    one = Origin(network, "random")
    return Subject(
        {
            "features": written("features", lambda: FeatureGraph(student.module, [layer], student.preprocessing), one),
            "gradients": written("gradients", lambda: GradientGraph(student.module, [layer], student.preprocessing), one),
            "explainer": written(
                "explainer", lambda: explainer_graph({"student": student, "base": base}, {layer: layer}), {"student": one, "base": one}
            ),
        },
        lambda results: {f"{kind}, bytes": size for kind, size in results.items()},
    )

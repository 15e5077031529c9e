"""The cost of gradients: a gradients file in ONNX Runtime, compared with one pass of a features file and with PyTorch's hooks.

The gradients are those of a class's logit at the last block's output, at its input, and at the last stage's input, as Grad-CAM and
HiResCAM take them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.comparison import Comparison, Run, Variant, require_agreement
from benchmarks.explain import MEAN, STD, forward_work
from kdx import models
from kdx.explain.graph import explainer_graph
from kdx.export import onnx_file
from kdx.export.description import Origin
from kdx.export.explainer_graphs import Graph
from kdx.export.graphs import FeatureGraph, GradientGraph, Preprocessing
from kdx.models.network import Network
from kdx.runtimes.onnx_runtime import OnnxRuntimeRunner

TOLERANCE = 1e-2
"""Mean difference from PyTorch's gradients, divided by their mean magnitude. At an activation near zero, rounding decides whether it
has a gradient."""


def load(network: str, side: int, seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return Network(network, models.load(network).module, Preprocessing((side, side), MEAN, STD))


def prepare(folder: Path, *, network: str, layers: tuple[str, ...], batch: int, side: int) -> None:
    """Write a features file, and a gradients file for each layer."""
    loaded = load(network, side)
    graphs: dict[str, Graph] = {layer: GradientGraph(loaded.module, [layer], loaded.preprocessing) for layer in layers}
    graphs["features"] = FeatureGraph(loaded.module, [layers[0]], loaded.preprocessing)
    for name, graph in graphs.items():
        onnx_file.write(graph, folder / f"{name}.onnx", origin=Origin(network, "random"), image_size=(side, side))


def comparison(folder: Path, *, network: str, layers: tuple[str, ...], batch: int, side: int) -> Comparison:
    images = torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(0))
    classes = torch.arange(batch)

    def one_pass(resources: ExitStack) -> Run:
        runner = resources.enter_context(OnnxRuntimeRunner(folder / "features.onnx"))
        return lambda: runner.infer(images)

    variants: dict[str, Variant] = {"one pass": one_pass}
    variants |= {f"file, {layer}": _gradients_file(folder / f"{layer}.onnx", layer, images, classes) for layer in layers}
    variants |= {f"hooks, {layer}": _hooks(lambda: load(network, side), layer, images, classes) for layer in layers}

    def check(results: Mapping[str, Any]) -> dict[str, float]:
        figures = {}
        for layer in layers:
            expected = results[f"hooks, {layer}"]
            figures[f"gradients at {layer}"] = float((results[f"file, {layer}"] - expected).abs().mean() / expected.abs().mean())
        require_agreement(figures, TOLERANCE)
        return figures

    return Comparison(variants, check, lambda: forward_work(load(network, side).module, batch, side))


def _gradients_file(path: Path, layer: str, images: Tensor, classes: Tensor) -> Variant:
    """The gradients of the class's logits from a gradients file in ONNX Runtime."""

    def opened(resources: ExitStack) -> Run:
        runner = resources.enter_context(OnnxRuntimeRunner(path))
        count = runner.outputs["logits"][1]
        assert isinstance(count, int)
        cotangent = torch.nn.functional.one_hot(classes, count).float()
        return lambda: runner.run({"images": images, "cotangent": cotangent})[f"gradient/{layer}"]

    return opened


def _hooks(make: Callable[[], Network], layer: str, images: Tensor, classes: Tensor) -> Variant:
    """The same gradients by a hook and a backward pass in PyTorch."""

    def opened(_: ExitStack) -> Run:
        module = make().module
        mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))

        def run() -> Tensor:
            features: list[Tensor] = []
            handle = module.get_submodule(layer).register_forward_hook(lambda _module, _inputs, output: features.append(output))
            try:
                logits = module((images - mean) / std)
            finally:
                handle.remove()
            features[0].retain_grad()
            module.zero_grad()
            logits[classes, classes].sum().backward()
            assert features[0].grad is not None
            return features[0].grad

        return run

    return opened


def export(folder: Path, *, network: str, layer: str, side: int) -> Comparison:
    """The time to export and check each kind of file, and the size of the file."""
    student, base = load(network, side), load(network, side, 1)

    def written(kind: str, make: Callable[[], Any], origin: Any) -> Variant:
        def opened(_: ExitStack) -> Run:
            def run() -> int:
                path = folder / f"{kind}.onnx"
                onnx_file.write(make(), path, origin=origin, image_size=(side, side))
                return path.stat().st_size

            return run

        return opened

    origin = Origin(network, "random")
    pair = {"student": student, "base": base}
    return Comparison(
        {
            "features": written("features", lambda: FeatureGraph(student.module, [layer], student.preprocessing), origin),
            "gradients": written("gradients", lambda: GradientGraph(student.module, [layer], student.preprocessing), origin),
            "explainer": written("explainer", lambda: explainer_graph(pair, {layer: layer}), dict.fromkeys(pair, origin)),
        },
        lambda results: {f"{kind}, bytes": size for kind, size in results.items()},
    )

"""A batch explained end to end, two maps and their scores, by kdx on each runtime and by the baselines.

The two networks, student and base, have one architecture and random weights of two seeds; weights do not change the timing. Each variant
takes images in [0, 1] and returns both maps in [0, 1] at the images' size, FSS(S,B), RS(S|B) and RS(B|S). kdx also computes 999
permutations, intervals, and RS of each network. ``bare passes`` are the two forward passes of kdx's ONNX files alone.
``fair, channels-last`` is the fair variant with networks and images in that layout, which PyTorch's convolutions prefer on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import eager
from benchmarks.comparison import Comparison, Run, Unavailable, Variant, Work, gram_work, require_agreement, require_difference_tensors
from kdx import models
from kdx.choices import Precision
from kdx.errors import first_line
from kdx.explain.layer import measure
from kdx.export import engine, onnx_file
from kdx.export.description import Origin
from kdx.export.graphs import FeatureGraph, Preprocessing
from kdx.features.target import Target
from kdx.maps.scaling import scaled
from kdx.runtimes.onnx_runtime import OnnxRuntimeRunner
from kdx.runtimes.runner import Runner
from kdx.runtimes.tensorrt import TensorRtRunner
from kdx.scores import uncertainty
from kdx.scores.pool import pooled_scores

CLASSES = 4
ROLE_NAMES = ("student", "base")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TOLERANCE, TOLERANCE_BFLOAT16 = 1e-3, 5e-2
"""Largest difference from the first variant: the mean absolute difference of maps, whose values lie in [0, 1], and that of scores."""


def prepare(folder: Path, *, network: str, layer: str, batch: int, side: int, **_: Any) -> None:
    """Write the weights and the ONNX files of both networks."""
    for seed, role in enumerate(ROLE_NAMES):
        torch.manual_seed(seed)
        module = models.load(network).module
        save_file(module.state_dict(), folder / f"{role}.safetensors")
        graph = FeatureGraph(module, [layer], Preprocessing((side, side), MEAN, STD))
        onnx_file.write(graph, folder / f"{role}.onnx", origin=Origin(network, "random"), image_size=(side, side))


def comparison(folder: Path, *, network: str, layer: str, batch: int, side: int, without: Sequence[str] = ()) -> Comparison:
    """without: variants to leave out."""
    inputs = _Inputs(folder, network, layer, batch, side)
    variants = _pytorch_variants(inputs) | _kdx_variants(inputs)
    chosen = {name: variant for name, variant in variants.items() if name not in without}
    return Comparison(chosen, _check, lambda: work(network, layer, batch, side))


@dataclass(frozen=True)
class _Inputs:
    """The prepared networks and one batch of images."""

    folder: Path
    network: str
    layer: str
    batch: int
    side: int

    @cached_property
    def images(self) -> Tensor:
        """[n, 3, side, side] in [0, 1]."""
        return torch.rand(self.batch, 3, self.side, self.side, generator=torch.Generator().manual_seed(0))

    @property
    def labels(self) -> Tensor:
        return torch.arange(self.batch) % CLASSES

    def modules(self) -> list[nn.Module]:
        return [models.load(f"{self.network}@{self.folder / role}.safetensors").module for role in ROLE_NAMES]


def _pytorch_variants(inputs: _Inputs) -> dict[str, Variant]:
    """The variants that run PyTorch modules: those of `benchmarks.eager`."""
    images, layer = inputs.images, inputs.layer
    one_hot = torch.nn.functional.one_hot(inputs.labels).float()
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))

    def published(_: ExitStack) -> Run:
        student, base = inputs.modules()
        activations = 2 * inputs.batch * _activation_bytes(student, inputs.side)
        require_difference_tensors(inputs.batch, _width(student, layer, inputs.side), activations=activations)
        return lambda: eager.published(student, base, layer, (images - mean) / std, one_hot)

    def fair(_: ExitStack) -> Run:
        student, base = inputs.modules()
        return lambda: eager.fair(student, base, layer, (images - mean) / std, one_hot)

    def channels_last(_: ExitStack) -> Run:
        layout = torch.channels_last
        student, base = (module.to(memory_format=layout) for module in inputs.modules())  # type: ignore[call-overload]
        try:
            with torch.no_grad():
                student(images[:1].to(memory_format=layout))
        except RuntimeError as error:
            raise Unavailable(f"The network does not run in channels-last: {first_line(error)}.") from error
        return lambda: eager.fair(student, base, layer, ((images - mean) / std).to(memory_format=layout), one_hot)

    def compiled(_: ExitStack) -> Run:
        student, base = inputs.modules()
        run = eager.compiled(student, base, layer)
        return lambda: run((images - mean) / std, one_hot)

    return {"published": published, "fair": fair, "fair, channels-last": channels_last, "compiled": compiled}


def _kdx_variants(inputs: _Inputs) -> dict[str, Variant]:
    """The variants that run the exported files: kdx on each runtime, and the passes of ONNX Runtime alone."""
    images, folder = inputs.images, inputs.folder

    def kdx(make: Callable[[Path], Runner]) -> Variant:
        def opened(resources: ExitStack) -> Run:
            runners = {role: resources.enter_context(make(folder / f"{role}.onnx")) for role in ROLE_NAMES}
            permutations = uncertainty.permutation_table(inputs.batch, 999, 0)

            def run() -> eager.EagerResult:
                features = {role: runner.infer(images).features[inputs.layer] for role, runner in runners.items()}
                return _explained(features, inputs.labels, permutations, inputs.side)

            return run

        return opened

    def bare_passes(resources: ExitStack) -> Run:
        runners = [resources.enter_context(OnnxRuntimeRunner(folder / f"{role}.onnx")) for role in ROLE_NAMES]
        return lambda: [runner.infer(images) for runner in runners]

    def openvino(precision: Precision) -> Variant:
        def make(path: Path) -> Runner:
            from kdx.runtimes.openvino import OpenVinoRunner

            return OpenVinoRunner(path, precision=precision)

        return kdx(make)

    def tensorrt(path: Path) -> Runner:
        engine_path = path.with_suffix(".engine")
        engine.build(path, engine_path, batch=(inputs.batch, inputs.batch, inputs.batch))
        return TensorRtRunner(engine_path)

    return {
        "bare passes": bare_passes,
        "kdx": kdx(OnnxRuntimeRunner),
        "kdx, OpenVINO": openvino("float32"),
        "kdx, OpenVINO bf16": openvino("bfloat16"),
        "kdx, ONNX Runtime CUDA": kdx(lambda path: OnnxRuntimeRunner(path, "cuda")),
        "kdx, TensorRT": kdx(tensorrt),
    }


def _explained(features: Mapping[str, Tensor], labels: Tensor, permutations: Tensor, side: int) -> eager.EagerResult:
    """kdx's maps and scores of features on any device."""
    device = features["base"].device
    measurement = measure(features, Target.of(labels.to(device)), permutations=permutations.to(device))
    products = measurement.products
    scores = pooled_scores(products, measurement.permuted, measurement.moments, n=len(labels), roles=ROLE_NAMES).scores
    return eager.EagerResult(
        scaled(measurement.maps["distilled"].maps, (side, side)).cpu(),
        scaled(measurement.maps["residual"].maps, (side, side)).cpu(),
        float(products[0, 1] / (products[0, 0] * products[1, 1]).sqrt()),
        scores["RS(S|B)"].value,
        scores["RS(B|S)"].value,
    )


def _check(results: Mapping[str, Any]) -> dict[str, float]:
    """The mean absolute difference of each variant's maps, and the difference of its scores, from those of the first variant."""
    explanations = {name: result for name, result in results.items() if isinstance(result, eager.EagerResult)}
    (_, expected), *others = explanations.items()
    figures: dict[str, float] = {}
    for name, actual in others:
        differences = {
            f"{which} map of {name}": float((getattr(actual, which) - getattr(expected, which)).abs().mean())
            for which in ("distilled", "residual")
        }
        differences |= {
            f"{score} of {name}": abs(getattr(actual, score) - getattr(expected, score)) for score in ("fss", "rs_distilled", "rs_residual")
        }
        require_agreement(differences, TOLERANCE_BFLOAT16 if "bf16" in name else TOLERANCE)
        figures |= differences
    return figures


def _width(module: nn.Module, layer: str, side: int) -> int:
    """The number of values in one image's feature."""
    with torch.no_grad():
        feature: Tensor = FeatureGraph(module, [layer], Preprocessing())(torch.zeros(1, 3, side, side))[1]
        return feature.numel()


def _activation_bytes(module: nn.Module, side: int) -> int:
    """Bytes of the outputs of every module for one image, which a backward pass needs."""
    sizes: list[int] = []
    handles = [
        leaf.register_forward_hook(lambda _module, _inputs, output: sizes.append(output.nbytes if isinstance(output, Tensor) else 0))
        for leaf in module.modules()
        if not list(leaf.children())
    ]
    with torch.no_grad():
        module(torch.zeros(1, 3, side, side))
    for handle in handles:
        handle.remove()
    return sum(sizes)


def work(network: str, layer: str, batch: int, side: int) -> Work:
    """Two forward passes and two Gram products. Images and weights are read once; features are written and read once."""
    module = models.load(network).module
    one_pass, products = forward_work(module, batch, side), gram_work(batch, _width(module, layer, side))
    return Work(2 * one_pass.operations + products.operations, 2 * (one_pass.bytes + products.bytes) - _image_bytes(batch, side))


def forward_work(module: nn.Module, batch: int, side: int) -> Work:
    """One forward pass. Images and weights are read once."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(torch.zeros(1, 3, side, side))
    weights = sum(parameter.numel() for parameter in module.parameters())
    return Work(batch * counter.get_total_flops(), 4 * weights + _image_bytes(batch, side))


def _image_bytes(batch: int, side: int) -> int:
    return 4 * batch * 3 * side**2

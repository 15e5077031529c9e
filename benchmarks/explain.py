"""A batch explained end to end, two maps and their scores, by kdx on each runtime and by what kdx is timed against.

Two networks of one architecture, student and base, with weights of two seeds: random ones, which change no timing. Each way takes
images in [0, 1] and gives both maps in [0, 1] in the images' size, FSS(S,B), RS(S|B) and RS(B|S); kdx adds 999 permutations,
intervals, and RS of each network. ``bare passes`` are the two forward passes of kdx's ONNX files with nothing besides;
``fair, channels-last`` is the fair path with networks and images in that layout, which PyTorch's convolutions prefer on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import eager
from benchmarks.subject import Run, Subject, Unavailable, Way, Work, demand_agreement, demand_differences
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
ROLES = ("student", "base")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WITHIN, WITHIN_BFLOAT16 = 1e-3, 5e-2
"""Mean absolute difference of maps, whose values are from 0 to 1, and difference of scores, that are allowed between any way and
the first."""


def prepare(folder: Path, *, network: str, layer: str, batch: int, side: int, **_: Any) -> None:
    """Write both networks' weights and ONNX files."""
    for seed, role in enumerate(ROLES):
        torch.manual_seed(seed)
        module = models.load(network).module
        save_file(module.state_dict(), folder / f"{role}.safetensors")
        graph = FeatureGraph(module, [layer], Preprocessing((side, side), MEAN, STD))
        onnx_file.write(graph, folder / f"{role}.onnx", origin=Origin(network, "random"), image_size=(side, side))


def subject(folder: Path, *, network: str, layer: str, batch: int, side: int, without: Sequence[str] = ()) -> Subject:
    """without: ways that are left out."""
    images = torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(batch) % CLASSES
    permutations = uncertainty.permutation_table(batch, 999, 0)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    one_hot = torch.nn.functional.one_hot(labels).float()

    def loaded() -> list[nn.Module]:
        return [models.load(f"{network}@{folder / role}.safetensors").module for role in ROLES]

    def published(_: ExitStack) -> Run:
        student, base = loaded()
        demand_differences(batch, _width(student, layer, side), kept=2 * batch * _kept(student, side))
        return lambda: eager.published(student, base, layer, (images - mean) / std, one_hot)

    def fair(_: ExitStack) -> Run:
        student, base = loaded()
        return lambda: eager.fair(student, base, layer, (images - mean) / std, one_hot)

    def channels_last(_: ExitStack) -> Run:
        layout = torch.channels_last
        student, base = (network.to(memory_format=layout) for network in loaded())  # type: ignore[call-overload]
        try:
            with torch.no_grad():
                student(images[:1].to(memory_format=layout))
        except RuntimeError as error:
            raise Unavailable(f"The network does not run in channels-last: {first_line(error)}.") from error
        return lambda: eager.fair(student, base, layer, ((images - mean) / std).to(memory_format=layout), one_hot)

    def compiled(_: ExitStack) -> Run:
        student, base = loaded()
        whole = eager.compiled(student, base, layer)
        return lambda: whole((images - mean) / std, one_hot)

    def kdx(make: Callable[[Path], Runner]) -> Way:
        def opened(held: ExitStack) -> Run:
            runners = {role: held.enter_context(make(folder / f"{role}.onnx")) for role in ROLES}
            return lambda: explained({role: each.infer(images).features[layer] for role, each in runners.items()})

        return opened

    def explained(features: Mapping[str, Tensor]) -> eager.Found:
        device = features["base"].device
        found = measure(features, Target.of(labels.to(device)), permutations=permutations.to(device))
        said = pooled_scores(found.products, found.permuted, found.left_out, n=batch, roles=ROLES).scores
        of = found.products
        return eager.Found(
            scaled(found.maps["distilled"].maps, (side, side)).cpu(),
            scaled(found.maps["residual"].maps, (side, side)).cpu(),
            float(of[0, 1] / (of[0, 0] * of[1, 1]).sqrt()),
            said["RS(S|B)"].value,
            said["RS(B|S)"].value,
        )

    def bare(held: ExitStack) -> Run:
        runners = [held.enter_context(OnnxRuntimeRunner(folder / f"{role}.onnx")) for role in ROLES]
        return lambda: [runner.infer(images) for runner in runners]

    def openvino(precision: Precision) -> Way:
        def make(path: Path) -> Runner:
            from kdx.runtimes.openvino import OpenVinoRunner

            return OpenVinoRunner(path, precision=precision)

        return kdx(make)

    def tensorrt(path: Path) -> Runner:
        built = path.with_suffix(".engine")
        engine.build(path, built, batch=(batch, batch, batch))
        return TensorRtRunner(built)

    every: dict[str, Way] = {
        "published": published,
        "fair": fair,
        "fair, channels-last": channels_last,
        "compiled": compiled,
        "bare passes": bare,
        "kdx": kdx(OnnxRuntimeRunner),
        "kdx, OpenVINO": openvino("float32"),
        "kdx, OpenVINO bf16": openvino("bfloat16"),
        "kdx, ONNX Runtime CUDA": kdx(lambda path: OnnxRuntimeRunner(path, "cuda")),
        "kdx, ONNX Runtime TensorRT": kdx(lambda path: OnnxRuntimeRunner(path, "tensorrt")),
        "kdx, TensorRT": kdx(tensorrt),
    }
    return Subject({name: way for name, way in every.items() if name not in without}, _alike, lambda: work(network, layer, batch, side))


def _alike(results: Mapping[str, Any]) -> dict[str, float]:
    """Mean absolute difference of each way's maps, and the difference of its scores, from the first way's."""
    explained = {name: found for name, found in results.items() if isinstance(found, eager.Found)}
    (_, known), *others = explained.items()
    figures: dict[str, float] = {}
    for name, found in others:
        differences = {
            f"{each} map of {name}": float((getattr(found, each) - getattr(known, each)).abs().mean()) for each in ("distilled", "residual")
        }
        differences |= {
            f"{each} of {name}": abs(getattr(found, each) - getattr(known, each)) for each in ("fss", "rs_distilled", "rs_residual")
        }
        demand_agreement(differences, WITHIN_BFLOAT16 if "bf16" in name else WITHIN)
        figures |= differences
    return figures


def _width(module: nn.Module, layer: str, side: int) -> int:
    with torch.no_grad():
        feature: Tensor = FeatureGraph(module, [layer], Preprocessing())(torch.zeros(1, 3, side, side))[1]
        return feature.numel()


def _kept(module: nn.Module, side: int) -> int:
    """Bytes of the outputs of every module of one image, which a backward pass needs."""
    found: list[int] = []
    handles = [
        each.register_forward_hook(lambda _module, _inputs, output: found.append(output.nbytes if isinstance(output, Tensor) else 0))
        for each in module.modules()
        if not list(each.children())
    ]
    with torch.no_grad():
        module(torch.zeros(1, 3, side, side))
    for handle in handles:
        handle.remove()
    return sum(found)


def work(network: str, layer: str, batch: int, side: int) -> Work:
    """Two forward passes and two Gram products; images, weights, and features written and read once."""
    module = models.load(network).module
    once, d = forward_work(module, batch, side), _width(module, layer, side)
    # A product of X by its own transpose is symmetric: half of it is enough.
    return Work(2 * (once.operations + batch**2 * d), 2 * (once.bytes + 4 * 2 * batch * d) - _image_bytes(batch, side))


def forward_work(module: nn.Module, batch: int, side: int) -> Work:
    """One forward pass; images and weights read once."""
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        module(torch.zeros(1, 3, side, side))
    weights = sum(parameter.numel() for parameter in module.parameters())
    return Work(batch * counted.get_total_flops(), 4 * weights + _image_bytes(batch, side))


def _image_bytes(batch: int, side: int) -> int:
    return 4 * batch * 3 * side**2

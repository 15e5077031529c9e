"""Modules as users have them: wrapped, compiled, unusual, or refused with a reason."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Self, cast

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import kdx
from kdx import models
from kdx.choices import RuntimeName
from kdx.errors import KdxError
from kdx.export.graphs import FeatureGraph
from kdx.models.prepared import prepared

pytestmark = pytest.mark.usefixtures("no_gpu")

IMAGES = torch.rand(5, 3, 14, 11, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(6, 8, 3, 2), nn.ReLU())
        self.fc = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.block(self.stem(images)).mean((2, 3)))
        return logits


class ReturnsNothing(Net):
    """The usual train() that keeps batch norms frozen, without a return."""

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)
        self.stem[1].eval()


class Guarded(Net):
    def train(self, mode: bool = True) -> Guarded:
        raise RuntimeError("do not change the mode")


class GuardedEval(Net):
    def eval(self) -> GuardedEval:
        raise RuntimeError("frozen")


class Squeezing(Net):
    def forward(self, images: Tensor) -> Tensor:
        pooled = nn.functional.adaptive_avg_pool2d(self.block(self.stem(images)), 1).squeeze()
        logits: Tensor = self.fc(pooled[:, :8])  # fails for a single image
        return logits


def compiled() -> nn.Module:
    network = cast("object", torch.compile(Net(), backend="eager"))
    assert isinstance(network, nn.Module)
    return network


def compiled_and_run() -> nn.Module:
    network = compiled()
    with torch.no_grad():
        network.eval()(IMAGES)
    return network


def compiled_in_place() -> nn.Module:
    network = Net().eval()
    network.compile(backend="eager")
    with torch.no_grad():
        network(IMAGES)
    return network


WORKING: list[Callable[[], nn.Module]] = [
    lambda: nn.DataParallel(Net()),
    lambda: nn.DataParallel(compiled()),
    lambda: AveragedModel(Net()),
    compiled_and_run,
    compiled_in_place,
    ReturnsNothing,
    Guarded,
    GuardedEval,
    Squeezing,
]


@pytest.mark.parametrize("make", WORKING)
def test_every_entry_takes_the_module(make: Callable[[], nn.Module]) -> None:
    network = make()
    plain = kdx.grad_cam(Net(), IMAGES, "block", 2)
    torch.testing.assert_close(kdx.grad_cam(network, IMAGES, "block", 2).maps, plain.maps)
    torch.testing.assert_close(kdx.grad_cam(network, IMAGES[:1], "block", 2).maps, plain.maps[:1])
    assert models.layers(network, (14, 11)) == models.layers(Net(), (14, 11))


def test_layers_may_have_the_names_that_the_wrapper_shows() -> None:
    network = nn.DataParallel(Net())
    named = kdx.grad_cam(network, IMAGES, "module.block", 2)
    torch.testing.assert_close(named.maps, kdx.grad_cam(network, IMAGES, "block", 2).maps)


@pytest.mark.parametrize("make", [Net, ReturnsNothing, lambda: nn.DataParallel(Net())])
def test_the_users_module_stays_as_it_was(make: Callable[[], nn.Module]) -> None:
    network = make()
    network.train()
    for parameter in list(network.parameters())[:2]:
        parameter.requires_grad_(False)
    calls: list[int] = []
    next(module for module in network.modules() if isinstance(module, nn.ReLU)).register_forward_hook(lambda *_: calls.append(1))

    def state() -> tuple[list[object], ...]:
        return (
            [module.training for module in network.modules()],
            [parameter.requires_grad for parameter in network.parameters()],
            [(name, tensor.clone().tolist(), tensor.data_ptr()) for name, tensor in network.state_dict().items()],
            [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules()],
        )

    before = state()
    kdx.grad_cam(network, IMAGES, "block", 2)
    models.layers(network, (14, 11))
    assert state() == before and calls  # the user's hook runs in the copy


class LazyHead(Net):
    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.fc = nn.LazyLinear(4)


def with_scripted_stem() -> nn.Module:
    network = Net()
    network.add_module("stem", torch.jit.script(network.stem))
    return network


def quantised() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(Net().eval(), {nn.Linear})  # type: ignore[no-any-return]


class Coloured(Net):
    """A network that embeds the indices of colours, as ImageGPT does, with transformers' name of its first input."""

    main_input_name = "input_ids"

    def __init__(self) -> None:
        super().__init__()
        self.colours = nn.Embedding(512, 3)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(self.colours(images).movedim(-1, 1))


class Patched(Net):
    """A network of patches with the size of their grid, as Siglip2, with transformers' name of that size."""

    def forward(self, pixel_values: Tensor, spatial_shapes: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(pixel_values.unflatten(1, tuple(spatial_shapes[0].tolist())).movedim(-1, 1))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.jit.script(Net()), "The network .* is scripted or traced"),
        (lambda: torch.jit.trace(Net().eval(), IMAGES), "The network .* is scripted or traced"),
        (with_scripted_stem, "The module 'stem' .* is scripted or traced"),
        (LazyHead, r"The module 'fc' \(LazyLinear\) has parameters that are not initialised"),
        (quantised, "The module 'fc' .* is quantised"),
        (Coloured, r"The network \(Coloured\) takes integers, .* and no image"),
        (Patched, r"The network \(Patched\) takes patches of images .* and no image"),
        (lambda: Net().to("meta"), r"The module 'stem.0' \(Conv2d\) has parameters without data"),
    ],
    ids=["scripted", "traced", "scripted part", "lazy", "quantised", "integers", "patches", "meta"],
)
def test_modules_that_cannot_be_explained_are_refused_by_name(make: Callable[[], nn.Module], message: str) -> None:
    network = make()
    for use in (lambda: kdx.grad_cam(network, IMAGES, "block", 2), lambda: models.as_network(network), lambda: models.layers(network)):
        with pytest.raises(KdxError, match=message):
            use()


def test_a_nested_data_parallel_module_runs_in_this_thread() -> None:
    class Outer(Net):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.DataParallel(self.block)  # type: ignore[assignment]

    duplicate = prepared(Outer())
    _, feature = FeatureGraph(duplicate, ["block.module.0"])(IMAGES)
    plain = Net().eval()
    torch.testing.assert_close(feature, plain.block[0](plain.stem(IMAGES)))


def test_dropout_that_stays_on_is_refused_by_every_entry() -> None:
    class AlwaysDropping(Net):
        def train(self, mode: bool = True) -> Self:
            super().train(mode)
            self.extra.train(True)
            return self

        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Dropout(0.3)
            self.block.append(self.extra)

    network = AlwaysDropping()
    with pytest.raises(KdxError, match=r"'block.2' \(Dropout\)"):
        kdx.grad_cam(network, IMAGES, "block", 2)
    runtimes: list[RuntimeName] = ["eager", "onnx"]
    for runtime in runtimes:
        explainer = kdx.Explainer(student=network, base=Net(), layers=["block"], runtime=runtime)
        with explainer, pytest.raises(KdxError, match=r"'block.2' \(Dropout\)"):
            explainer.explain(IMAGES, torch.tensor([0, 1, 0, 1, 2]))


def test_a_copy_and_a_loaded_network_are_of_use_outside_of_inference_mode() -> None:
    network = Net()
    with torch.inference_mode():
        modules = [prepared(network), models.load("kdx:resnet,width=4,depth=1,classes=3").module]
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    assert tensors and not any(tensor.is_inference() for tensor in tensors)

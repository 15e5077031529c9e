"""A network whose output for an image depends on chance or on other images is refused, and every other network is not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kdx.errors import KdxError
from kdx.export.dependence import check_dependence, share_record
from kdx.export.graphs import FeatureGraph, GradientGraph, Preprocessing
from kdx.models.resnet import resnet

SIZE = (12, 10)


class Net(nn.Module):
    """Two convolutions with something between them, and a head."""

    def __init__(self, middle: nn.Module, zero_head: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Conv2d(3, 6, 3)
        self.middle = middle
        self.second = nn.Sequential(nn.Conv2d(6, 8, 3), nn.ReLU())
        self.fc = nn.Linear(8, 4)
        if zero_head:
            nn.init.zeros_(self.fc.weight)
        self.images = 0

    def forward(self, images: Tensor) -> Tensor:
        self.images += len(images)
        logits: Tensor = self.fc(self.second(self.middle(self.first(images))).mean((2, 3)))
        return logits


class Jitter(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        return features * (1 + 0.02 * torch.randn(features.shape[0], 1, 1, 1))


class SeededDropout(nn.Module):
    """The same random numbers in every pass, in the shape of the batch."""

    def forward(self, features: Tensor) -> Tensor:
        mask = torch.rand(features.shape, generator=torch.Generator().manual_seed(0)) > 0.5
        return features * mask


class BatchCentred(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        return features - features.mean((0, 2, 3), keepdim=True)


class FunctionalDropout(Net):
    def forward(self, images: Tensor) -> Tensor:
        features = nn.functional.dropout(self.first(images), 0.1, training=True)
        logits: Tensor = self.fc(self.second(features).mean((2, 3)))
        return logits


def monte_carlo() -> nn.Module:
    """Dropout that a user switched on again after eval()."""
    network = Net(nn.Sequential(nn.Identity(), nn.Dropout(0.2))).eval()
    network.middle[1].train()  # type: ignore[index]
    return network


@pytest.mark.parametrize(
    ("network", "kind", "module"),
    [
        (Net(Jitter()), "from pass to pass", "'middle' (Jitter)"),
        (Net(nn.Sequential(nn.ReLU(), Jitter())), "from pass to pass", "'middle.1' (Jitter)"),
        (monte_carlo(), "from pass to pass", "'middle.1' (Dropout)"),
        (FunctionalDropout(nn.Identity()), "from pass to pass", "FunctionalDropout.forward"),
        (Net(SeededDropout()), "other images", "'middle' (SeededDropout)"),
        (Net(nn.BatchNorm2d(6, track_running_stats=False)), "other images", "'middle' (BatchNorm2d)"),
        (Net(nn.Sequential(nn.Conv2d(6, 6, 1), BatchCentred())), "other images", "'middle.1' (BatchCentred)"),
        (Net(Jitter(), zero_head=True), "from pass to pass", "'middle' (Jitter)"),
    ],
    ids=["noise", "nested", "dropout", "functional", "seeded", "batch norm", "centred", "zero head"],
)
def test_the_error_names_the_module(network: nn.Module, kind: str, module: str) -> None:
    if not isinstance(network, Net) or not any(isinstance(inner, nn.Dropout) for inner in network.modules()):
        network.eval()
    with pytest.raises(KdxError) as caught:
        check_dependence(FeatureGraph(network, ["second"]), SIZE)
    assert kind in caught.value.problem and module in caught.value.problem


class Chaotic(nn.Module):
    """An error of one rounding, which depends on the batch size as that of a convolution may, and which 30 steps double each."""

    def forward(self, features: Tensor) -> Tensor:
        values = features.sigmoid() * (1 + torch.finfo(features.dtype).eps * len(features))
        for _ in range(30):
            values = 3.9 * values * (1 - values)
        return values


def test_the_chaotic_module_turns_rounding_into_a_large_difference() -> None:
    features = torch.rand(4, 6, 5, 5, generator=torch.Generator().manual_seed(0))
    whole, halves = Chaotic()(features), torch.cat([Chaotic()(half) for half in features.split(2)])
    assert float((whole - halves).abs().max()) > 0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "middle",
    [nn.BatchNorm2d(6), nn.InstanceNorm2d(6), nn.GroupNorm(6, 6), nn.Dropout(0.5), Chaotic()],
    ids=lambda module: type(module).__name__,
)
def test_rounding_is_no_reason_to_refuse(middle: nn.Module, dtype: torch.dtype) -> None:
    check_dependence(FeatureGraph(Net(middle).eval().to(dtype), ["first", "second"]), SIZE)


@pytest.mark.slow
def test_a_deep_network_with_large_values_passes() -> None:
    torch.manual_seed(0)
    network = resnet(5, 3, 8, 10).eval()
    for parameter in network.parameters():
        if parameter.ndim == 4:
            parameter.data *= 3
    check_dependence(GradientGraph(network, ["layer2"], Preprocessing((32, 32))), (40, 50))


def test_a_network_is_checked_once_per_size_and_so_are_its_copies() -> None:
    network = Net(nn.Identity()).eval()
    duplicate = Net(nn.Identity()).eval()
    share_record(network, duplicate)
    check_dependence(FeatureGraph(network, ["first"]), SIZE)
    assert network.images == 8
    check_dependence(GradientGraph(network, ["second"]), SIZE)
    check_dependence(FeatureGraph(duplicate, ["second"]), SIZE)
    assert network.images == 8 and duplicate.images == 0
    check_dependence(FeatureGraph(network, ["first"]), (9, 9))
    assert network.images == 16
    network.middle = Jitter()
    with pytest.raises(KdxError, match="from pass to pass"):
        check_dependence(FeatureGraph(network, ["first"]), SIZE)


def test_the_check_does_not_change_random_numbers_or_the_network() -> None:
    network = Net(nn.Sequential(nn.BatchNorm2d(6), nn.Dropout(0.5))).eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    check_dependence(FeatureGraph(network, ["second"]), SIZE)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_a_network_that_does_not_take_four_images_is_not_judged() -> None:
    class OneImage(Net):
        def forward(self, images: Tensor) -> Tensor:
            if len(images) != 1:
                raise ValueError("one image at a time")
            return super().forward(images)

    check_dependence(FeatureGraph(OneImage(Jitter()).eval(), ["first"]), SIZE)

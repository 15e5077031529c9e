"""The layers worth explaining, of library networks and of custom networks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kdx import models
from kdx.errors import KdxError
from kdx.export.graphs import FeatureGraph
from kdx.models.feature_layers import described_layers
from tests import hooked


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reference", "size", "expected"),
    [
        ("kdx:resnet,width=4", (16, 16), ["layer1", "layer2", "layer3"]),
        ("timm:resnet18", (64, 64), ["layer1", "layer2", "layer3", "layer4"]),
        ("timm:resnet18d", (64, 64), ["layer1", "layer2", "layer3", "layer4"]),
        ("torchvision:resnet18", (64, 64), ["layer1", "layer2", "layer3", "layer4"]),
        ("timm:vit_tiny_patch16_224", None, [f"blocks.{index}" for index in range(11)]),
        ("timm:mobilenetv3_small_100", (64, 64), [f"blocks.{index}" for index in range(6)]),
        ("timm:mixer_s32_224", None, [f"blocks.{index}" for index in range(8)]),
        ("timm:swin_s3_tiny_224", None, [f"layers.{index}" for index in range(4)]),
        ("timm:pit_ti_224", None, [f"transformers.{index}.blocks" for index in range(2)]),
        ("timm:convnext_atto", (64, 64), [f"stages.{index}" for index in range(4)]),
        ("torchvision:densenet121", (64, 64), [f"features.denseblock{index}" for index in range(1, 5)]),
        ("torchvision:regnet_y_400mf", (64, 64), [f"trunk_output.block{index}" for index in range(1, 5)]),
    ],
)
def test_layers_are_the_stages(reference: str, size: tuple[int, int] | None, expected: list[str]) -> None:
    network = models.load(reference, classes=10)
    layers = models.layers(network, size)
    assert layers == expected
    image = torch.rand(1, 3, *(size or network.preprocessing.size or (224, 224)))
    with torch.no_grad():
        FeatureGraph(network.module, layers)(image)  # raises if a layer is not one map


@pytest.mark.slow
def test_layers_of_a_plain_sequence_are_one_per_resolution() -> None:
    network = models.load("timm:vgg11_bn,num_classes=10").module.get_submodule("features")
    assert models.layers(nn.Sequential(network, nn.Flatten()), (64, 64)) == [f"0.{index}" for index in (1, 5, 12, 19, 26)]
    assert models.layers(network, (64, 64)) == ["1", "5", "12", "19", "26"]


class Joined(nn.Module):
    """Branches at two resolutions that are joined, so the output is not that of a child."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fine = nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), nn.AvgPool2d(2))
        self.coarse = nn.Sequential(nn.AvgPool2d(2), nn.Sequential(nn.Conv2d(channels, 4, 1)))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.fine(features), self.coarse(features)], 1)


class Listed(nn.Module):
    """Blocks in a ModuleList, which itself never runs, and an unused branch."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Joined(3), Joined(8), Joined(8)])
        self.unused = Joined(3)
        self.head = nn.Linear(8, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            images = block(images)
        logits: torch.Tensor = self.head(images.mean((2, 3)))
        return logits


def test_layers_of_a_custom_network() -> None:
    network = Listed()
    network.blocks[0].eval()
    assert models.layers(network, (32, 24)) == ["blocks.1", "blocks.2"]  # the first is the stem: it takes the image
    assert network.training and not network.blocks[0].training  # modes are unchanged
    assert not any(module._forward_hooks for module in network.modules())
    with pytest.raises(KdxError, match="does not run on an image of 2 x 2"):
        models.layers(network, (2, 2))


class Residual(nn.Module):
    """A block of two convolutions around an encoding of positions that all blocks share."""

    def __init__(self, channels: int, positions: nn.Module) -> None:
        super().__init__()
        self.first, self.positions, self.second = nn.Conv2d(channels, channels, 1), positions, nn.Conv2d(channels, channels, 1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = features + self.second(self.positions(self.first(features)).relu())
        return result


class Pair(nn.Module):
    """A block that passes on its first feature and changes the second one."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = Residual(6, nn.Identity())

    def forward(self, fine: torch.Tensor, coarse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return fine, coarse + self.mix(coarse).tanh()


class Hierarchy(nn.Module):
    """Two stages, each with an embedding and shared positions, then blocks on both resolutions, and a last convolution with its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 2, 2), nn.BatchNorm2d(4))
        self.positions = nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 4, 1)))
        self.stage1 = nn.ModuleList([Residual(4, self.positions), Residual(4, self.positions)])
        self.embed = nn.Sequential(nn.Conv2d(4, 6, 2, 2), nn.BatchNorm2d(6))
        self.stage2 = nn.ModuleList([Residual(6, nn.Identity()), Residual(6, nn.Identity())])
        self.encode = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, groups=6))
        self.pairs = nn.ModuleList([Pair(), Pair()])
        self.last = nn.Sequential(nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        fine = self.stem(images)
        for block in self.stage1:
            fine = block(fine)
        coarse = self.embed(fine)
        for block in self.stage2:
            coarse = block(coarse)
        for pair in self.pairs:
            fine, coarse = pair(fine, self.encode(coarse))
        logits: torch.Tensor = self.head(self.last(coarse).mean((2, 3)))
        return logits


def test_embeddings_encodings_and_shared_parts_are_not_advised_beside_blocks() -> None:
    blocks = ["stage1.0", "stage1.1", "stage2.0", "stage2.1", "pairs.0[1]", "pairs.1[1]", "last"]
    assert models.layers(Hierarchy(), (16, 16)) == blocks


class Placed(nn.Module):
    """A convolution between two stages, with a table of positions."""

    def __init__(self, channels: int, width: int, side: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, width, 2, 2)
        self.table = nn.Parameter(torch.rand(1, width, side, side))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.convolution(features) + self.table
        return result


class WithShortcut(nn.Module):
    """A block that takes and returns its feature and that of its shortcut; the feature is the output of its last convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(2 * channels, channels, 1)

    def forward(self, pair: list[torch.Tensor]) -> list[torch.Tensor]:
        feature, shortcut = pair
        return [self.second(torch.cat([self.first(feature).relu(), shortcut], 1)), shortcut]


class OfSmallerImages(nn.Module):
    """A stem of images at half their size, and two stages of blocks with a placed convolution between them."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
        self.stage1 = nn.ModuleList([WithShortcut(4), WithShortcut(4)])
        self.between = Placed(4, 6, 4)
        self.stage2 = nn.ModuleList([WithShortcut(6), WithShortcut(6)])
        self.head = nn.Linear(6, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pair = [self.branch(nn.functional.avg_pool2d(images, 2))] * 2
        for block in self.stage1:
            pair = block(pair)
        pair = [self.between(pair[0])] * 2
        for block in self.stage2:
            pair = block(pair)
        logits: torch.Tensor = self.head(pair[0].mean((2, 3)))
        return logits


def test_stems_of_resized_images_and_placed_convolutions_are_not_advised_and_blocks_with_a_shortcut_are_whole() -> None:
    assert models.layers(OfSmallerImages(), (16, 16)) == ["stage1.0[0]", "stage1.1[0]", "stage2.0[0]", "stage2.1[0]"]


def test_layers_are_described_with_their_layout_and_the_reason_against_them() -> None:
    network = hooked.Blocks().eval()
    first, last = described_layers(network, (12, 9))
    assert (first.name, first.feature, first.layout, first.source, first.advised) == (
        "first",
        (8, 4, 3),
        "tokens(prefix=1,grid=4x3)",
        "probe",
        True,
    )
    assert (last.name, last.advised, last.problem) == ("last", False, "No position has a gradient.")
    (stated,) = described_layers(network, (12, 9), ["first:tokens(prefix=1,grid=2x6)"])
    assert stated.feature == (8, 2, 6) and stated.source == "stated" and stated.advised
    (refused,) = described_layers(network, (12, 9), ["first:channels-last"])
    assert refused.feature is None and "it has 3 axes" in refused.problem

"""Residual networks that come with kdx, so that distillation and explanation work without another package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from kdx.errors import KdxError


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with a shortcut."""

    expansion = 1

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(channels, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.downsample = _shortcut(channels, width, stride)

    def forward(self, features: Tensor) -> Tensor:
        residual = self.relu(self.bn1(self.conv1(features)))
        residual = self.bn2(self.conv2(residual))
        out: Tensor = self.relu(residual + self.downsample(features))
        return out


class BottleneckBlock(nn.Module):
    """1 x 1, 3 x 3 (with the stride) and 1 x 1 convolutions with a shortcut; the output is four times as wide as the 3 x 3."""

    expansion = 4

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(channels, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _conv(width, width * self.expansion, 1)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.relu = nn.ReLU()
        self.downsample = _shortcut(channels, width * self.expansion, stride)

    def forward(self, features: Tensor) -> Tensor:
        residual = self.relu(self.bn1(self.conv1(features)))
        residual = self.relu(self.bn2(self.conv2(residual)))
        residual = self.bn3(self.conv3(residual))
        out: Tensor = self.relu(residual + self.downsample(features))
        return out


_BLOCKS: dict[str, type[BasicBlock] | type[BottleneckBlock]] = {"basic": BasicBlock, "bottleneck": BottleneckBlock}


class ResidualNetwork(nn.Module):
    """A stem, stages ``layer1`` ... ``layerN`` that each halve the resolution except the first, mean over positions, and ``fc``."""

    def __init__(self, width: int, depths: Sequence[int], classes: int, block: str, stem: str) -> None:
        super().__init__()
        large = stem == "imagenet"
        self.conv1 = _conv(3, width, 7, 2) if large else _conv(3, width, 3)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        block_type = _BLOCKS[block]
        channels = width
        self.stages: list[str] = []
        for stage, depth in enumerate(depths):
            inner = width * 2**stage
            blocks = []
            for index in range(depth):
                blocks.append(block_type(channels, inner, 2 if stage and not index else 1))
                channels = inner * block_type.expansion
            self.stages.append(f"layer{stage + 1}")
            self.add_module(self.stages[-1], nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        for stage in self.stages:
            features = self.get_submodule(stage)(features)
        logits: Tensor = self.fc(features.mean((2, 3)))
        return logits


def resnet(
    width: int = 16,
    depth: int | Sequence[int] = 2,
    classes: int = 10,
    stages: int = 3,
    block: Literal["basic", "bottleneck"] = "basic",
    stem: Literal["small", "imagenet"] = "small",
) -> ResidualNetwork:
    """A residual network (He et al. 2016) with torchvision's layer names: images [n, 3, H, W] -> logits [n, classes].

    ``width`` is the width of the first stage; each later stage doubles it. ``depth`` is the number of blocks of every stage, or a
    sequence with the number of blocks of each stage; then its length is the number of stages, and ``stages`` is not used. The small
    stem keeps the resolution; the imagenet stem divides it by four. ``resnet(64, (3, 4, 6, 3), 1000, block="bottleneck",
    stem="imagenet")`` is ResNet-50 with exactly the same parameters. Weights are random (He et al. 2015).

    Raises KdxError for a size below 1 and for an unknown block or stem.
    """
    depths = (depth,) * stages if isinstance(depth, int) else tuple(depth)
    if not depths or any(not isinstance(size, int) or size < 1 for size in (width, classes, *depths)):
        raise KdxError(
            f"A residual network cannot have width {width}, depth {depth}, {stages} stages and {classes} classes.",
            "Give whole numbers of at least 1; in a model reference, depths per stage are written 3-4-6-3.",
        )
    if block not in _BLOCKS:
        raise KdxError(f"There is no residual block {block!r}.", f"Choose one of: {', '.join(_BLOCKS)}.")
    if stem not in ("small", "imagenet"):
        raise KdxError(f"There is no stem {stem!r}.", "Choose small (keeps the resolution) or imagenet (divides it by four).")
    network = ResidualNetwork(width, depths, classes, block, stem)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


def _conv(channels: int, width: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, width, kernel, stride, kernel // 2, bias=False)


def _shortcut(channels: int, width: int, stride: int) -> nn.Module:
    if stride == 1 and channels == width:
        return nn.Identity()
    return nn.Sequential(_conv(channels, width, 1, stride), nn.BatchNorm2d(width))

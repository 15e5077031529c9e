"""The residual networks that come with kdx: enough to distil and explain without another package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from kdx.errors import KdxError


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut."""

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
    """1 x 1, 3 x 3 (where the stride is) and 1 x 1 convolutions beside a shortcut; four times as wide outside as inside."""

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
    """Stem, stages ``layer1`` ... ``layerN`` that each halve the resolution but the first, mean over positions, ``fc``."""

    def __init__(self, width: int, depths: Sequence[int], classes: int, block: str, stem: str) -> None:
        super().__init__()
        large = stem == "imagenet"
        self.conv1 = _conv(3, width, 7, 2) if large else _conv(3, width, 3)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        kind = _BLOCKS[block]
        channels = width
        self.stages: list[str] = []
        for stage, depth in enumerate(depths):
            inner = width * 2**stage
            blocks = []
            for index in range(depth):
                blocks.append(kind(channels, inner, 2 if stage and not index else 1))
                channels = inner * kind.expansion
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

    ``width`` is the first stage's width, doubled by each stage after it; ``depth`` is the number of blocks of every
    stage, or of each one (then its length is the number of stages, and ``stages`` is not used). The small stem keeps
    the resolution; the imagenet stem divides it by four. ResNet-50 is
    ``resnet(64, (3, 4, 6, 3), 1000, block="bottleneck", stem="imagenet")``, to the last parameter. Weights are
    random (He et al. 2015).

    Raises KdxError for a size below 1 and for an unknown block or stem.
    """
    depths = (depth,) * stages if isinstance(depth, int) else tuple(depth)
    if not depths or any(not isinstance(size, int) or size < 1 for size in (width, classes, *depths)):
        raise KdxError(
            f"A residual network cannot have width {width}, depth {depth}, {stages} stages and {classes} classes.",
            "Give whole numbers from 1 up; a depth for each stage is written 3-4-6-3 in a model reference.",
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

"""Networks as users write them for other frameworks: their layer names, and what they return besides logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        skipped = x if self.downsample is None else self.downsample(x)
        features: Tensor = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (features + skipped).relu()


class Residual(nn.Module):
    """A residual network for small images with the layer names of mdistiller and RepDistiller: conv1, bn1, layer1 to layer3, fc."""

    def __init__(self, width: int = 4, depth: int = 1, classes: int = 3) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        widths = [width, width, 2 * width, 4 * width]
        for stage in (1, 2, 3):
            blocks = [
                Block(widths[stage - 1 if place == 0 else stage], widths[stage], 1 + (place == 0 < stage - 1)) for place in range(depth)
            ]
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.fc = nn.Linear(widths[3], classes)

    def parts(self, x: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """The logits, the features of the stages, and the pooled features."""
        features = [self.bn1(self.conv1(x)).relu()]
        for stage in (1, 2, 3):
            features.append(getattr(self, f"layer{stage}")(features[-1]))
        pooled = features[-1].mean((2, 3))
        return self.fc(pooled), features, pooled


class OfMdistiller(Residual):
    """``model(x)`` returns (logits, features by name)."""

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        logits, features, pooled = self.parts(x)
        return logits, {"feats": features, "preact_feats": features, "pooled_feat": pooled}


class OfRepDistiller(Residual):
    """``model(x)`` returns logits, and ``model(x, is_feat=True)`` (features, logits)."""

    def forward(self, x: Tensor, is_feat: bool = False, preact: bool = False) -> Any:
        logits, features, pooled = self.parts(x)
        return ([*features, pooled], logits) if is_feat else logits


class FeaturesFirst(OfRepDistiller):
    """The network of `OfRepDistiller`, which returns (features, logits)."""

    def forward(self, x: Tensor, is_feat: bool = True, preact: bool = False) -> Any:
        return super().forward(x, is_feat, preact)


class Pooled(Residual):
    """``model(x)`` returns (pooled features, logits): two matrices, of which only the number of classes tells the logits."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, _, pooled = self.parts(x)
        return pooled, logits


class Named(Residual):
    """``model(x)`` returns a dict in which the logits have the name ``key``."""

    def __init__(self, key: str = "pred", **arguments: int) -> None:
        super().__init__(**arguments)
        self.key = key

    def forward(self, x: Tensor) -> dict[str, Any]:
        logits, features, pooled = self.parts(x)
        return {"features": features, "pooled": pooled, self.key: logits}


class Plain(Residual):
    """``model(x)`` returns logits."""

    def forward(self, x: Tensor) -> Tensor:
        return self.parts(x)[0]


def seeded(kind: type[nn.Module], seed: int, **arguments: Any) -> nn.Module:
    """A network with weights of this seed, in eval mode, whose batch norm has seen images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = kind(**arguments)
        with torch.no_grad():
            module(torch.rand(8, 3, 12, 12))
    return module.eval()


class Answer:
    """An object with an attribute ``logits``, as a framework's own result type."""

    def __init__(self, logits: Tensor, features: list[Tensor]) -> None:
        self.logits, self.features = logits, features


class Attributed(Residual):
    """``model(x)`` returns an object."""

    def forward(self, x: Tensor) -> Answer:
        return Answer(*self.parts(x)[:2])


class Auxiliary(NamedTuple):
    """The result of torchvision's Inception and GoogLeNet in training."""

    logits: Tensor
    aux_logits: Tensor


class WithAuxiliary(Residual):
    """``model(x)`` returns two matrices of one shape, with names."""

    def forward(self, x: Tensor) -> Auxiliary:
        logits = self.parts(x)[0]
        return Auxiliary(logits, 2 * logits)

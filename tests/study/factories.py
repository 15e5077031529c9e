"""Networks of a user, for tests."""

from __future__ import annotations

from torch import nn

from kdx.export.graphs import Preprocessing
from kdx.models import load


def brighter(classes: int = 10) -> nn.Module:
    """A small network whose preprocessing is not that of kdx's own."""
    module = load(f"kdx:resnet,width=3,depth=1,stages=2,classes={classes}").module
    module.preprocessing = Preprocessing((8, 8), (0.25,), (0.25,))  # type: ignore[assignment]
    return module


def plain(classes: int = 10) -> nn.Module:
    """A small network that states no size of its images."""
    return load(f"kdx:resnet,width=3,depth=1,stages=2,classes={classes}").module


def wide(classes: int = 10) -> nn.Module:
    """A network with more parameters than `kdx:resnet,width=3`, whose preprocessing is not that of kdx's own."""
    module = load(f"kdx:resnet,width=5,depth=1,stages=2,classes={classes}").module
    module.preprocessing = Preprocessing((8, 8), (0.25,), (0.25,))  # type: ignore[assignment]
    return module

"""The residual network of kdx against torchvision's."""

from __future__ import annotations

import pytest
import torch

from kdx import models
from kdx.errors import KdxError
from kdx.export.graphs import FeatureGraph
from kdx.models.resnet import resnet


def test_resnet_is_torchvisions_resnet50() -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    theirs = torchvision.models.resnet50(weights=None).eval()
    ours = resnet(64, (3, 4, 6, 3), 1000, block="bottleneck", stem="imagenet").eval()
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
    images = torch.randn(2, 3, 71, 65)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("stages", "depth"), [(1, 1), (3, 2), (4, (1, 2, 1, 1))])
def test_resnet_stages_halve_the_resolution_and_double_the_width(stages: int, depth: int | tuple[int, ...]) -> None:
    network = resnet(4, depth, 5, stages)
    names = [f"layer{index + 1}" for index in range(stages)]
    logits, *features = FeatureGraph(network, names)(torch.rand(2, 3, 24, 16))
    assert logits.shape == (2, 5)
    assert [tuple(feature.shape[1:]) for feature in features] == [(4 * 2**i, 24 // 2**i, 16 // 2**i) for i in range(stages)]


@pytest.mark.parametrize(
    "arguments", ["width=0", "depth=0", "stages=0", "depth=2-0", "block=wide", "stem=none", "width=1.5", "depth=deep", "colour=red"]
)
def test_resnet_refuses_invalid_arguments(arguments: str) -> None:
    with pytest.raises(KdxError):
        models.load(f"kdx:resnet,{arguments}")

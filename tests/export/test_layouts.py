"""Layouts: what a probe recovers, what a user states, and what is refused. The oracle places each patch's token by definition."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kdx
from kdx.errors import KdxError
from kdx.export.graphs import FeatureGraph, GradientGraph
from kdx.features.layout import StatedLayout, compact, parse_layout, possible_grids, window_order
from kdx.models.layer_pairs import parse_layers
from tests.export.patch_networks import PATCH, Patches, Windowed


def images(grid: tuple[int, int], n: int = 3) -> Tensor:
    return torch.rand(n, 3, grid[0] * PATCH, grid[1] * PATCH, generator=torch.Generator().manual_seed(5), dtype=torch.float32)


def shuffled(count: int, seed: int) -> list[int]:
    return [int(index) for index in np.random.default_rng(seed).permutation(count)]


@pytest.mark.parametrize("axes", ["nLC", "LnC", "nCL"])
@pytest.mark.parametrize(
    ("grid", "extra"),
    [
        ((4, 4), ()),
        ((4, 4), (0,)),
        ((5, 5), (25, 26, 27)),
        ((3, 6), (0,)),
        ((2, 2), (0, 1, 2, 3, 4)),
        ((4, 4), (0, 17, 18)),
        ((6, 4), (7,)),
        ((6, 6), (9, 20)),
    ],
)
def test_a_probe_recovers_extra_tokens_and_axes(axes: str, grid: tuple[int, int], extra: tuple[int, ...]) -> None:
    network, pixels = Patches(grid, extra=extra, axes=axes).eval(), images(grid)
    graph = FeatureGraph(network, ["layer"])
    torch.testing.assert_close(graph(pixels)[1], network.expected(pixels), rtol=1e-4, atol=1e-6)
    assert [decided.source for decided in graph.decisions.values()] == ["probe"]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("grid", "extra"), [((4, 4), ()), ((4, 6), (0, 9)), ((7, 7), (3,))])
def test_a_probe_recovers_any_order(grid: tuple[int, int], extra: tuple[int, ...], seed: int) -> None:
    network, pixels = Patches(grid, shuffled(math.prod(grid), seed), extra).eval(), images(grid)
    torch.testing.assert_close(FeatureGraph(network, ["layer"])(pixels)[1], network.expected(pixels), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("axes", ["nHWC", "nCHW"])
@pytest.mark.parametrize("grid", [(12, 12), (13, 11), (14, 14), (3, 12)])  # with 12 channels, the axes have nearly or exactly one size
def test_a_probe_tells_channels_from_positions(axes: str, grid: tuple[int, int]) -> None:
    network, pixels = Patches(grid, axes=axes).eval(), images(grid)
    torch.testing.assert_close(FeatureGraph(network, ["layer"])(pixels)[1], network.expected(pixels), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("n", [1, 3, 17])
def test_sequence_first_encoders_with_as_many_images_as_tokens(n: int) -> None:
    """A class token and 4 x 4 patches are 17 tokens: with 17 images, both axes have one size."""
    network, pixels = Patches((4, 4), extra=(0,), axes="LnC").eval(), images((4, 4), n)
    maps = kdx.grad_cam(network, pixels, "layer", 1).maps
    feature = network.expected(pixels)
    # Every token, also the extra one, is an equal part of the mean, so the gradient at each position is the head's weight / 17.
    expected = torch.einsum("c,nchw->nhw", network.head.weight[1] / 17, feature).relu()
    torch.testing.assert_close(maps, expected.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("axes", ["nLC", "LnC", "nHWC"])
def test_the_change_of_a_brightened_patch_lies_on_that_patch(axes: str) -> None:
    grid = (5, 4)
    network, pixels = Patches(grid, None if axes == "nHWC" else shuffled(20, 9), axes=axes).eval(), images(grid, 1)
    graph = FeatureGraph(network, ["layer"])
    for row in range(grid[0]):
        for column in range(grid[1]):
            changed = pixels.clone()
            changed[:, :, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] += 1
            change = (graph(changed)[1] - graph(pixels)[1]).norm(dim=1)[0]
            assert divmod(int(change.argmax()), grid[1]) == (row, column)


def test_windows_as_an_axis_are_put_in_their_places() -> None:
    network, pixels = Windowed().eval(), images((6, 8))
    expected = network.inside(network.patch(pixels).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(FeatureGraph(network, ["windows"])(pixels)[1], expected)


@pytest.mark.parametrize("n", [1, 3, 8])
def test_rows_that_are_not_images_are_refused_with_the_layers_name(n: int) -> None:
    network, pixels = Windowed().eval(), images((4, 4), n)
    for method in (kdx.grad_cam, kdx.hires_cam):
        with pytest.raises(KdxError, match=r"'inside'.* rows for \d+ images"):
            method(network, pixels, "inside", 1)
    if n >= 4:
        explainer = kdx.Explainer(student=network, base=Windowed(), layers=["inside"], runtime="eager")
        with explainer, pytest.raises(KdxError, match=r"'inside'.* rows for \d+ images"):
            explainer(pixels, torch.arange(n) % 2)


class Table(nn.Module):
    """A layer that returns the same table for every image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.table = nn.Conv2d(3, 4, 4, 4), Positions()

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = (self.conv(pixels).flatten(2).transpose(1, 2) + self.table(pixels)).mean(1)
        return logits


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.randn(16, 4))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.values * 1.0


@pytest.mark.parametrize("n", [3, 16])
def test_an_output_that_does_not_depend_on_the_image_is_refused(n: int) -> None:
    with pytest.raises(KdxError, match=r"layer 'table' .* no axis along which the images differ"):
        FeatureGraph(Table().eval(), ["table"])(images((4, 4), n))


class TwoPaths(nn.Module):
    """A block of convolutions with two outputs, the first of which is 0 for all images in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 4, 4), nn.Conv2d(3, 5, 4, 4)
        self.first.bias = nn.Parameter(torch.full((6,), -100.0))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(pixels).relu(), self.second(pixels)


class Paths(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = TwoPaths(), nn.Linear(11, 4)

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.cat(self.block(pixels), 1).mean((2, 3)))
        return logits


def test_an_output_of_convolutions_that_is_zero_for_the_probe_has_their_layout() -> None:
    torch.manual_seed(0)
    network = Paths().eval()
    for index, channels in enumerate((6, 5)):
        graph, layer = FeatureGraph(network, [f"block[{index}]"]), f"block[{index}]"
        pixels = 400 * images((4, 4), 2) - 200  # the first output is not 0 for these
        feature = graph(pixels)[1]
        torch.testing.assert_close(feature, network.block(pixels)[index])
        assert feature.shape[1] == channels and feature.any()
        assert graph.decisions[layer, (pixels.shape[2], pixels.shape[3])].source in {"convolutions", "probe"}


class Mixed(nn.Module):
    """Tokens that are all equal: no probe can place them."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.layer, self.head = nn.Conv2d(3, 6, 4, 4), nn.Identity(), nn.Linear(6, 4)

    def forward(self, pixels: Tensor) -> Tensor:
        tokens = self.patch(pixels).flatten(2).transpose(1, 2)
        logits: Tensor = self.head(self.layer(tokens.mean(1, keepdim=True).expand(-1, 17, -1)).mean(1))
        return logits


def test_a_layout_that_a_probe_does_not_show_must_be_stated() -> None:
    network, pixels = Mixed().eval(), images((4, 4))
    with pytest.raises(KdxError, match=r"layout of layer 'layer' is not known: .* \[3, 17, 6\]") as caught:
        FeatureGraph(network, ["layer"])(pixels)
    assert "layer:tokens(prefix=1,grid=14x14)" in caught.value.hint
    feature = FeatureGraph(network, ["layer:tokens(prefix=1)"])(pixels)[1]
    assert feature.shape == (3, 6, 4, 4)
    assert kdx.grad_cam(network, pixels, "layer:tokens(suffix=1,grid=2x8)", 1).maps.shape == (3, 2, 8)


@pytest.mark.parametrize(
    ("axes", "stated"),
    [
        ("nLC", "tokens(prefix=1,grid=4x6)"),
        ("nLC", "nLC(prefix=1)"),
        ("LnC", "sequence-first(prefix=1)"),
        ("nCL", "nCL(grid=4x6,prefix=1)"),
        ("nHWC", "channels-last"),
        ("nHWC", "nHWC"),
        ("nCHW", "channels-first"),
    ],
)
def test_a_stated_layout_is_taken_without_a_probe(axes: str, stated: str) -> None:
    network, pixels = Patches((4, 6), extra=() if "H" in axes else (0,), axes=axes).eval(), images((4, 6))
    graph = FeatureGraph(network, [f"layer:{stated}"])
    torch.testing.assert_close(graph(pixels)[1], network.expected(pixels), rtol=1e-4, atol=1e-6)
    assert [decided.source for decided in graph.decisions.values()] == ["stated"]


def test_stated_windows_and_columns() -> None:
    order = window_order((4, 6), (2, 3), 0)
    by_token = [list(order).index(token) for token in range(24)]  # the cell of each token
    network, pixels = Patches((4, 6), by_token).eval(), images((4, 6))
    stated = FeatureGraph(network, ["layer:tokens(windows=2x3)"])(pixels)[1]
    torch.testing.assert_close(stated, network.expected(pixels), rtol=1e-4, atol=1e-6)
    columns = window_order((4, 6), (4, 1), 2)
    assert list(columns)[:3] == [2, 6, 10]  # one row down is the next token


@pytest.mark.parametrize(
    ("stated", "reason"),
    [
        ("channels-last", "it has 3 axes"),
        ("tokens", "its 17 tokens leave 17 positions, no grid"),
        ("tokens(prefix=1,grid=3x5)", "its 17 tokens leave 16 positions, not 3x5"),
        ("tokens(prefix=1,windows=3x3)", "windows of 3x3 do not divide a grid of 4x4"),
        ("sequence-first(suffix=1,grid=1x2)", r"17 rows for 3 images|returns 17 rows"),
    ],
)
def test_a_stated_layout_that_does_not_fit_is_refused(stated: str, reason: str) -> None:
    network = Patches((4, 4), extra=(0,)).eval()
    with pytest.raises(KdxError, match=reason):
        FeatureGraph(network, [f"layer:{stated}"])(images((4, 4)))


@pytest.mark.parametrize("text", ["", "token", "nLCC", "tokens(", "tokens(prefix=-1)", "tokens(grid=4)", "tokens(a=2)", "vector(prefix=1)"])
def test_a_text_that_is_not_a_layout_is_refused(text: str) -> None:
    with pytest.raises(KdxError, match=r"not a layout|not an option|has options"):
        parse_layout(text)


def test_a_layout_is_parsed() -> None:
    assert parse_layout("tokens(prefix=1, grid=14x7)") == StatedLayout("tokens(prefix=1, grid=14x7)", "nLC", 1, 0, (14, 7))
    names = parse_layers(["a:tokens(prefix=1,grid=2x2)=b[0]:nHWC", "c", "d=e", "student=f:nHWC,teacher=g:tokens(prefix=1)"])
    assert {layer: name.teacher for layer, name in names.items()} == {
        "a:tokens(prefix=1,grid=2x2)": "b[0]:nHWC",
        "c": "c",
        "d": "e",
        "f:nHWC": "g:tokens(prefix=1)",
    }


def test_grids_that_tokens_may_form() -> None:
    assert possible_grids(197, (224, 224))[0] == (14, 14)
    assert possible_grids(33, (64, 128))[0] == (4, 8)
    assert possible_grids(50, (100, 75), [(7, 7)])[0] == (7, 7)
    assert set(possible_grids(9, (64, 64))) == {(3, 3), (2, 2)}
    assert compact([4, 5, 6]) == range(4, 7) and compact([4, 6, 5]) == (4, 6, 5)


class Counting(Patches):
    passes = 0

    def forward(self, pixels: Tensor) -> Tensor:
        self.passes += 1
        return super().forward(pixels)


def test_the_decision_is_made_once_and_convolutions_need_no_probe() -> None:
    network, pixels = Counting((4, 4), extra=(0,)).eval(), images((4, 4))
    FeatureGraph(network, ["patch"])(pixels)
    assert network.passes == 1
    FeatureGraph(network, ["layer"])(pixels)
    first = network.passes
    FeatureGraph(network, ["layer"])(pixels)
    GradientGraph(network, ["layer"])(pixels, torch.rand(3, 4))
    assert network.passes == first + 2


class Normed(Patches):
    """With batch norm, dropout and a mode of its own for each."""

    def __init__(self) -> None:
        super().__init__((4, 4), extra=(0,))
        self.norm, self.dropout = nn.BatchNorm2d(3), nn.Dropout(0.5)

    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(self.dropout(self.norm(pixels)))


def test_a_probe_changes_neither_modes_nor_statistics() -> None:
    network = Normed()
    before = copy.deepcopy(network.state_dict())
    graph = FeatureGraph(network, ["layer"])
    graph.train()
    network.norm.eval()
    graph.decide_for((16, 16))
    assert network.training and network.dropout.training and not network.norm.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert [decided.source for decided in graph.decisions.values()] == ["probe"]


@pytest.mark.parametrize("seed", range(4))
def test_a_small_grid_is_never_misread(seed: int) -> None:
    """Two channels on 2 x 2 positions: every axis may be any of the three. The probe reads them correctly or refuses."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(3, 2, 3, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 4)).eval()
    pixels = images((4, 4))
    try:
        feature = FeatureGraph(network, ["1"])(pixels)[1]
    except KdxError:
        return
    torch.testing.assert_close(feature, network[:2](pixels))


@pytest.mark.parametrize("seed", [45, 47, 59, 65])
def test_a_layer_without_weights_after_a_convolution_needs_no_probe_that_succeeds(seed: int) -> None:
    """Four channels beside six positions, most of them zero: shape and probe leave the layout open, and the convolution before does not."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
    pixels = torch.rand(2, 3, 8, 8)
    logits, feature = FeatureGraph(network, ["1"])(pixels)
    torch.testing.assert_close(feature, network[:2](pixels))
    torch.testing.assert_close(logits, network(pixels))


class QuadrantTokens(nn.Module):
    """17 tokens, each of which sees one quadrant of the image, in no order: no grid of them is right."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embedding = nn.Conv2d(3, 6, 8, 8)
        self.layer, self.head = nn.Identity(), nn.Linear(6, 3)
        self.quadrants = torch.randint(4, (17,), generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embedding(x).flatten(2).transpose(1, 2)
        logits: Tensor = self.head(self.layer(tokens[:, self.quadrants]).mean(1))
        return logits


@pytest.mark.parametrize("seeds", [range(10), pytest.param(range(10, 40), marks=pytest.mark.slow)])
def test_tokens_that_follow_no_grid_are_not_read_as_a_small_one(seeds: range) -> None:
    for seed in seeds:
        with pytest.raises(KdxError, match="is not known"):
            FeatureGraph(QuadrantTokens(seed).eval(), ["layer"])(torch.rand(2, 3, 16, 16, dtype=torch.float32))

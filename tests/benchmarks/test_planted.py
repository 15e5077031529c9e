"""Planted differences: the measures are what they say, UniCAM of one network is a gradient, and the maps show what was planted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import planted, planted_tables
from kdx.data.planted_cues import BOX, SIDE, Composites, draw_composites
from kdx.kernels import ambient, geometry


def one_region(rows: slice, columns: slice, n: int = 2) -> Composites:
    """Images without content, whose planted region is the same rectangle; the common region is the lower right corner."""
    masks = np.zeros((2, n, SIDE, SIDE), dtype=bool)
    masks[0, :, rows, columns] = True
    masks[1, :, -BOX:, -BOX:] = True
    labels = np.zeros(n, dtype=np.int64)
    return Composites(np.zeros((n, 3, SIDE, SIDE), dtype=np.float32), labels, labels, *masks)


def test_the_share_of_a_cell_is_its_mean_over_pixels() -> None:
    masks = draw_composites("place", 5, 0).planted
    shares = planted.cell_shares(masks, 8, 16)
    for image, y, x in ((0, 3, 7), (2, 0, 0), (4, 7, 15)):
        assert shares[image, y, x] == masks[image, 4 * y : 4 * y + 4, 2 * x : 2 * x + 2].mean()
    assert shares.sum() * 8 == masks.sum()
    assert (planted.cell_shares(masks, SIDE, SIDE) == masks).all()


def test_a_constant_map_has_density_one() -> None:
    figures = planted.energy(np.full((2, 8, 8), 3.0), one_region(slice(0, 6), slice(0, 5)))
    for key in ("density planted", "density common", "signed planted", "signed common"):
        assert figures[key] == pytest.approx(1)
    assert figures["empty"] == 0 and figures["total"] == pytest.approx(2 * 64 * 3)


def test_density_counts_positive_values_and_signed_density_counts_all() -> None:
    images = one_region(slice(0, 4), slice(0, 8))  # two cells of an 8 x 8 grid: 1/32 of the area
    maps = np.zeros((2, 8, 8))
    maps[:, 0, 0], maps[:, 0, 1], maps[:, 3, 3] = 2.0, -1.0, 2.0  # the third cell lies in neither region
    figures = planted.energy(maps, images)
    assert figures["density planted"] == pytest.approx(2 / 4 * 32) and figures["density common"] == 0
    assert figures["signed planted"] == pytest.approx(1 / 5 * 32)
    assert figures["sum planted"] == pytest.approx(2) and figures["total"] == pytest.approx(6)


def test_maps_without_a_positive_value_are_counted_apart() -> None:
    maps = np.zeros((4, 8, 8))
    maps[1, 0, 0], maps[2] = 5.0, -1.0
    figures = planted.energy(maps, one_region(slice(0, 4), slice(0, 4), 4))
    assert figures["empty"] == 0.75 and figures["peak planted"] == 0.25
    assert figures["density planted"] == pytest.approx(64)


def test_unicam_of_one_network_is_the_gradient_of_its_relevance() -> None:
    """Against autograd through the distances between the features."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(9, 4, 3, 2, generator=generator, dtype=torch.float64)
    labels = torch.arange(9) % 3
    leaf = features.clone().requires_grad_()
    rows = leaf.flatten(1)
    squares = ((rows[:, None] - rows[None]) ** 2).sum(-1)
    distances = torch.where(torch.eye(9, dtype=torch.bool), 0.0, (squares + torch.eye(9)).sqrt())
    a, g = geometry.u_centered(distances), geometry.u_centered((labels[:, None] != labels).double())
    (gradient,) = torch.autograd.grad((a * g).sum() / (a.norm() * g.norm()), leaf)
    weights = gradient.mean((2, 3))
    expected = (weights[..., None, None] * features).sum(1).relu()
    assert torch.allclose(planted.relevance_maps(features, labels), expected, rtol=1e-9, atol=1e-12)


def test_contrasts_of_a_network_with_itself_are_zero() -> None:
    maps = torch.rand(4, 3, 3, generator=torch.Generator().manual_seed(1))
    assert not planted._contrast(maps, maps).any()
    assert abs(float(planted._contrast(maps, 7 * maps.flip(0)).sum())) < 1e-5


def test_the_stored_result_is_complete_and_its_decompositions_add_up() -> None:
    record = planted_tables.stored()
    runs = {(run["case"], run["seed"]): run for run in record["runs"]}
    assert set(runs) == {(case, seed) for case in planted.CASES for seed in range(planted.SEEDS)}
    for run in runs.values():
        for layer in planted.LAYERS:
            scores, maps = run["layers"][layer]["scores"], run["layers"][layer]["maps"]
            assert maps["decomposition of RS(S)"]["total"] == pytest.approx(scores["RS(S)"], abs=1e-4)
            assert maps["decomposition of RS(S|B)"]["total"] == pytest.approx(scores["RS(S|B)"], abs=1e-4)
            assert maps["decomposition of RS(S) − RS(B)"]["total"] == pytest.approx(scores["RS(S)"] - scores["RS(B)"], abs=1e-4)


def test_the_difference_was_planted() -> None:
    """In every stored run, a network knows the cue if and only if it was trained with it; every network knows the glyph."""
    for run in planted_tables.stored()["runs"]:
        case = planted.CASES[run["case"]]
        for role, knows in (("student", case.student_knows), ("base", case.base_knows)):
            accuracies = run["accuracy"][role]
            assert accuracies["cue"] > 0.9 if knows else accuracies["cue"] < 0.3, (run["case"], run["seed"], role)
            assert accuracies["glyph"] > 0.7 and accuracies["both"] > 0.95


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_decomposition_of_the_gain_shows_a_planted_texture() -> None:
    with ambient.torch_threads(1):
        run = planted.measure(planted.CASES["texture"], 0)
    assert run["accuracy"]["student"]["cue"] > 0.9 and run["accuracy"]["base"]["cue"] == pytest.approx(1 / 6, abs=0.1)
    assert all(run["accuracy"][role]["glyph"] > 0.9 for role in ("student", "base"))
    for layer in planted.LAYERS:
        scores, maps = run["layers"][layer]["scores"], run["layers"][layer]["maps"]
        gain = maps["decomposition of RS(S) − RS(B)"]
        assert gain["density planted"] > 2 * gain["density common"] and gain["sum planted"] > gain["sum common"]
        assert gain["total"] == pytest.approx(scores["RS(S)"] - scores["RS(B)"], abs=1e-4)
    last = run["layers"]["layer3"]["maps"]
    assert last["decomposition of RS(S) − RS(B)"]["peak planted"] > 0.9
    # Conditioning on the base hardly changes UniCAM's map, because the base has little relevance beyond the student's.
    conditional, alone = last["UniCAM S|B, relevance, gap"], last["UniCAM of S alone"]
    assert conditional["density planted"] == pytest.approx(alone["density planted"], rel=0.1)

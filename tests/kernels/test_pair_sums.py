"""Sums over pairs are the same from blocks of a tile, as on a CPU, and from indicators of the parts, as on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kdx.kernels.pair_sums import Division, PairSums, indicated_products, indicator, part_products
from tests.kernels.inputs import EXACT, matrices
from tests.oracle import error


@pytest.mark.parametrize(("sizes", "parts"), [((7, 7, 5), 4), ((10,), 3), ((4, 4, 4, 3), 15)])
def test_products_and_rows_are_the_same_on_both_devices(sizes: tuple[int, ...], parts: int) -> None:
    n = sum(sizes)
    d = matrices(1, 3, n)[0]
    tiles = list(torch.arange(n).split(sizes))
    division = Division.of(tiles, parts)
    sums = PairSums(division, len(d))
    for a, rows in enumerate(tiles):
        for b in range(a, len(tiles)):
            tile = d[:, rows][:, :, tiles[b]]
            left, right = division.parts[a], division.parts[b]
            expected = part_products(tile, left, right)
            indicators = [indicator(each).double() for each in (left, right)]
            assert error(indicated_products(tile, *indicators), expected) < EXACT
            assert error(tile @ indicators[1], torch.stack([tile[:, :, place].sum(2) for place in right.values()], 2)) < EXACT
            sums.add(a, b, tile)
    assert error(sums.totals[0], torch.einsum("aij,bij->ab", d, d)) < EXACT
    assert error(sums.totals[1], d.sum(2)) < EXACT


def test_a_tile_on_a_gpu_is_added_with_indicators(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor that claims to be on a GPU takes that path; the sums are those of the CPU."""

    class OnGpu(torch.Tensor):
        @property
        def device(self) -> Any:  # type: ignore[override]
            return torch.device("cuda")

    n = 12
    d = matrices(1, 2, n)[0]
    tiles = list(torch.arange(n).split(5))
    results = []
    for kind in (torch.Tensor, OnGpu):
        monkeypatch.setattr(PairSums, "_indicator", lambda self, tile, like: indicator(self.division.parts[tile]).double())
        sums = PairSums(Division.of(tiles, 4), len(d))
        for a, rows in enumerate(tiles):
            for b in range(a, len(tiles)):
                sums.add(a, b, d[:, rows][:, :, tiles[b]].as_subclass(kind))
        results.append((sums.pairs.as_subclass(torch.Tensor), sums.rows.as_subclass(torch.Tensor)))
    for ours, theirs in zip(*results, strict=True):
        assert error(ours, theirs) < EXACT

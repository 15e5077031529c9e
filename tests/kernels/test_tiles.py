"""Inner products over many images in tiles, against whole matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import dcor
import numpy as np
import pytest
import torch
import zarr
from torch import Tensor

import kdx
from kdx.features.rows import InMemory
from kdx.kernels import geometry, moments, tiles
from kdx.kernels.dispatch import TorchBackend
from kdx.kernels.tiles import ClassDistances, FeatureDistances
from tests import oracle
from tests.kernels.test_moments import moments_by_centring

CLASSES = 5


@dataclass(frozen=True)
class Stored(InMemory):
    """Rows in memory that record what was read."""

    run: int = 1
    reads: list[Tensor] = field(default_factory=list)

    def read(self, index: Tensor) -> Tensor:
        self.reads.append(index)
        return super().read(index)


def rows(n: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Two related sets of rows and labels; one image is far from the others, and two images are equal."""
    x, y, labels = oracle.features(n=n, classes=CLASSES)
    x, y = x.flatten(1), y.flatten(1)
    x[0] *= 10
    x[3] = x[2]
    return x.to(dtype), y.to(dtype), labels


def matrices(n: int, dtype: torch.dtype = torch.float64) -> list[tiles.Matrix]:
    x, y, labels = rows(n, dtype)
    return [FeatureDistances.of(Stored(x)), FeatureDistances.of(Stored(y)), ClassDistances(labels)]


def whole(n: int, dtype: torch.dtype = torch.float64, biased: bool = False, part: Tensor | None = None) -> Tensor:
    """The centred matrices [3, n, n] of all images, or of a part of them."""
    x, y, labels = rows(n, dtype)
    d = torch.stack([geometry.distances(each) for each in (x, y, torch.nn.functional.one_hot(labels).double())])
    if part is not None:
        d = d[:, part][:, :, part]
    return geometry.double_centered(d) if biased else geometry.u_centered(d)


def inner(a: Tensor, biased: bool) -> Tensor:
    n = a.shape[-1]
    return geometry.products(a) * (n - 3) / n if biased else geometry.products(a)


def ordered(n: int, side: int, permutations: int, seed: int, run: int = 1) -> tuple[Tensor, Tensor]:
    """The images in the order of `tiles.Sweep`, and its permutations [p, n], from the same random numbers."""
    generator = torch.Generator().manual_seed(seed)
    parts = tiles.shuffled_tiles(n, side, run, generator)
    turns = [torch.randint(len(part), (permutations,), generator=generator) for part in parts]
    permuted = torch.empty(permutations, n, dtype=torch.int64)
    for p in range(permutations):
        for part, turn in zip(parts, turns, strict=True):
            permuted[p, part] = part.roll(-int(turn[p]))
    return torch.cat(parts), permuted


@pytest.fixture
def set_side(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the number of images per side of a tile."""
    return lambda side: monkeypatch.setattr(tiles, "tile_side", lambda n, rows: side)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("n", "side"), [(50, 16), (33, 33), (101, 64), (19, 6), (4, 4)])
def test_products_are_those_of_whole_matrices(n: int, side: int, biased: bool, set_side: Callable[[int], None]) -> None:
    set_side(side)
    swept = tiles.Sweep(matrices(n), biased=biased).run()
    assert oracle.error(swept.products, inner(whole(n, biased=biased), biased)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_products_of_narrow_rows(dtype: torch.dtype, set_side: Callable[[int], None]) -> None:
    """Against matrices of the same rounded rows: the tiles add only the rounding of float32."""
    set_side(32)
    swept = tiles.Sweep(matrices(101, dtype)).run()
    assert oracle.error(swept.products, inner(whole(101, dtype), False)) < 1e-6


@pytest.mark.parametrize("biased", [False, True])
def test_moments_are_those_of_parts_of_the_images(biased: bool, set_side: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    n = 53
    set_side(16)
    monkeypatch.setattr(moments, "PARTS", 7)
    swept = tiles.Sweep(matrices(n), biased=biased, seed=3).run().moments
    order, _ = ordered(n, 16, 0, 3)
    parts = [slice(part * n // 7, (part + 1) * n // 7) for part in range(7)]
    expected = moments_by_centring(lambda part: inner(whole(n, biased=biased, part=order[part]), biased), n, parts)
    assert swept.parts == 7
    for name, value in expected.items():
        assert oracle.error(getattr(swept, name), value) < 1e-10, name


@pytest.mark.parametrize("biased", [False, True])
def test_turned_tiles_are_permuted_images(biased: bool, set_side: Callable[[int], None]) -> None:
    n, side, count = 53, 16, 6
    set_side(side)
    swept = tiles.Sweep(matrices(n), permuted=[1, 2], permutations=count, biased=biased, seed=5).run()
    _, permutations = ordered(n, side, count, 5)
    assert len({tuple(p.tolist()) for p in permutations}) == count
    a = whole(n, biased=biased)
    for permuted in (1, 2):
        for p in range(count):
            turned = a.clone()
            turned[permuted] = a[permuted][permutations[p]][:, permutations[p]]
            expected = inner(turned, biased)[permuted]
            others = [i for i in range(3) if i != permuted]
            assert oracle.error(swept.permuted[permuted][p, others], expected[others]) < 1e-11


def test_rows_are_in_random_order_and_runs_in_one_tile() -> None:
    parts = tiles.shuffled_tiles(1003, 320, 20, torch.Generator().manual_seed(0))
    assert sorted(torch.cat(parts).tolist()) == list(range(1003))
    assert [len(part) for part in parts] == [320, 320, 320, 43]
    assert len(parts[0].div(20, rounding_mode="floor").unique()) <= 17  # sixteen runs and the short run
    for part in parts[:3]:
        assert not torch.equal(part, part.sort().values)
    pieces = tiles.shuffled_tiles(1000, 320, 1000, torch.Generator().manual_seed(0))[0]
    assert len(pieces.div(20, rounding_mode="floor").unique()) == 16  # one long run is divided into sixteen pieces


def test_the_order_on_disk_does_not_matter(tmp_path: Path) -> None:
    """Related features are recognised even if they are stored class by class, in chunks of one class, as folders of classes give them."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(1024) // 256
    x = torch.nn.functional.one_hot(labels, 8) + torch.randn(1024, 8, generator=generator)
    stored = zarr.create_array(tmp_path / "x", shape=(1024, 8), chunks=(256, 8), dtype="f4")
    stored[:] = x.numpy()
    assert kdx.rs(stored, labels).p_value == 0.001
    on_disk, in_memory = kdx.rs(stored, labels).interval, kdx.rs(x, labels).interval
    assert on_disk[1] - on_disk[0] == pytest.approx(in_memory[1] - in_memory[0], rel=0.7)


@pytest.mark.parametrize("n", [256, 257, 1100])
def test_permutations_that_change_nothing_tie(n: int) -> None:
    """One class has three images, and features only separate even from odd images: many permutations give exactly the same geometry."""
    x = torch.zeros(n, 3)
    x[::2] = torch.tensor([0.3, -1.7, 0.9])
    labels = torch.zeros(n, dtype=torch.int64)
    labels[[0, 2, 4]] = 1
    assert kdx.rs(x, labels, permutations=1999).p_value == pytest.approx(0.25, abs=0.05)  # (1/2)^2, all three even or all odd


@pytest.mark.parametrize("far", [1e3, 1e5])
def test_one_image_far_from_all_others_does_not_drown_them(far: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 32, generator=generator, dtype=torch.float64)
    y = x + torch.randn(300, 32, generator=generator, dtype=torch.float64)
    x[7] *= far
    y[7] *= far
    assert kdx.fss(x.float(), y.float(), permutations=0).value == pytest.approx(kdx.fss(x, y, permutations=0).value, abs=1e-4)


def test_equal_features_score_one() -> None:
    x = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
    score = kdx.fss(x, 3 * x, permutations=0)
    assert score.value == pytest.approx(1, abs=1e-9) and score.interval == pytest.approx((1, 1), abs=1e-6)


def test_only_tiles_of_rows_are_read_at_a_time(set_side: Callable[[int], None]) -> None:
    x, y, _ = rows(200)
    a, b = Stored(x), Stored(y)
    measured = [FeatureDistances.of(a), FeatureDistances.of(b)]
    a.reads.clear()
    set_side(32)
    tiles.Sweep(measured).run()
    assert max(map(len, a.reads)) == 32
    assert len(a.reads) == 7 * 8 // 2  # each tile's rows once, and its columns once per tile above the diagonal


def test_a_tile_shrinks_if_rows_are_long() -> None:
    wide = Stored(torch.zeros(4096, 1))
    assert tiles.tile_side(4096, [wide]) == tiles.TILE
    long = Stored(torch.zeros(1, 1).expand(4096, 400_000))
    side = tiles.tile_side(4096, [long, long])
    assert 16 <= side < tiles.TILE and 4 * 400_000 * 4 * side <= 1 << 28
    assert tiles.tile_side(600, [wide]) == 128  # four tiles at least, to turn


def test_tiles_are_larger_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer of 2,048 x 7 x 7 in two networks."""
    long = Stored(torch.zeros(1, 1).expand(4096, 100_352))
    on_cpu = tiles.tile_side(4096, [long, long])
    monkeypatch.setattr(Stored, "device", torch.device("cuda"))
    assert tiles.tile_side(4096, [long, long]) == 4 * on_cpu == 512


def test_turns_permute_small_sets_in_many_ways() -> None:
    """A p-value cannot be less than one over the number of permutations: the product of the sizes of the tiles."""
    for n in range(16, 100):
        side = tiles.tile_side(n, [Stored(torch.zeros(n, 1))])
        sizes = [len(part) for part in torch.arange(n).split(side)]
        assert len(sizes) >= 4 and np.prod(sizes, dtype=float) >= 256


def test_classes_are_their_one_hot_rows(set_side: Callable[[int], None]) -> None:
    set_side(16)
    _, _, labels = rows(40)
    embedding = torch.randn(CLASSES, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for rows_, classes in (
        (torch.nn.functional.one_hot(labels).double(), ClassDistances(labels)),
        (embedding[labels], ClassDistances(labels, geometry.distances(embedding))),
    ):
        d = geometry.distances(rows_)
        index = torch.tensor([[3, 9, 1], [20, 21, 39]])
        assert oracle.error(classes.batches(index, TorchBackend()), torch.stack([d[i][:, i] for i in index])) < 1e-12
        assert oracle.error(classes.means(), d.mean(1)) < 1e-12
        assert float(classes.scale) == pytest.approx(float(d.square().mean()), rel=1e-12)
        by_rows = tiles.Sweep([matrices(40)[0], FeatureDistances.of(Stored(rows_))]).run().products
        assert oracle.error(tiles.Sweep([matrices(40)[0], classes]).run().products, by_rows) < 1e-12


def test_measured_rows() -> None:
    x, _, _ = rows(50)
    x[7, 3], x[11] = torch.nan, torch.inf
    distances = FeatureDistances.of(Stored(x))
    assert torch.nonzero(~distances.norms.isfinite()).flatten().tolist() == [7, 11]
    finite = FeatureDistances.of(Stored(x[20:]))
    assert oracle.error(finite.norms, (x[20:] - finite.centre).square().sum(1)) < 1e-12
    assert float(finite.scale) >= float(geometry.distances(x[20:]).square().mean())


def test_batches_turned_together_are_permuted_batches() -> None:
    x, y, labels = rows(48)
    generator = torch.Generator().manual_seed(0)
    index = torch.randperm(48, generator=generator).view(4, 12)
    d = torch.stack(
        [
            each.batches(index, TorchBackend())
            for each in (FeatureDistances.of(Stored(x)), FeatureDistances.of(Stored(y)), ClassDistances(labels))
        ],
        1,
    )
    centred = geometry.u_centered(d)
    turns = torch.randint(12, (5, 4), generator=generator)
    for permuted in range(3):
        expected = torch.stack(
            [
                torch.stack(
                    [
                        torch.stack([geometry.dot(a, b[permuted].roll((-int(turn), -int(turn)), (0, 1))) for a in b])
                        for b, turn in zip(centred, row, strict=True)
                    ]
                ).sum(0)
                for row in turns
            ]
        ) / (12 * 9)
        assert oracle.error(tiles.turned_products(centred, permuted, turns), expected) < 1e-12


def test_matrices_of_different_images_are_refused() -> None:
    with pytest.raises(ValueError, match="images"):
        tiles.Sweep([matrices(20)[0], matrices(21)[1]]).run()


@pytest.mark.slow
def test_a_thousand_images_agree_with_dcor() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1000, 64))
    y = x @ rng.normal(size=(64, 64)) / 16 + rng.normal(size=(1000, 64))
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        measured = [FeatureDistances.of(Stored(torch.from_numpy(each).to(dtype))) for each in (x, y)]
        for biased, expected in ((False, dcor.u_distance_correlation_sqr(x, y)), (True, dcor.distance_correlation_sqr(x, y))):
            products = tiles.Sweep(measured, biased=biased).run().products
            assert float(products[0, 1] / (products[0, 0] * products[1, 1]).sqrt()) == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("n", [127, 300])
def test_many_rows_with_themselves_have_the_distances_of_single_products(n: int) -> None:
    """On the CPU more than 128 rows are halved, and each half is multiplied with the other once."""
    x = torch.randn(n, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    norms = x.square().sum(1)
    distances = geometry.centred_distances(x, x, norms, norms)
    assert torch.allclose(distances, torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist"), atol=1e-12)
    assert torch.equal(distances, distances.T) and not distances.diagonal().any()


def test_rows_are_centred_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "_READ", 100)  # three rows of eight float32 numbers
    rows = InMemory(torch.randn(50, 8, generator=torch.Generator().manual_seed(0)).half().float())
    matrix, index = tiles.FeatureDistances.of(rows), torch.randperm(50)[:20]
    assert torch.equal(tiles.RowBuffer().centred(matrix, index), rows.tensor[index] - matrix.centre)
    assert torch.allclose(matrix.norms, (rows.tensor - matrix.centre).double().square().sum(1), rtol=1e-6)

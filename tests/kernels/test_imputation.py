"""Linear imputation against the published code and a dense solution, its properties, and its kernels against PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from kdx.errors import KdxError
from kdx.kernels import imputation, multigrid, reference, stencils
from kdx.kernels.imputation import impute
from kdx.kernels.multigrid import PixelGrid
from kdx.kernels.stencils import COLOURS, OFFSETS
from tests import oracle
from tests.host import ORDERS, HostLauncher, KernelError, Order, broken, running

# The tolerance of impute, and the rounding of images to 11 and 8 bits.
WITHIN = 5e-5
TOLERANCE = {torch.float64: WITHIN, torch.float32: WITHIN, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def scattered(n: int, h: int, w: int, share: float, seed: int = 0) -> Tensor:
    """Masks [n, h, w] that keep each pixel with probability ``share``, and always the first pixel."""
    kept = torch.rand(n, h, w, generator=torch.Generator().manual_seed(seed)) < share
    kept[:, 0, 0] = True
    return kept


def salient(n: int, h: int, w: int, share: float = 0.5, side: int = 7, seed: int = 0) -> Tensor:
    """The top ``share`` of a bilinearly resized coarse random map."""
    coarse = torch.rand(n, 1, side, side, generator=torch.Generator().manual_seed(seed))
    maps = torch.nn.functional.interpolate(coarse, (h, w), mode="bilinear")[:, 0]
    return maps > maps.flatten(1).quantile(1 - share, dim=1)[:, None, None]


def corners(n: int, h: int, w: int) -> Tensor:
    """Masks that keep two opposite corners: the largest hole whose solution is not constant."""
    kept = torch.zeros(n, h, w, dtype=torch.bool)
    kept[:, 0, 0] = kept[:, -1, -1] = True
    return kept


def images(n: int, h: int, w: int, c: int = 3, seed: int = 1) -> Tensor:
    return torch.rand(n, c, h, w, generator=torch.Generator().manual_seed(seed))


def residual(x: Tensor, kept: Tensor) -> Tensor:
    """The largest difference between a pixel that is not kept and the mean of its neighbours, [n], in float64."""
    kernel = torch.tensor([[1.0, 2, 1], [2, 0, 2], [1, 2, 1]], dtype=torch.float64)[None, None] / 12
    flat = x.double().flatten(0, 1)[:, None]
    mean = torch.nn.functional.conv2d(flat, kernel, padding=1) / torch.nn.functional.conv2d(torch.ones_like(flat), kernel, padding=1)
    return ((mean - flat).reshape(x.shape) * ~kept[:, None]).abs().amax((1, 2, 3))


@pytest.mark.parametrize("case", range(4))
def test_published_imputed_pixels(case: int) -> None:
    known = {name: torch.from_numpy(value) for name, value in oracle.load(str(case), "imputation").items()}
    imputed = impute(known["image"][None], known["mask"][None] > 0)
    assert float((imputed[0].double() - known["imputed"]).abs().max()) < 1e-4


@pytest.mark.parametrize("mask", [partial(scattered, share=0.5), partial(scattered, share=0.03), salient, corners])
@pytest.mark.parametrize(("h", "w"), [(19, 23), (1, 37), (31, 1), (2, 17), (24, 16), (1, 2), (3, 3)])
def test_agrees_with_the_dense_solution(mask: Callable[..., Tensor], h: int, w: int) -> None:
    kept, x = mask(3, h, w), images(3, h, w)
    kept[:, 0, 0] = True
    expected = torch.stack([reference.imputed(*pair) for pair in zip(x, kept, strict=True)])
    assert float((impute(x, kept) - expected).abs().max()) < WITHIN
    assert float((impute(x.double(), kept, tolerance=1e-12) - expected).abs().max()) < 1e-11


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.99])
@pytest.mark.parametrize("mask", [scattered, salient])
def test_the_equations_hold_at_the_size_of_a_photograph(mask: Callable[..., Tensor], share: float) -> None:
    """The equations hold within rounding in float64, and float32 gives the same solution."""
    kept, x = mask(2, 224, 224, share), images(2, 224, 224, c=1)
    exact = impute(x.double(), kept, tolerance=1e-13)
    assert float(residual(exact, kept).max()) < 1e-13
    assert float((impute(x, kept) - exact).abs().max()) < WITHIN


def test_a_hole_of_half_a_million_pixels() -> None:
    """The rounding of float32 pixels alone would leave an error of a thousandth here."""
    kept, x = corners(1, 512, 512), images(1, 512, 512, c=1)
    kept[0, 0, 200] = True
    exact = impute(x.double(), kept, tolerance=1e-12)
    assert float(residual(exact, kept).max()) < 1e-12
    assert float((impute(x, kept) - exact).abs().max()) < WITHIN


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_types_and_kept_pixels(dtype: torch.dtype) -> None:
    kept, x = salient(3, 45, 38), images(3, 45, 38).to(dtype)
    imputed = impute(x.transpose(2, 3).contiguous().transpose(2, 3), kept)
    assert imputed.dtype == dtype and imputed.shape == x.shape
    assert torch.equal(imputed.masked_select(kept[:, None]), x.masked_select(kept[:, None]))
    assert float((imputed.double() - impute(x.double(), kept)).abs().max()) < TOLERANCE[dtype]


def test_all_pixels_kept() -> None:
    x = images(2, 9, 14)
    assert torch.equal(impute(x, torch.ones(9, 14, dtype=torch.bool)), x)


def test_imputed_pixels_are_between_kept_pixels() -> None:
    kept, x = salient(4, 61, 50, share=0.2), images(4, 61, 50)
    low = x.masked_fill(~kept[:, None], 2).amin((2, 3), keepdim=True)
    high = x.masked_fill(~kept[:, None], -2).amax((2, 3), keepdim=True)
    imputed = impute(x, kept)
    assert bool(((imputed >= low - WITHIN) & (imputed <= high + WITHIN)).all())


def test_the_solution_is_linear_in_the_kept_pixels_and_independent_of_the_others() -> None:
    kept, x, y = salient(2, 40, 33), images(2, 40, 33), images(2, 40, 33, seed=2)
    assert float((impute(2 * x - 3 * y, kept) - (2 * impute(x, kept) - 3 * impute(y, kept))).abs().max()) < 6 * WITHIN
    assert torch.equal(impute(x.where(kept[:, None], y), kept), impute(x, kept).where(~kept[:, None], x))
    assert float((impute(1e4 * x, kept) / 1e4 - impute(x, kept)).abs().max()) < WITHIN


def test_single_images_and_channels_give_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, x = torch.cat([salient(3, 50, 41), scattered(2, 50, 41, 0.02)]), images(5, 50, 41)
    whole = impute(x, kept)
    alone = torch.cat([impute(x[i : i + 1, j : j + 1], kept[i]) for i in range(5) for j in range(3)]).reshape(x.shape)
    assert float((whole - alone).abs().max()) < WITHIN
    monkeypatch.setattr(stencils, "_VALUES", 3 * 2 * 26 * 22)  # two images at a time in a pass, and then one
    assert float((impute(x, kept) - whole).abs().max()) < WITHIN
    monkeypatch.setattr(imputation, "_VALUES", 2 * 3 * 50 * 41)  # the same in a solution
    assert float((impute(x, kept) - whole).abs().max()) < WITHIN


def test_noise() -> None:
    kept, x = salient(3, 64, 64), images(3, 64, 64)
    plain, noisy = impute(x, kept), impute(x, kept, noise=0.1, seed=4)
    assert torch.equal(noisy, impute(x, kept, noise=0.1, seed=4))
    assert not torch.equal(noisy, impute(x, kept, noise=0.1, seed=5))
    added = noisy - plain
    assert float(added.masked_select(kept[:, None]).abs().max()) == 0
    drawn = added.masked_select(~kept[:, None])
    assert abs(float(drawn.mean())) < 4 * 0.1 / len(drawn) ** 0.5
    assert float(drawn.std()) == pytest.approx(0.1, rel=4 / (2 * len(drawn)) ** 0.5)
    assert float(added[:, 0].flatten() @ added[:, 1].flatten() / (drawn.std() ** 2 * len(drawn) / 3)) == pytest.approx(0, abs=0.05)


def test_mistakes() -> None:
    x, kept = images(3, 8, 9), scattered(3, 8, 9, 0.5)
    infinite = x.clone()
    infinite[1, 2, 3, 4] = torch.nan
    empty = kept.clone()
    empty[0] = empty[2] = False
    for arguments, options, words in (
        ((x[0], kept), {}, r"shape \[3, 8, 9\]"),
        ((x.int(), kept), {}, "int32"),
        ((x[:0], kept[:0]), {}, "at least one image"),
        ((x, kept[:2]), {}, r"shape \[2, 8, 9\].*\[3, 8, 9\]"),
        ((x, kept.float()), {}, "float32"),
        ((x, kept.to("meta")), {}, "on cpu and the mask is on meta"),
        ((infinite, kept), {}, "not finite in image 1"),
        ((x, empty), {}, "images 0, 2 keeps no pixel"),
        ((x, kept), {"noise": -1.0}, "negative"),
        ((x, kept), {"noise": float("nan")}, "negative"),
        ((x, kept), {"tolerance": 0.0}, "not positive"),
        ((x, kept), {"tolerance": 1e-12}, "images? 0.*come within 1e-12"),
    ):
        with pytest.raises(KdxError, match=f"(?s){words}"):
            impute(*arguments, **options)  # type: ignore[arg-type]


def test_coarse_matrices_are_galerkin_products() -> None:
    """Against P^T A P with full matrices."""
    h, w, rows, columns = 19, 22, 10, 11
    unknown = (~scattered(1, h, w, 0.2)).double()
    layout = stencils.Layout(1, h, w)
    sums = stencils.weight_sum(h, w, unknown)
    scale = stencils.at_the_end(layout.zeros(like=unknown).split(unknown))
    diagonal = layout.zeros(like=unknown).split(sums[None])
    coarse = stencils.galerkin([diagonal, 1 / 6, 1 / 12, 1 / 6, 1 / 12], scale)[:, 0]

    y, x = torch.cartesian_prod(torch.arange(h), torch.arange(w)).T
    i, j = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).T
    apart = (y[:, None] - y).abs() + (x[:, None] - x).abs() * 1j
    weights = torch.zeros(h * w, h * w, dtype=torch.float64)
    for far, weight in ((1, 1 / 6), (1j, 1 / 6), (1 + 1j, 1 / 12)):
        weights[apart == far] = weight
    matrix = torch.diag(weights.sum(1)) - weights
    tent = (1 - (y[:, None] - 2 * i).abs() / 2).clamp_min(0) * (1 - (x[:, None] - 2 * j).abs() / 2).clamp_min(0)
    prolongation = scale.merge(torch.empty_like(unknown)).reshape(-1, 1) * tent
    expected = prolongation.T @ matrix @ prolongation

    steps = (i - i[:, None]), (j - j[:, None])
    for entry, (row, column) in zip(coarse, OFFSETS, strict=True):
        coupled = (steps[0] == row) & (steps[1] == column)
        here = coupled.any(1)
        sign = 1 if (row, column) == (0, 0) else -1
        assert oracle.error(sign * entry.flatten()[here], expected[coupled]) < 1e-14
        assert float(entry.flatten()[~here].abs().sum()) == 0
    beyond = (steps[0].abs() > 1) | (steps[1].abs() > 1)
    assert float(expected[beyond].abs().max()) == 0


# ---- kernels ----


def pair(launcher: HostLauncher, dtype: torch.dtype = torch.float32) -> list[PixelGrid]:
    """The same grids in PyTorch and on kernels, filled with the same random numbers; odd and even sizes, two coarse grids."""
    unknown = (~scattered(2, 37, 34, 0.3)).to(dtype)
    grids = [PixelGrid(unknown, 3), PixelGrid(unknown, 3, launcher)]
    for grid in grids:
        generator = torch.Generator().manual_seed(0)
        level: object = grid
        while isinstance(level, multigrid.Grid):
            shape = (3, 2, level.layout.height, level.layout.width)
            for planes in (level.u, level.f):
                planes.split(torch.rand(shape, generator=generator, dtype=dtype))
            level = level.coarser
    return grids


def difference(expected: multigrid.Grid, actual: multigrid.Grid) -> float:
    """The largest error after each step of a cycle: relaxation of every colour, restriction, correction."""
    (images,), worst = actual.parts, 0.0
    for colour in COLOURS:
        expected.relax(images, colour)
        actual.relax(images, colour)
        worst = max(worst, oracle.error(actual.u.data, expected.u.data))
    worst = max(worst, oracle.error(actual.restrict(images), expected.restrict(images)))
    expected.correct(images)
    actual.correct(images)
    return max(worst, oracle.error(actual.u.data, expected.u.data))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_kernels_agree_with_pytorch(order: Order, dtype: torch.dtype) -> None:
    expected, actual = pair(HostLauncher(order), dtype)
    tolerance = 50 * torch.finfo(dtype).eps
    assert difference(expected, actual) < tolerance
    assert difference(expected.coarser, actual.coarser) < tolerance  # type: ignore[arg-type]


@pytest.mark.parametrize(("h", "w", "share", "order"), [(19, 15, 0.1, "shuffled"), (7, 12, 0.5, "reverse")])
def test_imputation_by_kernels(h: int, w: int, share: float, order: Order) -> None:
    kept, x = scattered(2, h, w, share), images(2, h, w)
    with running(HostLauncher(order)):
        imputed = impute(x, kept)
    expected = torch.stack([reference.imputed(*pair) for pair in zip(x, kept, strict=True)])
    assert float((imputed - expected).abs().max()) < WITHIN
    assert torch.equal(imputed.masked_select(kept[:, None]), x.masked_select(kept[:, None]))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("correction[at.own(1, 2)]", "correction[at.own(1, 0)]"),
        ("weight(at, 2, a - 1, b + 1)", "weight(at, 2, a - 1, b)"),
        ("at.moved(-1, 0)", "at.moved(1, 0)"),
        ("if (cell >= cells) return;", ""),
    ],
)
def test_a_broken_kernel_is_detected(old: str, new: str) -> None:
    expected, actual = pair(broken("imputation", old, new))
    try:
        worst = max(difference(expected, actual), difference(expected.coarser, actual.coarser))  # type: ignore[arg-type]
    except KernelError:
        return
    assert worst > 1e-3

"""FSS and RS: how alike two networks' features are, and how relevant to the task, with their uncertainty.

Everything here is a function of inner products of centred distance matrices. Over batches the inner products are
summed and one ratio taken at the end (the mean of ratios would be biased). Intervals come from a jackknife: over batches where
there are several; over images where there is one set of up to 256, whose matrices are held; over random parts of the images where
there are more. p-values come from permutations of the images.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import index

import numpy as np
import torch
from torch import Tensor

from kdx.errors import KdxError
from kdx.features import arrays
from kdx.features.arrays import Array
from kdx.features.rows import feature_distances
from kdx.features.target import target_array, target_embedding, target_matrix
from kdx.kernels import dispatch, geometry, tiles
from kdx.kernels.cuda import Backend
from kdx.kernels.tiles import Rows
from kdx.roles import TARGET
from kdx.scores.score import Estimator
from kdx.scores.uncertainty import permutation_products, permutation_table

_HELD = 256
"""Up to so many images, matrices of all pairs are held; past it they are made in tiles."""

_BYTES = 1 << 27
"""Memory that batches take at once."""


@dataclass(frozen=True)
class InnerProducts:
    """What scores are made of: inner products of k centred matrices of n images, summed over batches where there are several.

    names [k]: of the matrices. products [k, k]; left_out [units, k, k]: without each image, part of the images or batch; permuted: a
    matrix whose images are permuted -> its products [p, k] with the others. raw [k]: <D,D> of the distances themselves; rounding [k]: of
    them, as a share.
    """

    names: tuple[str, ...]
    n: int
    batches: int
    products: Tensor
    left_out: Tensor
    permuted: dict[str, Tensor]
    raw: Tensor
    rounding: Tensor


def inner_products(
    named: Mapping[str, Rows | Array],
    permuted: Collection[str],
    *,
    estimator: Estimator = "unbiased",
    batch: int | None = None,
    permutations: int = 999,
    seed: int = 0,
    backend: Backend = "auto",
) -> InnerProducts:
    """Inner products of features by name and, under TARGET, labels or an embedding; arguments and errors are those of `fss` and `rs`."""
    if estimator not in ("unbiased", "biased"):
        raise ValueError(f"estimator must be 'unbiased' or 'biased', not {estimator!r}")
    permutations, seed, batch = index(permutations), index(seed), None if batch is None else index(batch)
    if permutations < 0:
        raise ValueError(f"permutations must be 0 or more, not {permutations}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"the seed must lie between 0 and 2^63, not {seed}")
    named = {name: target_array(each) if name == TARGET else each for name, each in named.items()}
    features = {name: rows for name, rows in named.items() if not isinstance(rows, Tensor | np.ndarray)}
    first, *others = features
    n, device, dtype = features[first].shape[0], torch.device(features[first].device), features[first].dtype
    arrays.check_images(n)
    for name in others:
        rows = features[name]
        arrays.check_same(rows.shape[0], n, name, first)
        if rows.device != device:
            raise KdxError(f"The {first} are on {device}, the {name} on {rows.device}.", "Move all of them to one device.")
        if rows.dtype != dtype:
            raise KdxError(f"The {first} are {dtype}, the {name} {rows.dtype}.", "Give all of them in one type.")
    ops = dispatch.chosen(torch.empty(0, dtype=dtype, device=device), backend)
    asked = _Asked(n, device, tuple(permuted), estimator == "biased", permutations, seed, ops)
    with torch.no_grad():
        if batch is not None and batch < n:
            return _batched(named, asked, batch)
        return _held(named, asked) if n <= _HELD else _swept(named, asked)


@dataclass(frozen=True)
class _Asked:
    n: int
    device: torch.device
    permuted: tuple[str, ...]
    biased: bool
    permutations: int
    seed: int
    ops: dispatch.TorchBackend


def _held(named: Mapping[str, Rows | Array], asked: _Asked) -> InnerProducts:
    """Of so few images that their matrices are held, in float64; the jackknife leaves out an image."""
    n, names = asked.n, tuple(named)
    everyone = torch.arange(n, device=asked.device)
    rows = [
        target_embedding(each, n).to(asked.device) if isinstance(each, Tensor | np.ndarray) else each.read(everyone)
        for each in named.values()
    ]
    d = torch.stack([arrays.measured(asked.ops.distances(each), each, name) for name, each in zip(names, rows, strict=True)])
    centred = geometry.double_centered(d) if asked.biased else geometry.u_centered(d)
    products = geometry.products(centred)
    table = permutation_table(n, asked.permutations, asked.seed, asked.device)
    return InnerProducts(
        names,
        n,
        1,
        products,
        geometry.leave_one_out(d, asked.biased) if n > arrays.MIN_IMAGES else products[None],
        {name: permutation_products(centred, d[i], centred[i], rows[i], table) for i, name in enumerate(names) if name in asked.permuted},
        geometry.products(d).diagonal(),
        torch.tensor([arrays.rounding(each) for each in rows], dtype=torch.float64, device=asked.device),
    )


def _swept(named: Mapping[str, Rows | Array], asked: _Asked) -> InnerProducts:
    """Of any number of images, in tiles; the jackknife leaves out one of `sweep.UNITS` random parts."""
    names, matrices, rounding = _matrices(named, asked)
    permuted = {name: names.index(name) for name in asked.permuted}
    found = tiles.sweep(
        matrices, permuted=[*permuted.values()], permutations=asked.permutations, biased=asked.biased, seed=asked.seed, ops=asked.ops
    )
    raw = torch.stack([each.scale for each in matrices]) * asked.n / (asked.n - 3)
    _check_varied(names, found.products, raw, rounding.clamp_min(1e-8))  # sums over tiles are known to 1e-16 of them
    moved_products = {name: found.permuted[place] for name, place in permuted.items()}
    return InnerProducts(names, asked.n, 1, found.products, found.left_out, moved_products, raw, rounding)


def _batched(named: Mapping[str, Rows | Array], asked: _Asked, size: int) -> InnerProducts:
    """Summed over random batches, as many at once as memory allows; the jackknife leaves out a batch.

    Images are dealt blindly. A batch of one class has no geometry to add, and adds none: run_errors it would bias the sum.
    """
    if size < arrays.MIN_IMAGES:
        raise KdxError(f"A batch of {size} is too small for pairwise geometry.", "Give 4 or more; scores are steady from 32 up.")
    if size > tiles.TILE:
        raise KdxError(
            f"A batch of {size} images would hold matrices of {size} x {size}.",
            f"Give {tiles.TILE} at most, or no batch: all images together are then taken in tiles.",
        )
    names, matrices, rounding = _matrices(named, asked)
    generator = np.random.default_rng(asked.seed)
    count = max(1, min(-(-asked.n // size), asked.n // arrays.MIN_IMAGES))
    shuffled = torch.from_numpy(generator.permutation(asked.n)).to(asked.device)
    batches = [shuffled[start::count] for start in range(count)]
    widths = [each.rows.shape[1] * 4 if isinstance(each, tiles.FeatureDistances) else 0 for each in matrices]
    products, raw = [], []
    permuted = {name: torch.zeros(asked.permutations, len(names), dtype=torch.float64, device=asked.device) for name in asked.permuted}
    for some in _alike(batches, sum(widths), len(names)):
        n = some.shape[1]
        d = torch.stack([each.batches(some, asked.ops) for each in matrices], 1)
        centred = geometry.double_centered(d) if asked.biased else geometry.u_centered(d)
        products.append(geometry.products(centred) if asked.biased else asked.ops.products(d))
        raw.append(geometry.products(d).diagonal(dim1=1, dim2=2))
        turns = torch.from_numpy(generator.integers(n, size=(asked.permutations, len(some)))).to(asked.device)
        for name, total in permuted.items():
            total += tiles.turned_products(centred, names.index(name), turns)
    each, whole = torch.cat(products), torch.cat(raw).sum(0)
    total = each.sum(0)
    _check_varied(names, total, whole, rounding)
    return InnerProducts(names, asked.n, len(each), total, total - each, permuted, whole, rounding)


def _alike(batches: Sequence[Tensor], width: int, matrices: int) -> Iterator[Tensor]:
    """Batches of one size as indices [b, n], as many at a time as memory allows."""
    for n in sorted({len(batch) for batch in batches}):
        alike = torch.stack([batch for batch in batches if len(batch) == n])
        yield from alike.split(max(1, _BYTES // (n * (width + matrices * n * 64))))


def _matrices(named: Mapping[str, Rows | Array], asked: _Asked) -> tuple[tuple[str, ...], list[tiles.Matrix], Tensor]:
    """(names, matrices, the rounding of each one's distances)."""
    matrices = [
        target_matrix(each, asked.n, asked.device) if isinstance(each, Tensor | np.ndarray) else feature_distances(each, name)
        for name, each in named.items()
    ]
    known = [(each.rows.dtype, each.rows.shape[1]) if isinstance(each, tiles.FeatureDistances) else (torch.float64, 1) for each in matrices]
    rounding = torch.tensor([arrays.rounding_of(*each) for each in known], dtype=torch.float64, device=asked.device)
    return tuple(named), matrices, rounding


def _check_varied(names: Sequence[str], products: Tensor, raw: Tensor, rounding: Tensor) -> None:
    for name, own, whole, share in zip(names, products.diagonal().tolist(), raw.tolist(), rounding.tolist(), strict=True):
        arrays.check_varied(own, whole, share, name)


def check_residual(found: InnerProducts, explained: int, given: int) -> None:
    """KdxError where the given matrix explains another up to rounding of their distances."""
    own, cross, norm = (found.products[pair] for pair in ((explained, explained), (explained, given), (given, given)))
    # A difference of inner products is known to 1e-16 of them, whatever the features' type.
    floor = torch.maximum(found.rounding.max() ** 2 * found.raw[explained], 1e-13 * own)
    if not bool(own - cross**2 / norm > floor):
        raise KdxError(
            f"Nothing is left of the {found.names[explained]} without what the {found.names[given]} explain.",
            "Compare two different networks or layers.",
        )

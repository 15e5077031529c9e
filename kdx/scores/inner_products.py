"""Inner products of centred distance matrices: all that FSS and RS are computed from, with their uncertainty.

Over batches, the inner products are summed and one ratio is taken at the end; the mean of ratios would be biased. Intervals come from the
moments of the inner products (see `kdx.kernels.moments`), which leave out images, or random parts of more than 256 images; with many
batches they come from the variation between batches. p-values come from permutations of the images.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import index

import numpy as np
import torch
from torch import Tensor

from kdx.errors import KdxError
from kdx.features import arrays
from kdx.features.arrays import Labels
from kdx.features.rows import feature_distances
from kdx.features.target import Target
from kdx.kernels import ambient, dispatch, geometry, moments, tiles
from kdx.kernels.cuda import Backend
from kdx.kernels.dispatch import BatchDistances
from kdx.kernels.moments import Influences, Moments
from kdx.kernels.one_against_rest import ClassMatrices, ClassSums
from kdx.kernels.tiles import Rows
from kdx.roles import TARGET
from kdx.scores.score import Estimator
from kdx.scores.uncertainty import MANY_BATCHES, permutation_table, pooled_moments

_ALL_PAIRS = 256
"""Up to this many images, matrices of all pairs are kept in memory; above, they are computed in tiles."""

_BYTES = 1 << 27
"""Memory for the batches that are computed at once."""


@dataclass(frozen=True)
class Sampling:
    """How scores and their uncertainty are estimated. The fields are the arguments of `fss`."""

    estimator: Estimator = "unbiased"
    batch: int | None = None
    permutations: int = 999
    confidence: float = 0.95
    seed: int = 0
    backend: Backend = "auto"


@dataclass(frozen=True, eq=False)
class InnerProducts:
    """Inner products of k centred matrices of n images, summed over batches if there are several.

    names [k]: of the matrices. products [k, k]. moments: of the products; None if too little is known.
    permuted: the name of each permuted matrix -> its products [p, k] with all of them. raw [k]: <D,D> of the distances themselves.
    rounding [k]: the rounding of the distances, relative to them. influences: of images, or parts of them, on the products; None for few
    images and in batches. classes: the products with one class against the rest; None unless classes were given.
    """

    names: tuple[str, ...]
    n: int
    batches: int
    products: Tensor
    moments: Moments | None
    permuted: dict[str, Tensor]
    raw: Tensor
    rounding: Tensor
    influences: Influences | None = None
    classes: ClassSums | ClassMatrices | None = None


@ambient.neutral()
def inner_products(
    named: Mapping[str, Rows | Labels],
    permuted: Collection[str],
    sampling: Sampling = Sampling(),
    classes: Tensor | None = None,
    sums: Iterable[Sequence[Tensor]] | None = None,
) -> InnerProducts:
    """Inner products of features by name and, under TARGET, of labels or an embedding. Errors are those of `fss` and `rs`.

    permuted: the names of the matrices whose images are permuted. classes [n]: the class of each image, as a number from 0, if
    `InnerProducts.classes` is wanted. sums: those of all blocks of `sweep_of`, or their total, if they are known.
    """
    inputs, plan = _prepared(named, permuted, sampling, classes)
    if plan.batch is not None:
        return _in_batches(inputs, plan, plan.batch)
    return _in_tiles(inputs, plan, sums) if plan.tiled else _of_all_pairs(inputs, plan)


@ambient.neutral()
def sweep_of(named: Mapping[str, Rows | Labels], permuted: Collection[str], sampling: Sampling = Sampling()) -> tiles.Sweep | None:
    """The sums from which `inner_products` of the same arguments follow; None for few images and for batches."""
    inputs, plan = _prepared(named, permuted, sampling, None)
    return _sweep(_matrices(inputs), tuple(inputs), plan) if plan.tiled else None


def block_count(named: Mapping[str, Rows | Labels], sampling: Sampling) -> int | None:
    """The number of blocks in the sweep that `sweep_of` returns; None where it returns none."""
    inputs, plan = _prepared(named, (), sampling, None)
    if not plan.tiled:
        return None
    sources = [source.matrix() if isinstance(source, Target) else source for source in inputs.values()]
    rows = [source.rows if isinstance(source, tiles.FeatureDistances) else source for source in sources]
    return tiles.block_count(plan.n, [each for each in rows if not isinstance(each, tiles.ClassDistances)])


def _prepared(
    named: Mapping[str, Rows | Labels], permuted: Collection[str], sampling: Sampling, classes: Tensor | None
) -> tuple[dict[str, _Input], _Plan]:
    estimator, batch, permutations, seed = sampling.estimator, sampling.batch, sampling.permutations, sampling.seed
    if estimator not in ("unbiased", "biased"):
        raise ValueError(f"estimator must be 'unbiased' or 'biased', not {estimator!r}")
    permutations, seed, batch = index(permutations), index(seed), None if batch is None else index(batch)
    if permutations < 0:
        raise ValueError(f"permutations must be 0 or more, not {permutations}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"the seed must lie between 0 and 2^63, not {seed}")
    features = {name: value for name, value in named.items() if name != TARGET and not isinstance(value, Tensor | np.ndarray | Sequence)}
    n, device, dtype = _common(features)
    ops = dispatch.chosen(torch.empty(0, dtype=dtype, device=device), sampling.backend)
    inputs = {
        name: features[name] if name in features else Target.of(value, n, device=device, backend=ops) for name, value in named.items()
    }
    batch = None if batch is None or batch >= n else batch
    return inputs, _Plan(n, device, tuple(permuted), estimator == "biased", permutations, seed, ops, batch, classes)


def _common(features: Mapping[str, Rows]) -> tuple[int, torch.device, torch.dtype]:
    """The number of rows, device and type that all features share. Raises KdxError if they differ, and for fewer than four images."""
    first, *others = features
    n, device, dtype = features[first].shape[0], torch.device(features[first].device), features[first].dtype
    arrays.check_images(n)
    for name in others:
        rows = features[name]
        arrays.check_same(rows.shape[0], n, name, first)
        arrays.check_same_device(torch.device(rows.device), device, name, first)
        if rows.dtype != dtype:
            raise KdxError(f"The {first} are {dtype}, and the {name} are {rows.dtype}.", "Give all of them in one type.")
    return n, device, dtype


@dataclass(frozen=True)
class _Plan:
    """What is computed, and with which backend."""

    n: int
    device: torch.device
    permuted: tuple[str, ...]
    biased: bool
    permutations: int
    seed: int
    ops: dispatch.TorchBackend
    batch: int | None
    classes: Tensor | None

    @property
    def tiled(self) -> bool:
        """Whether all pairs are computed, in tiles."""
        return self.batch is None and self.n > _ALL_PAIRS

    def centred(self, distances: BatchDistances) -> Tensor:
        """The centred matrices of the estimator."""
        return geometry.double_centered(distances.raw) if self.biased else distances.centred


_Input = Rows | Target


def _of_all_pairs(inputs: Mapping[str, _Input], plan: _Plan) -> InnerProducts:
    """From matrices of all pairs in float64, for few images."""
    n, names = plan.n, tuple(inputs)
    everyone = torch.arange(n, device=plan.device)
    rows = {name: source.rows if isinstance(source, Target) else source.read(everyone) for name, source in inputs.items()}
    distances = arrays.row_distances(rows, plan.ops)
    centred = plan.centred(distances)
    table = permutation_table(n, plan.permutations, plan.seed, plan.device)
    influences = moments.matrix_influences(centred, plan.biased)
    return InnerProducts(
        names,
        n,
        1,
        geometry.products(centred),
        None if influences is None else influences.moments(),
        {name: geometry.permuted_products(centred, centred[names.index(name)], table) for name in plan.permuted},
        geometry.products(distances.raw).diagonal(),
        torch.tensor([arrays.rounding(x) for x in rows.values()], dtype=torch.float64, device=plan.device),
        influences,
        None if plan.classes is None else ClassMatrices(centred, plan.classes),
    )


def _sweep(matrices: Sequence[tiles.Matrix], names: Sequence[str], plan: _Plan) -> tiles.Sweep:
    return tiles.Sweep(
        matrices,
        permuted=[names.index(name) for name in plan.permuted],
        permutations=plan.permutations,
        biased=plan.biased,
        seed=plan.seed,
        ops=plan.ops,
        classes=plan.classes,
    )


def _in_tiles(inputs: Mapping[str, _Input], plan: _Plan, known: Iterable[Sequence[Tensor]] | None) -> InnerProducts:
    """In tiles, for any number of images."""
    names, matrices = tuple(inputs), _matrices(inputs)
    rounding = _rounding(matrices, plan.device)
    whole = _sweep(matrices, names, plan)
    sums = whole.run() if known is None else whole.combined(known)
    raw = torch.stack([matrix.scale for matrix in matrices]) * plan.n / (plan.n - 3)
    _check_varied(names, sums.products, raw, rounding.clamp_min(1e-8))  # sums over tiles are known to 1e-16 of them
    permuted_products = {name: sums.permuted[names.index(name)] for name in plan.permuted}
    return InnerProducts(names, plan.n, 1, sums.products, sums.moments, permuted_products, raw, rounding, sums.influences, sums.classes)


def _in_batches(inputs: Mapping[str, _Input], plan: _Plan, size: int) -> InnerProducts:
    """Summed over random batches, as many at a time as memory allows.

    Batches are drawn without regard to classes. A batch of one class has no geometry to add, and adds zero: excluding it would bias the
    sum.
    """
    arrays.check_batch_size(size)
    if size > tiles.TILE:
        raise KdxError(
            f"A batch of {size} images needs matrices of {size} x {size}.",
            f"Give at most {tiles.TILE}, or no batch: kdx then processes all images in tiles.",
        )
    names, matrices = tuple(inputs), _matrices(inputs)
    rounding = _rounding(matrices, plan.device)
    generator = np.random.default_rng(plan.seed)
    batches = arrays.batches_of(torch.from_numpy(generator.permutation(plan.n)).to(plan.device), size)
    widths = [matrix.rows.shape[1] * 4 if isinstance(matrix, tiles.FeatureDistances) else 0 for matrix in matrices]
    few = len(batches) < MANY_BATCHES
    products, raw, within = [], [], []
    permuted = {name: torch.zeros(plan.permutations, len(names), dtype=torch.float64, device=plan.device) for name in plan.permuted}
    for stack in _stacks(batches, sum(widths), len(names)):
        n = stack.shape[1]
        d = torch.stack([matrix.batches(stack, plan.ops) for matrix in matrices], 1)
        centred = geometry.double_centered(d) if plan.biased else geometry.u_centered(d)
        products.append(geometry.products(centred) if plan.biased else plan.ops.products(BatchDistances(d, centred)))
        within += [moments.of_matrices(each, plan.biased) for each in centred] if few else []
        raw.append(geometry.products(d).diagonal(dim1=1, dim2=2))
        turns = torch.from_numpy(generator.integers(n, size=(plan.permutations, len(stack)))).to(plan.device)
        for name, sums in permuted.items():
            sums += tiles.turned_products(centred, names.index(name), turns)
    batch_products, raw_sum = torch.cat(products), torch.cat(raw).sum(0)
    total = batch_products.sum(0)
    _check_varied(names, total, raw_sum, rounding)
    return InnerProducts(names, plan.n, len(batches), total, pooled_moments(batch_products, within), permuted, raw_sum, rounding)


def _stacks(batches: Sequence[Tensor], width: int, matrices: int) -> Iterator[Tensor]:
    """Batches of equal size as indices [b, n], as many at a time as memory allows."""
    for n in sorted({len(batch) for batch in batches}):
        equal = torch.stack([batch for batch in batches if len(batch) == n])
        yield from equal.split(max(1, _BYTES // (n * (width + matrices * n * 64))))


def _matrices(inputs: Mapping[str, _Input]) -> list[tiles.Matrix]:
    return [source.matrix() if isinstance(source, Target) else feature_distances(source, name) for name, source in inputs.items()]


def _rounding(matrices: Sequence[tiles.Matrix], device: torch.device) -> Tensor:
    """The rounding of each matrix's distances, relative to them [k]. Distances between classes are float64."""
    types = [(m.rows.dtype, m.rows.shape[1]) if isinstance(m, tiles.FeatureDistances) else (torch.float64, 1) for m in matrices]
    return torch.tensor([arrays.rounding_of(dtype, width) for dtype, width in types], dtype=torch.float64, device=device)


def _check_varied(names: Sequence[str], products: Tensor, raw: Tensor, rounding: Tensor) -> None:
    for name, norm, whole, share in zip(names, products.diagonal().tolist(), raw.tolist(), rounding.tolist(), strict=True):
        arrays.check_varied(norm, whole, share, name)


def check_residual(sums: InnerProducts, explained: int, given: int) -> None:
    """KdxError if the given matrix explains the explained one up to the rounding of their distances."""
    norm, cross, given_norm = (sums.products[pair] for pair in ((explained, explained), (explained, given), (given, given)))
    # A difference of inner products is known to 1e-16 of them, whichever type the features have.
    floor = torch.maximum(sums.rounding.max() ** 2 * sums.raw[explained], 1e-13 * norm)
    if not bool(norm - cross**2 / given_norm > floor):
        raise explained_completely(sums.names[explained], sums.names[given])


def explained_completely(explained: str, given: str) -> KdxError:
    """The error for features, or a target, of which the given features leave only rounding."""
    return KdxError(
        f"Nothing is left of the {explained}: the {given} explain {'it' if explained == TARGET else 'them'} completely.",
        "Compare two different networks or layers, over more images if there are only a few.",
    )

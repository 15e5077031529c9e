"""The similarity of every layer of one network with every layer of another, from features in memory or on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdx.errors import KdxError
from kdx.features import arrays
from kdx.features.rows import Source, feature_distances, rows_of
from kdx.kernels import ambient, dispatch, layer_sums, tiles
from kdx.kernels.cuda import Backend
from kdx.kernels.layer_sums import LayerSums
from kdx.kernels.tiles import FeatureDistances
from kdx.scores.layer_similarity import PooledSums, correlations, distance_correlations, partial_correlations
from kdx.scores.similarity_result import Similarity
from kdx.scores.uncertainty import MANY_BATCHES

Layers = Mapping[str, Source] | Sequence[Source] | Source
"""The features of one network: by layer, a sequence of layers, or a single layer."""


@ambient.neutral()
def similarity(
    features_a: Layers,
    features_b: Layers,
    given: Layers | None = None,
    *,
    batch: int | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    backend: Backend = "auto",
) -> Similarity:
    """How similar every layer of a network A is to every layer of a network B: distance correlation, linear CKA and partial correlation.

        values[i, j] = <A_i, B_j>/sqrt(<A_i, A_i> <B_j, B_j>)

    with the U-centred distance matrices A_i and B_j [n, n] of the layers' features and <A, B> = sum_{i != j} A_ij B_ij/(n(n-3)). It is the
    unbiased estimate of the squared distance correlation, the same as `kdx.fss`. ``cka`` is the same ratio of linear kernels in place of
    distances: CKA with the unbiased HSIC. Sources: Szekely and Rizzo, "Partial distance correlation with methods for dissimilarities",
    Annals of Statistics 42 (2014); Song et al., "Feature selection via dependence maximization", JMLR 13 (2012); Kornblith et al.,
    "Similarity of neural network representations revisited", ICML 2019; Nguyen, Raghu and Kornblith, "Do wide and deep networks learn the
    same things?", ICLR 2021, for batches.

    features_a, features_b: the features of the same images, a mapping from the names of layers to arrays [n, ...], a sequence of arrays, or
    one array. A layer may be a feature map [n, C, H, W], tokens [n, L, C] or vectors [n, d]: NumPy, PyTorch, a memory-mapped file or a Zarr
    array, of any floating-point types, on one device. Give the same object twice to compare a network with itself at half the cost.
    given: features of a third network C in the same forms. ``partial`` is then the correlation of what is left of A_i and B_j after the
    U-centred matrices of all these layers are projected out of both: what A and B share beyond C. With one layer it is the partial distance
    correlation of Szekely and Rizzo. It is 0 where C leaves nothing of A_i or B_j.
    batch: the number of images in a set of distances. Inner products are then summed over random batches, and one ratio is taken at the
    end, as in minibatch CKA. By default all images are one set, in tiles, with memory for n rows of sums and a few tiles.
    confidence: of the intervals, which leave out 32 random parts of the images, or, with batches, come from the same within up to 19
    batches and from the variation between 20 or more (docs/mathematics.md). seed: of the random order of the images. backend: as in
    `kdx.fss`.

    All numbers lie in [-1, 1] and are never NaN; 0 is expected for unrelated layers, and 1 means the same geometry up to scale, rotation
    and shift. A high value does not mean that the layers compute the same function, that they are equally useful for a task, or that one
    network learned from the other: two networks may share the geometry of the images themselves. No multiple testing is corrected: every
    interval refers to its own pair of layers.

    Raises KdxError for fewer than four images, features that are not finite or constant, and features of different images.

    >>> import numpy as np, kdx
    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=(60, 8))
    >>> result = kdx.similarity({"early": x, "late": x @ rng.normal(size=(8, 5))}, {"fc": x[:, :3]})
    >>> result.values.shape
    (2, 1)
    >>> result.best_matches()
    {'early': 'fc', 'late': 'fc'}
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}")
    seed, batch = index(seed), None if batch is None else index(batch)
    layers = _LayerSet()
    first, second = layers.add(features_a, "A"), layers.add(features_b, "B")
    third = layers.add(given, "C") if given is not None else {}
    matrices = layers.matrices()
    n, ops = layers.n, dispatch.chosen(torch.empty(0, dtype=matrices[0].rows.dtype, device=matrices[0].rows.device), backend)
    if batch is not None and batch < n:
        blocks = _of_batches(matrices, n, batch, seed, ops)
    else:
        blocks = [layer_sums.of_set(matrices, seed=seed, ops=ops)]
    sums = PooledSums.of(blocks, rounding_floor(matrices))
    for number in sums.constant:
        raise arrays.constant(layers.names[number])
    return of_sums(sums, first, second, third, confidence)


def of_sums(
    sums: PooledSums, first: Mapping[str, int], second: Mapping[str, int], third: Mapping[str, int], confidence: float
) -> Similarity:
    """The similarity of layers that the sums number: those of A, of B, and of C if there is one, by name."""
    a, b = [*first.values()], [*second.values()]
    result = distance_correlations(sums, a, b, confidence)
    cka = correlations(sums.kernels.sum(0), a, b).numpy(force=True)
    partial = partial_correlations(sums, a, b, [*third.values()], confidence) if third else None
    count = len(sums.distances)
    return Similarity(
        tuple(first),
        tuple(second),
        result.values,
        result.low,
        result.high,
        cka,
        None if partial is None else partial.values,
        sums.n,
        "whole" if count == 1 else "batch",
        None if partial is None else partial.low,
        None if partial is None else partial.high,
        tuple(third),
        count,
        confidence,
    )


def rounding_floor(matrices: Sequence[FeatureDistances]) -> Tensor:
    """The squared norms of the U-centred matrices [k] up to which they are rounding of the distances."""
    n = matrices[0].rows.shape[0]
    shares = [max(arrays.rounding_of(matrix.rows.dtype, matrix.rows.shape[1]), 1e-8) for matrix in matrices]
    raw = torch.stack([matrix.scale for matrix in matrices]) * n / (n - 3)
    return raw * torch.tensor(shares, dtype=raw.dtype, device=raw.device).square()


@dataclass
class _LayerSet:
    """The layers of all networks, each array once."""

    names: list[str] = field(default_factory=list)
    _sources: list[Any] = field(default_factory=list)
    _numbers: dict[int, int] = field(default_factory=dict)

    def add(self, layers: Layers, network: str) -> dict[str, int]:
        """The numbers of a network's layers by name."""
        by_name = {str(name): source for name, source in _by_name(layers).items()}
        if not by_name:
            raise KdxError(f"There are no features of {network}.", "Give at least one layer: {'layer4': features}.")
        numbers = {}
        for name, source in by_name.items():
            if id(source) not in self._numbers:
                self._numbers[id(source)] = len(self._sources)
                self._sources.append(source)
                self.names.append(f"features of {network} at {name}")
            numbers[name] = self._numbers[id(source)]
        return numbers

    def matrices(self) -> list[FeatureDistances]:
        """The distances of all layers, on demand. Raises KdxError for what `similarity` refuses."""
        rows = [rows_of(_with_known_axes(source), name) for source, name in zip(self._sources, self.names, strict=True)]
        arrays.check_images(rows[0].shape[0])
        for name, other in zip(self.names, rows, strict=True):
            arrays.check_same(other.shape[0], rows[0].shape[0], name, self.names[0])
            arrays.check_same_device(torch.device(other.device), torch.device(rows[0].device), name, self.names[0])
        return [feature_distances(source, name) for source, name in zip(rows, self.names, strict=True)]

    @property
    def n(self) -> int:
        return int(self._sources[0].shape[0])


def _by_name(layers: Layers) -> Mapping[str, Any]:
    if isinstance(layers, Mapping):
        return layers
    if isinstance(layers, list | tuple):
        return {str(number): source for number, source in enumerate(layers)}
    return {"0": layers}


def _with_known_axes(source: Any) -> Any:
    """Tokens [n, L, C] and other arrays in memory as rows [n, d]; vectors, feature maps and arrays on disk as they are."""
    in_memory = isinstance(source, Tensor | np.ndarray) and not isinstance(source, np.memmap)
    return source.reshape(len(source), -1) if in_memory and source.ndim not in (0, 2, 4) and 0 not in source.shape else source


def _of_batches(matrices: Sequence[FeatureDistances], n: int, size: int, seed: int, ops: dispatch.TorchBackend) -> list[LayerSums]:
    """The sums of random batches of about ``size`` images."""
    arrays.check_batch_size(size)
    if size > tiles.TILE:
        raise KdxError(
            f"A batch of {size} images needs matrices of {size} x {size}.",
            f"Give at most {tiles.TILE}, or no batch: kdx then processes all images in tiles.",
        )
    order = torch.from_numpy(np.random.default_rng(seed).permutation(n)).to(matrices[0].rows.device)
    batches = arrays.batches_of(order, size)
    parts = parts_of(len(batches))
    return [layer_sums.of_batch(torch.stack([matrix.batches(part[None], ops)[0] for matrix in matrices]), parts) for part in batches]


def parts_of(batches: int) -> int | None:
    """The parts by which the sums of each of so many batches are split: none where the variation between batches is known."""
    return 1 if batches >= MANY_BATCHES else None

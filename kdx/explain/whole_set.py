"""Maps and inner products of one layer over all images at once, from features on disk, in two sweeps over tiles of images.

Sweep 1 (`kdx.kernels.tiles`) sums the inner products, from which the scores and the coefficients of every map follow. Sweep 2
(`kdx.kernels.strips`) computes the maps strip by strip. No array of n x n is in memory, and the number of images per pass of a network
does not occur.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from kdx.explain.map_statistics import MapStatistics, NullStrength, mean_strength, stability
from kdx.explain.settings import Settings
from kdx.features.arrays import check_images, check_varied, rounding_of
from kdx.features.rows import feature_distances
from kdx.features.score_maps import combined
from kdx.features.target import Target
from kdx.kernels import geometry as closed_form
from kdx.kernels import tiles
from kdx.kernels.decomposition import PairWeights
from kdx.kernels.set_unicam import SetGradient, channel_weights
from kdx.kernels.strips import SetFeatures, SetGeometry, StoredDistances, strip_shares
from kdx.kernels.tiles import FeatureDistances, Rows
from kdx.maps.unicam import check_residual
from kdx.roles import TARGET, maps_among, permuted_among, roles_among, score_maps_among, shares_among
from kdx.scores.uncertainty import with_permuted

_NULL_IMAGES = 128
"""The most images whose maps are computed once more with a permuted target."""


@dataclass(frozen=True, eq=False)
class SetRows:
    """One network's features of all images at one layer: rows [n, C * h * w], with the shape (C, h, w)."""

    rows: Rows
    shape: tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class SetMeasurement:
    """One layer over n images, with r roles.

    products, permuted, left_out: as in `kdx.explain.layer.LayerMeasurement`, over all images. statistics: of each kind of map, UniCAM's
    and those that add up to a score. null: the strength of each kind of map under a permuted target, where a permutation was computed.
    """

    products: Tensor
    permuted: dict[str, Tensor]
    left_out: Tensor
    statistics: dict[str, MapStatistics]
    null: dict[str, NullStrength]


def measure_set(
    features: Mapping[str, SetRows],
    target: Target,
    settings: Settings,
    output: Callable[[str, tuple[int, int, int]], Tensor],
    *,
    folder: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> SetMeasurement:
    """Measure one layer, from each role's features of the same images.

    output: returns the array [n, h, w] to which the maps of a kind are written, from its name and shape; `maps_among` and
    `score_maps_among` name the kinds. folder: where the distances are kept meanwhile; None keeps them in memory. progress: receives the
    number of finished steps and of all steps.

    Raises KdxError for features that are not finite or constant, for fewer than four images, for a target without geometry, and if one
    network's features explain another's completely.
    """
    roles = roles_among(features)
    check_images(features["student"].rows.shape[0])
    matrices = [feature_distances(features[role].rows, f"{role}'s features") for role in roles]
    known = [*matrices, target.matrix()]
    names = (*roles, TARGET)
    stored = StoredDistances(known, folder)
    permuted = permuted_among(roles)
    tile_counts = [0]

    def sweep_progress(done: int, total: int) -> None:
        tile_counts[0] = total
        progress(done, 2 * total)

    swept = tiles.sweep(
        known,
        permuted=[names.index(name) for name in permuted],
        permutations=settings.permutations,
        seed=settings.seed,
        keep=stored.keep,
        progress=sweep_progress,
    )
    _check_geometry(dict(zip(names, known, strict=True)), swept.products)
    layer = _Layer(names, SetGeometry(known, swept, stored), {role: features[role].shape for role in roles}, settings, output)
    strips = len(swept.order)
    for a in range(strips):
        layer.add_strip(a)
        progress(tile_counts[0] + (a + 1) * tile_counts[0] // strips, 2 * tile_counts[0])
    null = layer.null_strengths() if settings.permutations else {}
    return SetMeasurement(
        swept.products, {name: swept.permuted[names.index(name)] for name in permuted}, swept.left_out, layer.statistics(), null
    )


def _check_geometry(matrices: Mapping[str, tiles.Matrix], products: Tensor) -> None:
    """KdxError for constant features, for a target without geometry, and for features that another network's explain completely."""
    names = list(matrices)
    rounding = {}
    for name, matrix in matrices.items():
        i = names.index(name)
        rounding[name] = rounding_of(matrix.rows.dtype, matrix.rows.shape[1]) if isinstance(matrix, FeatureDistances) else 1e-8
        check_varied(
            float(products[i, i]), float(matrix.scale), max(rounding[name], 1e-8), name if name == TARGET else f"{name}'s features"
        )
    for explained, given in maps_among(names[:-1]).values():
        i, j = names.index(explained), names.index(given)
        left = products[i, i] - products[i, j] ** 2 / products[j, j]
        share = (left.clamp_min(0) / matrices[explained].scale).sqrt()
        check_residual(share, rounding=max(rounding[explained], rounding[given]))


class _Layer:
    """The second sweep over one layer."""

    def __init__(
        self,
        names: tuple[str, ...],
        geometry: SetGeometry,
        shapes: Mapping[str, tuple[int, int, int]],
        settings: Settings,
        output: Callable[[str, tuple[int, int, int]], Tensor],
    ) -> None:
        self._names, self._geometry, self._shapes, self._settings = names, geometry, shapes, settings
        self._roles = names[:-1]
        self._features: dict[str, SetFeatures] = {}
        for i, role in enumerate(self._roles):
            matrix = geometry.matrices[i]
            assert isinstance(matrix, FeatureDistances)
            self._features[role] = SetFeatures.of(matrix, geometry, shapes[role][0])
        middle = (len(geometry.places) + 1) // 2
        self._halves = [geometry.places[:middle], geometry.places[middle:]]
        self._output = output
        self._arrays: dict[str, Tensor] = {}
        self._strength: dict[str, Tensor] = {}
        self._total: dict[str, Tensor] = {}
        self._stability: dict[str, Tensor] = {}

    @cached_property
    def _gradients(self) -> dict[str, SetGradient]:
        return self._gradients_among(self._geometry.swept.products)

    def _gradients_among(self, products: Tensor) -> dict[str, SetGradient]:
        place = self._names.index
        return {
            name: SetGradient.of(self._geometry, products, place(explained), place(given), place(TARGET), self._settings.objective)
            for name, (explained, given) in maps_among(self._roles).items()
        }

    def add_strip(self, a: int) -> None:
        """Compute and write the maps of the images of strip a."""
        geometry = self._geometry
        own = geometry.places[a]
        distances = [geometry.distances(i, a) for i in range(len(self._names))]
        centred = [geometry.centred(i, a, d) for i, d in enumerate(distances)]
        for name, maps in self._strip_maps(own, distances, centred, self._gradients, geometry.swept.products).items():
            self._write(name, geometry.order[own], own, maps)

    def _strip_maps(
        self, own: slice, distances: list[Tensor], centred: list[Tensor], gradients: Mapping[str, SetGradient], products: Tensor
    ) -> dict[str, Tensor]:
        """The maps of the images ``own`` by name: [2, l, h, w] of shares, with each half of the set as context, which add up; and
        [3, l, h, w] of UniCAM, with the whole set and with each half as context.
        """
        shares: dict[tuple[str, str], Tensor] = {}
        maps: dict[str, Tensor] = {}
        for i, role in enumerate(self._roles):
            features = self._features[role]
            block = features.read(own)
            matrices = [matrix for share_role, matrix in shares_among(self._roles) if share_role == role]
            norms = features.total_norms()
            pairs = PairWeights.of(
                distances[i], torch.stack([centred[self._names.index(name)] for name in matrices]), norms[own], norms, block.dtype
            )
            values = strip_shares(features, block, torch.arange(own.start, own.stop), pairs, self._halves)
            n, shape = self._geometry.n, (-1, *self._shapes[role][1:])
            for name, value in zip(matrices, values.unbind(1), strict=True):
                shares[role, name] = (value / (n * (n - 3))).unflatten(2, shape[1:])
            for name, (explained, _) in maps_among(self._roles).items():
                if explained == role:
                    maps[name] = self._unicam_maps(role, block, own, distances[i], gradients[name].strip(centred, own))
        for name, kind in score_maps_among(self._roles).items():
            maps[name] = combined(kind, shares, products, self._names)
        return maps

    def _unicam_maps(self, role: str, block: Tensor, own: slice, distances: Tensor, gradient: Tensor) -> Tensor:
        """UniCAM's maps [3, l, h, w] of one network: of the whole set, and with each half as context."""
        features = self._features[role]
        apart = distances > 0
        weights = torch.where(apart, gradient / torch.where(apart, distances, 1.0), 0.0)
        raw = (block + features.matrix.centre.view(1, *features.shape)).unflatten(2, self._shapes[role][1:])
        if self._settings.weighting == "gap":
            parts = channel_weights(weights, features.means, own, self._halves)
            contexts = torch.stack([parts.sum(0), *parts])
            return torch.stack([closed_form.cam(raw, a) for a in contexts])
        gradients = [self._row_gradient(features, block, weights, places) for places in self._halves]
        return torch.stack([closed_form.elementwise_cam(raw, rows.flatten(1)) for rows in (sum(gradients[1:], gradients[0]), *gradients)])

    def _row_gradient(self, features: SetFeatures, block: Tensor, weights: Tensor, places: list[slice]) -> Tensor:
        """sum_j W_ij (F_i - F_j) [l, C, P] over the images of these places."""
        sums = weights[:, places[0].start : places[-1].stop].sum(1)
        result = sums.to(block.dtype)[:, None, None] * block
        for place, columns in features.blocks(places):
            result -= (weights[:, place].to(block.dtype) @ columns.flatten(1)).view(block.shape)
        return result

    def _write(self, name: str, images: Tensor, own: slice, maps: Tensor) -> None:
        """Write the maps of the whole set, and note their statistics. The last two maps are those of the halves."""
        whole = _whole(maps)
        if name not in self._arrays:
            n = self._geometry.n
            self._arrays[name] = self._output(name, (n, *whole.shape[1:]))
            for values in (self._strength, self._total, self._stability):
                values[name] = torch.full((n,), torch.nan, dtype=torch.float64)
        self._arrays[name][images.cpu()] = whole.float().cpu()
        self._strength[name][images] = mean_strength(whole).cpu()
        self._total[name][images] = whole.double().sum((1, 2)).cpu()
        self._stability[name][images] = stability(maps[-2], maps[-1]).cpu()

    def statistics(self) -> dict[str, MapStatistics]:
        return {name: MapStatistics(self._total[name], self._strength[name], self._stability[name]) for name in self._arrays}

    def null_strengths(self) -> dict[str, NullStrength]:
        """The strength of the maps of a random part of the images, if the matrix that shares are computed with is permuted once."""
        geometry = self._geometry
        own = slice(0, min(geometry.places[0].stop, _NULL_IMAGES))
        distances = [geometry.distances(i, 0)[own] for i in range(len(self._names))]
        unpermuted = [geometry.centred(i, 0, geometry.distances(i, 0))[own] for i in range(len(self._names))]
        result: dict[str, NullStrength] = {}
        for permuted in dict.fromkeys(matrix for _, matrix in shares_among(self._roles)):
            place, products = self._names.index(permuted), geometry.swept.products
            if permuted == TARGET:
                products = with_permuted(products, place, geometry.swept.permuted[place][:1])[0]
            centred = [geometry.turned(i, 0, 0)[own] if i == place else matrix for i, matrix in enumerate(unpermuted)]
            maps = self._strip_maps(own, distances, centred, self._gradients_among(products), products)
            for name, values in maps.items():
                if permuted in self._depends_on(name):
                    result[name] = NullStrength.of(mean_strength(_whole(values)).cpu())
        return result

    def _depends_on(self, name: str) -> set[str]:
        """The matrices whose permutation makes the null of a kind of map."""
        if name in score_maps_among(self._roles):
            return {matrix for _, matrix in score_maps_among(self._roles)[name].shares}
        return {TARGET} if self._settings.objective == "relevance" else set()


def _whole(maps: Tensor) -> Tensor:
    """The maps of the whole set: the sum over both halves, or the first of three if the halves do not add up."""
    return maps[0] if len(maps) == 3 else maps.sum(0)

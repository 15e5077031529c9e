"""Maps and inner products of one layer over all images at once, from features on disk, in two sweeps over tiles of images.

Sweep 1 (`kdx.kernels.tiles`) sums the inner products, from which the scores and the coefficients of every map follow. Sweep 2
(`kdx.kernels.set_maps`) sums what the maps need. No array of n x n is in memory, and the number of images per pass of a network does not
occur.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdx.explain.map_statistics import MapStatistics, NullStrength, mean_strength, stability
from kdx.explain.settings import Settings
from kdx.features.array_files import new_array
from kdx.features.arrays import check_images, check_varied, rounding_of
from kdx.features.rows import InMemory, feature_distances, unit_of
from kdx.features.score_maps import combined
from kdx.features.target import Target
from kdx.kernels import dispatch, tiles
from kdx.kernels.geometry import wide
from kdx.kernels.moments import Influences, Moments
from kdx.kernels.set_geometry import SetGeometry, StoredDistances
from kdx.kernels.set_maps import SetFeatures, SetSums, permuted_sums, second_sweep
from kdx.kernels.set_unicam import SetGradient
from kdx.kernels.tiles import TILE, FeatureDistances, Rows
from kdx.maps.unicam import check_residual
from kdx.roles import TARGET, mapped_among, maps_among, pairs_among, permuted_among, roles_among, score_maps_among, shares_among
from kdx.scores.groups import GroupScores, of_classes, of_images
from kdx.scores.inner_products import Sampling
from kdx.scores.uncertainty import with_permuted

_NULL_IMAGES = 128
"""The most images whose maps are computed once more with a permuted target."""


@dataclass(frozen=True, eq=False)
class SetRows:
    """One network's features of all images at one layer: shape (C, h, w), and rows [n, h * w * C], in which channels come last."""

    rows: Rows
    shape: tuple[int, int, int]

    def read(self, index: Tensor) -> Tensor:
        """The features [k, h * w, C] of the images ``index`` [k], in float32 at least."""
        features: Tensor = wide(self.rows.read(index)).unflatten(1, (-1, self.shape[0]))
        return features

    def pooled(self) -> InMemory:
        """The spatial means [n, C]."""
        parts = torch.arange(self.rows.shape[0], device=self.rows.device).split(TILE)
        return InMemory(torch.cat([features.mean(1, dtype=torch.float64).to(features.dtype) for features in map(self.read, parts)]))


@dataclass(frozen=True, eq=False)
class SetMeasurement:
    """One layer over n images, with r roles.

    products, permuted: as in `kdx.explain.layer.LayerMeasurement`, over all images. influences: on the products, of random parts of the
    images: consecutive ones if the rows are shuffled. statistics: of each kind of map, UniCAM's
    and those that add up to a score. null: the strength of each kind of map under a permuted target, where a permutation was computed.
    classes, groups: the scores of every class and of every group, where they were requested.
    """

    products: Tensor
    permuted: dict[str, Tensor]
    influences: Influences
    statistics: dict[str, MapStatistics]
    null: dict[str, NullStrength]
    classes: list[GroupScores]
    groups: list[GroupScores]

    @property
    def moments(self) -> Moments:
        """The moments of the products."""
        return self.influences.moments()


def measure_set(
    features: Mapping[str, SetRows],
    target: Target,
    settings: Settings,
    output: Callable[[str, tuple[int, int, int]], Tensor],
    *,
    shuffled: bool = False,
    classes: NDArray[np.int64] | None = None,
    groups: Sequence[Tensor] = (),
    folder: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> SetMeasurement:
    """Measure one layer, from each role's features of the same images.

    output: returns the array [n, h, w], of any floating type, to which the maps of a kind are written, from its name and shape;
    `maps_among` and `score_maps_among` name the kinds. shuffled: whether the rows are in random order, which makes reading them fast.
    classes [n]: the class of each image, as a number from 0, where scores per class are wanted. groups: the images of each group.
    folder: where the distances are kept meanwhile; None keeps them in memory. progress: receives the number of finished steps and of all
    steps.

    Raises KdxError for features that are not finite or constant, for fewer than four images, for a target without geometry, and if one
    network's features explain another's completely.
    """
    roles = roles_among(features)
    check_images(features["student"].rows.shape[0])
    matrices = [
        feature_distances(features[role].pooled() if settings.pooled else features[role].rows, f"{role}'s features") for role in roles
    ]
    known = [*matrices, target.matrix()]
    names = (*roles, TARGET)
    stored = StoredDistances(known, None if folder is None else partial(_on_disk, folder))
    permuted, sweeps = permuted_among(roles), 1 + len(mapped_among(roles))
    whole = tiles.Sweep(
        known,
        permuted=[names.index(name) for name in permuted],
        permutations=settings.permutations,
        seed=settings.seed,
        shuffled=shuffled,
        ops=dispatch.chosen(torch.empty(0, dtype=matrices[0].rows.dtype, device=matrices[0].rows.device)),
        classes=None if classes is None else torch.from_numpy(classes),
    )
    swept = whole.run(keep=stored.keep, progress=lambda done, total: progress(done, sweeps * total))
    _check_geometry(dict(zip(names, known, strict=True)), swept.products)
    geometry = SetGeometry(known, swept, stored)
    layer = _Layer(names, geometry, features, settings)
    steps = count(len(geometry.pairs) + 1)
    statistics = layer.write_maps(output, lambda: progress(next(steps), sweeps * len(geometry.pairs)))
    null = layer.null_strengths() if settings.permutations else {}
    products = {name: swept.permuted[names.index(name)] for name in permuted}
    sampling = Sampling(permutations=0, confidence=settings.confidence, seed=settings.seed)
    rows = {role: matrix.rows for role, matrix in zip(roles, matrices, strict=True)}
    by_class: list[GroupScores] = []
    if classes is not None and swept.classes is not None:
        by_class = of_classes(rows, swept.products, swept.influences, swept.classes, classes, sampling)
    by_group = [of_images(rows, index, sampling, target.values[index.to(target.values.device)]) for index in groups]
    return SetMeasurement(swept.products, products, swept.influences, statistics, null, by_class, by_group)


def _on_disk(folder: Path, number: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An array in a file of the folder, for the distances of one network."""
    name = {torch.float32: "float32", torch.float64: "float64"}[dtype]
    return torch.from_numpy(new_array(folder / f"distances-{number}.npy", shape, name))


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
    for explained, given in pairs_among(names[:-1]).values():
        i, j = names.index(explained), names.index(given)
        left = products[i, i] - products[i, j] ** 2 / products[j, j]
        share = (left.clamp_min(0) / matrices[explained].scale).sqrt()
        check_residual(share, rounding=max(rounding[explained], rounding[given]))


@dataclass(frozen=True)
class _Request:
    """What is computed of each role: its shares with these matrices, and these of UniCAM's maps."""

    matrices: Mapping[str, Sequence[str]]
    kinds: Mapping[str, Sequence[str]]

    @classmethod
    def everything(cls, roles: Sequence[str], shares: Sequence[tuple[str, str]]) -> _Request:
        matrices = {role: [matrix for share_role, matrix in shares if share_role == role] for role in roles}
        return cls(matrices, _kinds(roles))

    @classmethod
    def of_matrix(cls, roles: Sequence[str], shares: Sequence[tuple[str, str]], matrix: str, unicam: bool) -> _Request:
        """The shares with one matrix, of the roles that have one. unicam: whether UniCAM's maps are computed too."""
        matrices = {role: [matrix] for role, other in shares if other == matrix}
        if not unicam:
            return cls(matrices, dict.fromkeys(matrices, ()))
        return cls({role: matrices.get(role, []) for role in roles}, _kinds(roles))


def _kinds(roles: Sequence[str]) -> dict[str, list[str]]:
    """UniCAM's maps of each role's features."""
    return {role: [name for name, (explained, _) in maps_among(roles).items() if explained == role] for role in roles}


class _Layer:
    """The second sweep over one layer, and its maps."""

    def __init__(self, names: tuple[str, ...], geometry: SetGeometry, rows: Mapping[str, SetRows], settings: Settings) -> None:
        self._names, self._geometry, self._rows, self._settings = names, geometry, rows, settings
        self._roles = mapped_among(names[:-1])
        # Every position of a spatial mean has the same gradient, so both weightings agree, and no position has a share of a distance.
        self._elementwise = settings.weighting == "elementwise" and not settings.pooled
        self._shares = () if settings.pooled else shares_among(self._roles)
        self._features: dict[str, SetFeatures] = {}
        for role in self._roles:
            matrix = geometry.matrices[names.index(role)]
            assert isinstance(matrix, FeatureDistances)
            self._features[role] = SetFeatures.of(matrix, geometry, rows[role].shape[0])

    def _gradients(self, products: Tensor) -> dict[str, SetGradient]:
        """The gradient of each of UniCAM's maps, from the inner products."""
        place = self._names.index
        return {
            name: SetGradient.of(
                self._geometry,
                products,
                place(explained),
                None if given is None else place(given),
                place(TARGET),
                self._settings.objective,
            )
            for name, (explained, given) in maps_among(self._roles).items()
        }

    def write_maps(self, output: Callable[[str, tuple[int, int, int]], Tensor], step: Callable[[], None]) -> dict[str, MapStatistics]:
        """Compute and write all maps. Returns the statistics of each kind. step: called after each tile of each role."""
        geometry, products = self._geometry, self._geometry.swept.products
        request = _Request.everything(self._roles, self._shares)
        gradients = self._gradients(products)
        sums = {
            role: second_sweep(
                geometry,
                self._names.index(role),
                self._features[role],
                [self._names.index(matrix) for matrix in request.matrices[role]],
                [gradients[name] for name in request.kinds[role]],
                elementwise=self._elementwise,
                step=step,
            )
            for role in self._roles
        }
        arrays: dict[str, Tensor] = {}
        parts: dict[str, list[MapStatistics]] = {}
        for place in geometry.places:
            for name, maps in self._maps(request, sums, place, products).items():
                whole = _whole(maps)
                if name not in arrays:
                    arrays[name] = output(name, (geometry.n, *whole.shape[1:]))
                arrays[name][geometry.order[place].cpu()] = whole.to(arrays[name])
                statistics = [whole.double().sum((1, 2)), mean_strength(whole), stability(maps[-2], maps[-1])]
                parts.setdefault(name, []).append(MapStatistics(*(values.cpu() for values in statistics)))
        inverse = geometry.order.argsort().cpu()
        return {name: MapStatistics.joined(values).at(inverse) for name, values in parts.items()}

    def _maps(self, request: _Request, sums: Mapping[str, SetSums], own: slice, products: Tensor) -> dict[str, Tensor]:
        """The maps of the images ``own`` that the requested sums give, by name: [2, l, h, w] of shares, with each half of the set as
        context, which add up; and [3, l, h, w] of UniCAM, with the whole set and with each half as context.
        """
        n = self._geometry.n
        shares: dict[tuple[str, str], Tensor] = {}
        maps: dict[str, Tensor] = {}
        for role, role_sums in sums.items():
            grid = self._rows[role].shape[1:]
            for number, matrix in enumerate(request.matrices[role]):
                shares[role, matrix] = (role_sums.shares[number, :, own] / (n * (n - 3))).unflatten(2, grid)
            for name, values in zip(request.kinds[role], self._unicam_maps(role, role_sums, own), strict=True):
                maps[name] = values.unflatten(2, grid)
        for name, kind in score_maps_among(self._roles).items():
            if shares.keys() >= set(kind.shares):
                maps[name] = combined(kind, shares, products, self._names)
        return maps

    def _unicam_maps(self, role: str, sums: SetSums, own: slice) -> Iterator[Tensor]:
        """UniCAM's maps [3, l, P] of the images ``own`` for each gradient of the sums."""
        # Like L, maps of relevance have no unit, and maps of uniqueness have that of the features.
        unit = 1.0 if self._settings.objective == "relevance" else unit_of(self._features[role].matrix.rows)
        if self._elementwise:
            for halves in sums.elementwise[:, :, own]:
                yield torch.stack([halves.sum(0), *halves]).relu() / unit
            return
        features = self._features_of(role, own) if len(sums.weights) else torch.empty(0)
        for parts in sums.weights[:, :, own]:
            contexts = torch.stack([parts.sum(0), *parts]).to(features.dtype)
            yield torch.einsum("npc,knc->knp", features, contexts).relu() / unit

    def _features_of(self, role: str, own: slice) -> Tensor:
        """The features [l, P, C] to which the channel weights of the images ``own`` apply."""
        features = self._features[role]
        if not self._settings.pooled:
            return features.uncentred(own)
        height, width = self._rows[role].shape[1:]
        return self._rows[role].read(features.order[own]) * (unit_of(features.matrix.rows) / (height * width))

    def null_strengths(self) -> dict[str, NullStrength]:
        """The strength of the maps of a random part of the images, if the matrix that shares are computed with is permuted once."""
        images = min(self._geometry.n, _NULL_IMAGES)
        result: dict[str, NullStrength] = {}
        for permuted in dict.fromkeys((TARGET, *(matrix for _, matrix in self._shares))):
            place, products = self._names.index(permuted), self._geometry.swept.products
            # UniCAM depends on the target alone, and its uniqueness objective on no permuted matrix.
            unicam = permuted == TARGET and self._settings.objective == "relevance"
            if permuted == TARGET:
                products = with_permuted(products, place, self._geometry.swept.permuted[place][:1])[0]
            gradients = self._gradients(products) if unicam else {}
            request = _Request.of_matrix(self._roles, self._shares, permuted, unicam)
            sums = {
                role: permuted_sums(
                    self._geometry,
                    self._names.index(role),
                    self._features[role],
                    [place] * len(matrices),
                    [gradients[name] for name in request.kinds[role]],
                    permuted=place,
                    images=images,
                    elementwise=self._elementwise,
                )
                for role, matrices in request.matrices.items()
            }
            for name, values in self._maps(request, sums, slice(0, images), products).items():
                result[name] = NullStrength.of(mean_strength(_whole(values)).cpu())
        return result


def _whole(maps: Tensor) -> Tensor:
    """The maps of the whole set: the sum over both halves, or the first of three if the halves do not add up."""
    return maps[0] if len(maps) == 3 else maps.sum(0)

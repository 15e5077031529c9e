"""The graphs of explainer files: several networks and the geometry that compares them.

`ExplainerGraph` compares the images of a batch with each other, and `ReferenceGraph` compares each image with a fixed set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdx.export.graphs import FeatureGraph, GradientGraph
from kdx.features.score_maps import combined
from kdx.kernels import decomposition, geometry
from kdx.roles import MAPS, TARGET, mapped_among, maps_among, pairs_among, roles_among, score_maps_among, scores_among, shares_among

_ROUNDING = 1e-5
"""The ratio ||R||/||D|| below which the residual R of one network given another is rounding: float32 distances are exact to about 1e-6."""

_SUM = 32 * torch.finfo(torch.float32).eps
"""The rounding of a feature's spatial mean, relative to the mean absolute value of the feature (see `kdx.kernels.rounding`)."""

_EXPONENTS = 64, 32, 16
"""Features and targets whose largest value is at most 2^-16 or at least 2^16 are multiplied by powers of two with these exponents, which is
exact. Fourth powers of the others, which inner products contain, are numbers in float32."""


class ExplainerGraph(nn.Module):
    """Several networks and the geometry of their features: images, target -> logits, maps, weights, scores and distances.

    networks: one `FeatureGraph` per role. All have the same number of layers, which correspond in order; outputs have the names of
    the student's layers.

    target: an embedding [n, e], such as one-hot rows. For each layer L, map M of `maps_among` and kind K of `score_maps_among`:

    - ``L/M/maps`` [n, H, W], at feature resolution, the same as `kdx.unicam` with the objective relevance returns;
    - ``L/M/scaled`` [n, h, w], min-max scaled to [0, 1] and resized to the images;
    - ``L/M/weights`` [n, C];
    - ``L/K/maps`` [n, H, W], signed, the same as `kdx.decompose` returns: their sum over images and positions is the score of K;
    - ``L/scores``, in the order of `scores_among`;
    - ``L/distances`` [roles, n, n], from which any other score can be computed.

    At least four images are needed, because scores and maps are those of a batch. The geometry is float32 in any precision of the
    networks. Images whose features are closer than the rounding of float32 count as equal; their distance and their part in every map
    are 0. If two networks differ only by rounding, the maps of one given the other are zero everywhere. Results do not depend on the unit
    of the features, except distances and weights, which have it.

    pooled: distances are between the spatial means of the features, as in `kdx.unicam`; there are then no score maps.
    """

    kind = "explainer"
    input_names: tuple[str, ...] = ("images", "target")

    def __init__(self, networks: Mapping[str, FeatureGraph], *, pooled: bool = False) -> None:
        super().__init__()
        self.pooled = pooled
        self.roles = roles_among(networks)
        self.networks = nn.ModuleDict({role: networks[role] for role in self.roles})
        self.layers = networks["student"].layers
        self.maps, self.pairs = maps_among(self.roles), pairs_among(self.roles)
        self.score_maps = {} if pooled else score_maps_among(self.roles)
        self.scores = scores_among(self.roles)

    def network(self, role: str) -> FeatureGraph:
        network = self.networks[role]
        assert isinstance(network, FeatureGraph)
        return network

    @property
    def output_names(self) -> tuple[str, ...]:
        names = [f"logits/{role}" for role in self.roles]
        for layer in self.layers:
            names += [f"{layer}/{name}/{output}" for name in self.maps for output in ("maps", "scaled", "weights")]
            names += [f"{layer}/{name}/maps" for name in self.score_maps]
            names += [f"{layer}/scores", f"{layer}/distances"]
        return tuple(names)

    def forward(self, images: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        outputs = {role: network(images) for role, network in self.networks.items()}
        results = [logits for logits, *_ in outputs.values()]
        target_power, *powers = _powers([target, *(feature for _, *maps in outputs.values() for feature in maps)])
        target_distances = geometry.distances(target * target_power, torch.float32)
        for index in range(len(self.layers)):
            of_layer = zip(outputs.items(), powers[index :: len(self.layers)], strict=True)
            among = {role: _Among.batch(maps[index], power, self.pooled) for (role, (_, *maps)), power in of_layer}
            results += self._layer(among, target_distances, (images.shape[2], images.shape[3]))
            results.append(torch.stack([among[role].distances / among[role].power for role in self.roles]))
        return tuple(results)

    def _layer(self, among: Mapping[str, _Among], target_distances: Tensor, size: tuple[int, int]) -> list[Tensor]:
        """The outputs of one layer, except the distances: three per map, one per score map, and the scores.

        Matrices of all roles and of all maps are stacked, because the time of an export grows with the number of operators.
        """
        names = (*self.roles, TARGET)
        distances = {role: context.distances for role, context in among.items()} | {TARGET: target_distances}
        matrices = geometry.u_centered(torch.stack([distances[name] for name in names]))
        centred = dict(zip(names, matrices.unbind(0), strict=True))
        explained = torch.stack([centred[role] for role, _ in self.maps.values()])
        # No map, or every map, is given another network.
        given = torch.stack([centred[role] for _, role in self.pairs.values()]) if self.pairs else None
        solution = geometry.laplacian(torch.stack([distances[role] for role, _ in self.maps.values()]), explained, given, centred[TARGET])
        distinct = (solution.left > _ROUNDING)[..., None, None]
        laplacians = torch.where(distinct, solution.lap, 0.0).unbind(0)
        results = []
        for (role, _), lap in zip(self.maps.values(), laplacians, strict=True):
            weights = among[role].channel_weights(lap)
            maps = geometry.cam(among[role].features, weights)
            scaled = nn.functional.interpolate(geometry.scaled(maps)[:, None], size=size, mode="bilinear", align_corners=False)
            results += [maps, scaled[:, 0], weights * among[role].power]
        n = target_distances.shape[-1]
        squared: dict[tuple[str, str], Tensor] = {}
        conditional: dict[str, Tensor] = {}
        if given is not None:
            residual = geometry.residual(explained, given)
            squared = dict(zip(self.pairs.values(), (geometry.dot(residual, residual) / (n * (n - 3))).unbind(0), strict=True))
            conditional = dict(zip((MAPS[name].score for name in self.pairs), distinct.unbind(0), strict=True))
        products = geometry.products(torch.stack(list(centred.values()), -3))
        shares = self._shares(among, centred, n) if self.score_maps else {}
        for kind in self.score_maps.values():
            maps = combined(kind, shares, products, names, squared)
            results.append(torch.where(conditional[kind.score], maps, 0.0) if kind.score in conditional else maps)
        pairs = [definition.matrices for definition in self.scores.values() if len(definition.matrices) == 2]
        first, second = (torch.stack([centred[pair[side]] for pair in pairs]) for side in (0, 1))
        scores = geometry.correlation(first, second)
        if self.pairs:
            scores = torch.cat([scores, solution.score])  # in the order of `scores_among`
        return [*results, scores.movedim(0, -1)]

    def _shares(self, among: Mapping[str, _Among], centred: Mapping[str, Tensor], n: int) -> dict[tuple[str, str], Tensor]:
        """The shares [images, H, W] from which the score maps are combined, in the normalisation of `geometry.products`."""
        shares: dict[tuple[str, str], Tensor] = {}
        for role in mapped_among(self.roles):
            context = among[role]
            matrices = [matrix for share_role, matrix in shares_among(self.roles) if share_role == role]
            values = context.shares(torch.stack([centred[name] for name in matrices])) / (n * (n - 3))
            shares |= {(role, name): value for name, value in zip(matrices, values.unbind(0), strict=True)}
        return shares


@dataclass(frozen=True, eq=False)
class References:
    """One network's features of the reference images at one layer.

    features: [m, C, H, W]. distances: [m, m], between them.
    """

    features: Tensor
    distances: Tensor


class ReferenceGraph(ExplainerGraph):
    """Several networks, and the geometry of each image among m fixed reference images: images, labels -> the outputs of `ExplainerGraph`.

    references: per role, one `References` per layer. labels: of the reference images, integers [m].

    Each image is placed among the references, as the last of m + 1 images, so its outputs depend on no other image of the batch, and the
    batch may have one image. The outputs differ from those of `ExplainerGraph` in these points:

    - ``L/M/maps``, ``L/M/scaled`` and ``L/M/weights`` are those of `kdx.unicam` in reference mode;
    - ``L/K/maps`` are the image's own part of the maps of `kdx.decompose` over the m + 1 images. The sum of a map is the image's
      contribution to the score of those m + 1 images; the references contribute the rest;
    - ``L/scores`` [n, scores] are the scores of the m + 1 images.

    ``L/distances`` [roles, n, n] are those between the images of the batch, as in `ExplainerGraph`.

    labels: integers [n] with the meaning of the references' labels. A label that no reference has is a class of its own.
    """

    input_names = ("images", "labels")

    def __init__(
        self, networks: Mapping[str, FeatureGraph], references: Mapping[str, Sequence[References]], labels: Tensor, *, pooled: bool = False
    ) -> None:
        super().__init__(networks, pooled=pooled)
        self.labels: Tensor
        self.register_buffer("labels", labels.long())
        for role in self.roles:
            for index, layer in enumerate(references[role]):
                power = _powers([layer.features])[0].double()
                features = layer.features.double() * power
                centre = features.mean(0)
                values = {"centre": centre, "features": features - centre, "inside": layer.distances * power, "power": power}
                for name, value in values.items():
                    self.register_buffer(f"{name}_{role}_{index}", value.float())

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        inside = _label_distances(self.labels, self.labels)
        target_distances = geometry.bordered(inside, _label_distances(labels, self.labels))
        outputs = {role: network(images) for role, network in self.networks.items()}
        results = [logits for logits, *_ in outputs.values()]
        for index in range(len(self.layers)):
            among = {role: self._among(maps[index], role, index) for role, (_, *maps) in outputs.items()}
            results += self._layer(among, target_distances, (images.shape[2], images.shape[3]))
            results.append(torch.stack([_distances(among[role].features, self.pooled) / among[role].power for role in self.roles]))
        return tuple(results)

    def _among(self, features: Tensor, role: str, index: int) -> _Among:
        centre, references, inside, power = (
            self.get_buffer(f"{name}_{role}_{index}") for name in ("centre", "features", "inside", "power")
        )
        features = features * power
        return _Among.references(features, features - centre, references, inside, power, self.pooled)


@dataclass(frozen=True, eq=False)
class _Among:
    """One network's features of n images among others, at one layer, times a power of two that makes them ordinary numbers.

    features: [n, C, H, W]. own, others: features of the n images, and of those they are compared with, [m, C, H, W], minus one centre.
    distances: [n, n] if the two are the same, else [n, m+1, m+1], in which each image is the last one behind the m others. pooled: whether
    they are between spatial means.
    """

    features: Tensor
    own: Tensor
    others: Tensor
    distances: Tensor
    power: Tensor
    pooled: bool

    @classmethod
    def batch(cls, features: Tensor, power: Tensor, pooled: bool) -> _Among:
        """features: as the network returns them."""
        features = features * power
        centred = features - features.mean(0)
        return cls(features, centred, centred, _distances(features, pooled), power, pooled)

    @classmethod
    def references(cls, features: Tensor, own: Tensor, others: Tensor, inside: Tensor, power: Tensor, pooled: bool) -> _Among:
        """inside: the distances [m, m] between the others."""
        x, y = _rows(own, pooled), _rows(others, pooled)
        border = geometry.centred_distances(x, y, x.square().sum(1), y.square().sum(1), torch.float32)
        return cls(features, own, others, geometry.bordered(inside, border), power, pooled)

    def channel_weights(self, lap: Tensor) -> Tensor:
        """[n, C], from Laplacians of the shape of the distances. Weights that are only rounding are zero, as in `kdx.unicam`."""
        weights = self._mean_gradient(lap)
        return weights / (self.features.shape[2] * self.features.shape[3]) if self.pooled else weights

    def _mean_gradient(self, lap: Tensor) -> Tensor:
        """Lap times the spatial means."""
        # Lap maps constants to zero. Centred features keep the rounding of a large mean out of the differences.
        own = geometry.gap(self.own, torch.float32)
        sizes = self.own.abs().flatten(1).mean(1)
        if self.distances.ndim == 2:
            weights = geometry.gradient(lap, own)
            real = (weights.abs().amax(1) - _SUM * (lap.abs() @ sizes)).amax(0) > 0
            return torch.where(real, weights, 0.0)
        weights = geometry.query_gradient(lap, own, geometry.gap(self.others, torch.float32))
        row = lap[:, -1].abs()
        errors = _SUM * (row[:, :-1] @ self.others.abs().flatten(1).mean(1) + row[:, -1] * sizes)
        return torch.where((weights.abs().amax(1) > errors)[:, None], weights, 0.0)

    def shares(self, matrices: Tensor) -> Tensor:
        """`decomposition.cross_shares` on the grid of the features: [k, n, H, W] of U-centred matrices [k, ...] like the distances."""
        distances = self.distances
        if distances.ndim == 3:
            distances, matrices = distances[:, -1, :-1], matrices[:, :, -1, :-1]
        values = decomposition.cross_shares(self.own.flatten(2), self.others.flatten(2), distances, matrices)
        maps: Tensor = values.to(torch.float32).unflatten(2, self.features.shape[2:])
        return maps


def _rows(features: Tensor, pooled: bool) -> Tensor:
    """The rows between which distances are measured."""
    return geometry.gap(features, torch.float32) if pooled else features.flatten(1)


def _powers(values: Sequence[Tensor]) -> Sequence[Tensor]:
    """For each tensor the power of two [], 1 for ordinary values, that makes its largest value ordinary."""
    flat = [geometry.wide(tensor).flatten() for tensor in values]
    largest = torch.stack([torch.maximum(tensor.amax(0), -tensor.amin(0)).to(torch.float32) for tensor in flat])
    powers = torch.ones_like(largest)
    for exponent in _EXPONENTS:
        step = 2.0**exponent
        powers = torch.where(largest * powers <= 1 / step, powers * step, powers)
        powers = torch.where(largest * powers >= step, powers / step, powers)
    return powers.unbind(0)


def _distances(features: Tensor, pooled: bool) -> Tensor:
    """The distances [n, n] between features [n, C, H, W]."""
    # Without their centre, means of positions keep more digits.
    return geometry.distances(_rows(features - features.mean(0) if pooled else features, pooled), torch.float32)


def _label_distances(labels: Tensor, others: Tensor) -> Tensor:
    """The distances [n, m] between the one-hot rows of labels [n] and [m]."""
    return (labels[:, None] != others[None, :]).to(torch.float32) * 2**0.5


Graph = FeatureGraph | GradientGraph | ExplainerGraph
"""A graph that can be exported and run, with named inputs and outputs."""

"""What `benchmarks.evidence` measures: scores of several kinds, and where maps are high relative to the masks of the objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

import kdx
from benchmarks.planted import cell_shares
from kdx.data.batches import random_batches
from kdx.export.graphs import FeatureGraph
from kdx.features.target import Target
from kdx.kernels import geometry
from kdx.maps.gradients import gradient_runner
from kdx.maps.salient_images import Salience, ranking_maps
from kdx.models.network import Network
from kdx.runtimes.eager import EagerRunner

Features = Mapping[str, Tensor]
"""The features [n, C, H, W] of one layer by role."""

PUBLISHED_BATCH = 5
_CHUNK = 256
"""Images per pass of a network."""

PUBLISHED_SALIENCE = Salience(keep=0.5, noise=0.01, of_class="true", score="probability", image="published")
"""The batch and the salient images of ``kdx explain --preset published``."""


class MeasuredNetwork:
    """A trained network with its logits, features and salient features of a set of images [n, 3, height, width] in [0, 1].

    The network runs in float32 on the device. The results are on the processor, where scores and maps are computed: many processes share
    one GPU, and each would wait for it after every small step.
    """

    def __init__(self, network: Network, layers: Sequence[str], device: torch.device) -> None:
        self.layers, self.network, self.device = tuple(layers), network, device
        self._runner = EagerRunner(FeatureGraph(network.module.eval(), self.layers, network.preprocessing), device)

    def features(self, images: Tensor) -> dict[str, Tensor]:
        return self.outputs(images)[1]

    def logits(self, images: Tensor) -> Tensor:
        return self.outputs(images)[0]

    def outputs(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits [n, classes], and features [n, C, H, W] by layer."""
        logits, features = [], {layer: [] for layer in self.layers}  # type: tuple[list[Tensor], dict[str, list[Tensor]]]
        for chunk in images.split(_CHUNK):
            part = self._runner.infer(chunk)
            logits.append(part.logits.cpu())
            for layer in self.layers:
                features[layer].append(part.features[layer].cpu())
        return torch.cat(logits), {layer: torch.cat(pieces) for layer, pieces in features.items()}

    def salient_features(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The features of the network's salient images, made as in the published preset: the deepest layer ranks the pixels."""
        cotangents = PUBLISHED_SALIENCE.cotangents(self.logits(images), labels)
        with gradient_runner(self.network, self.layers[-1], images, str(self.device)) as (runner, layer, batch):
            maps = ranking_maps(runner, [layer], batch, cotangents, _CHUNK)[layer].cpu()
        return self.features(PUBLISHED_SALIENCE.images(images, maps, 0, self.network.preprocessing))


# ---- scores ----


@dataclass(frozen=True)
class Scoring:
    """How scores are computed. batch: the images of a set of distances; None for all. mean: whether the ratios of batches are averaged,
    and not their inner products summed. biased: whether distances are double-centred (the V-statistic), and not U-centred."""

    batch: int | None = None
    mean: bool = False
    biased: bool = False

    def scores(self, features: Features, labels: NDArray[np.int64], seed: int = 0) -> dict[str, float]:
        """FSS(S,T), FSS(B,T), RS(T), RS(S), RS(B), RS(S|B) and RS(B|S)."""
        n = len(labels)
        batches = [np.arange(n)] if self.batch is None else random_batches(labels, self.batch, seed)
        matrices = {role: self._matrices(values.flatten(1), batches) for role, values in features.items()}
        target = [Target.of(torch.from_numpy(labels[batch]), len(batch)).distances for batch in batches]
        matrices["G"] = torch.stack([part.raw if self.biased else part.centred for part in target]).double()
        if self.biased:
            matrices["G"] = geometry.double_centered(matrices["G"])
        names = {"student": "S", "teacher": "T", "base": "B"}
        result = {f"RS({names[role]})": self._correlation(matrices[role], matrices["G"]) for role in features}
        for role in ("student", "base"):
            result[f"FSS({names[role]},T)"] = self._correlation(matrices[role], matrices["teacher"])
        for role, given in (("student", "base"), ("base", "student")):
            residual = self._residual(matrices[role], matrices[given])
            result[f"RS({names[role]}|{names[given]})"] = self._correlation(residual, matrices["G"])
        return result

    def _matrices(self, rows: Tensor, batches: Sequence[NDArray[np.int64]]) -> Tensor:
        stacked = torch.stack([rows[torch.from_numpy(batch)] for batch in batches]).double()
        centring = geometry.double_centered if self.biased else geometry.u_centered
        distances = torch.cdist(stacked, stacked, compute_mode="use_mm_for_euclid_dist")
        return centring(distances.masked_fill(torch.eye(stacked.shape[1], dtype=torch.bool), 0))

    def _residual(self, a: Tensor, b: Tensor) -> Tensor:
        if self.mean:
            return geometry.residual(a, b)
        return a - geometry.dot(a, b).sum() / geometry.dot(b, b).sum() * b

    def _correlation(self, a: Tensor, b: Tensor) -> float:
        if self.mean:
            return float(geometry.correlation(a, b).mean())
        product, a_square, b_square = (float(geometry.dot(*pair).sum()) for pair in ((a, b), (a, a), (b, b)))
        norm = float(np.sqrt(a_square * b_square))
        return product / norm if norm else 0.0  # 0 for constant features, as in the definition of distance correlation


# ---- maps ----


def unicam_maps(
    features: Features, explained: str, given: str, labels: NDArray[np.int64], batch: int | None = None, **options: str
) -> Tensor:
    """UniCAM's maps [n, H, W] of one network given another, among all images or in random batches."""
    n = len(labels)
    batches = [np.arange(n)] if batch is None else random_batches(labels, batch, 0)
    x, y = features[explained], features[given]
    maps = x.new_zeros((n, *x.shape[2:]))
    for indices in batches:
        chosen = torch.from_numpy(indices)
        maps[chosen] = kdx.unicam(x[chosen], y[chosen], torch.from_numpy(labels[indices]), **options).maps  # type: ignore[arg-type]
    return maps


def map_kinds(features: Features, labels: NDArray[np.int64]) -> dict[str, tuple[Tensor, Tensor]]:
    """For each kind of map the *distilled* one and the *residual* one [n, H, W].

    The positive part of RS(S) - RS(B) shows where the student is more relevant, and its negative part where the base is.
    """
    target = torch.from_numpy(labels)
    student, base = features["student"], features["base"]
    pair = (("student", "base"), ("base", "student"))

    def unicam(batch: int | None = None, **options: str) -> tuple[Tensor, Tensor]:
        first, second = (unicam_maps(features, explained, given, labels, batch, **options) for explained, given in pair)
        return first, second

    difference = kdx.decompose(student, target, minus=base).maps
    return {
        "UniCAM, batches of 5": unicam(PUBLISHED_BATCH),
        "UniCAM": unicam(),
        "UniCAM, elementwise": unicam(weighting="elementwise"),
        "UniCAM, uniqueness": unicam(objective="uniqueness"),
        "decomposition of RS(S|B), RS(B|S)": (
            kdx.decompose(student, target, given=base).maps,
            kdx.decompose(base, target, given=student).maps,
        ),
        "decomposition of RS(S) − RS(B)": (difference, -difference),
    }


@dataclass(frozen=True)
class Objects:
    """Where objects are, on the grid of a layer: the share of each cell that lies in the object, and the distance of each cell from it
    relative to the height of the image [n, H, W]. The distance is 0 inside the object."""

    shares: NDArray[np.float64]
    distances: NDArray[np.float64]

    @classmethod
    def of(cls, masks: NDArray[np.bool_], rows: int, columns: int) -> Objects:
        n, height, width = masks.shape
        pixels = np.stack([ndimage.distance_transform_edt(~mask) for mask in masks]) / height
        blocks = pixels.reshape(n, rows, height // rows, columns, width // columns)
        return cls(cell_shares(masks, rows, columns), np.asarray(blocks.mean((2, 4)), np.float64))

    def place(self, maps: Tensor) -> dict[str, float]:
        """Where the positive part M of maps [n, H, W] is, as means over the images whose map has a positive value.

        density: the share of M in the object, divided by the object's share of the area; 1 for a constant map. distance: the mean
        distance of M from the object. background: the share of M outside the object. empty: the share of images without a positive value.
        """
        positive = maps.double().numpy().clip(0)
        full = positive.any((1, 2))
        weights = positive[full] / positive[full].sum((1, 2), keepdims=True)
        shares = self.shares[full]
        inside = (weights * shares).sum((1, 2))
        return {
            "density": float((inside / shares.mean((1, 2))).mean()),
            "distance": float((weights * self.distances[full]).sum((1, 2)).mean()),
            "background": float(1 - inside.mean()),
            "empty": float(1 - full.mean()),
        }

    def constant(self) -> dict[str, float]:
        """`place` of a constant map."""
        return self.place(torch.ones(self.shares.shape))

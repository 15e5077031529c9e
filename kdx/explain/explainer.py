"""The Explainer: compares student, base and optional teacher on any images, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Generic, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdx.choices import Features, GeometryName, ObjectiveName, Precision, RuntimeName, SalientClass, SalientScore, Weighting
from kdx.errors import KdxError
from kdx.explain.explainer_file import ExplainerFile
from kdx.explain.layer import LayerMeasurement
from kdx.explain.map_statistics import stability
from kdx.explain.network_set import NetworkRecord, NetworkSet
from kdx.explain.networks import NetworkLike, NetworkRunners
from kdx.explain.settings import Settings
from kdx.features import arrays
from kdx.features.arrays import Array, ArrayT
from kdx.features.score_maps import terms
from kdx.kernels import ambient
from kdx.maps.decomposition import Decomposition
from kdx.maps.drawing import Sheet
from kdx.maps.figures import DRAWN_KINDS, Drawable, chosen_kinds, layers_sheet
from kdx.maps.unicam import Maps
from kdx.roles import MAPS, TARGET, ScoreMap, roles_among, score_maps_among
from kdx.runtimes.choice import Choice
from kdx.scores.pool import pooled_scores
from kdx.scores.score import Contrast, Score
from kdx.scores.uncertainty import permutation_table


@dataclass(frozen=True)
class LayerResult(Drawable, Generic[ArrayT]):
    """The comparison of the networks at one layer.

    distilled, residual, missed, new: the maps (`kdx.roles.MAPS`). The student's features that the base's do not explain, the base's
    that the student's do not, the teacher's that the student's do not, and the student's that the teacher's do not. Without a teacher
    the last two are None, and no score or contrast involves it.
    score_maps: signed maps that add up to a score or contrast over all images and positions, by their symbol in `kdx.roles.SCORE_MAPS`:
    ``score_maps["RS(S) - RS(B)"]`` is what `kdx.decompose` returns for the student and the target, minus the base. Empty with salient
    features, and for explainer files of older versions.
    scores: by name (`kdx.roles.SCORES`). contrasts: the differences of two scores by name, each with its confidence interval.
    """

    distilled: Maps[ArrayT]
    residual: Maps[ArrayT]
    missed: Maps[ArrayT] | None
    new: Maps[ArrayT] | None
    score_maps: dict[str, Decomposition[ArrayT]]
    scores: dict[str, Score]
    contrasts: dict[str, Contrast]

    @property
    def fss(self) -> Score:
        """FSS(S,T): the similarity of the student's and the teacher's features. Raises KdxError without a teacher."""
        if "FSS(S,T)" not in self.scores:
            raise KdxError("FSS compares the student with its teacher, and there is none.", "Give kdx.Explainer a teacher.")
        return self.scores["FSS(S,T)"]

    @property
    def rs(self) -> Score:
        """RS(S): the relevance of the student's features to the target."""
        return self.scores["RS(S)"]

    @property
    def kinds(self) -> dict[str, Maps[ArrayT] | Decomposition[ArrayT]]:
        """All maps of the layer: those that add up to a score by symbol, then UniCAM's by name."""
        unicam = {name: getattr(self, name) for name in MAPS}
        return {**self.score_maps, **{name: maps for name, maps in unicam.items() if maps is not None}}

    def _count(self) -> int:
        return len(next(iter(self.kinds.values())).maps)

    def _sheet(self, images: list[NDArray[np.uint8]] | None, index: list[int], kinds: Sequence[str] | None) -> Sheet:
        return layers_sheet({"": self.kinds}, images, index, chosen_kinds(kinds, DRAWN_KINDS, list(self.kinds)))


@dataclass(frozen=True)
class Explanation(Drawable, Generic[ArrayT]):
    """The explanation of the images of one call: a LayerResult per layer, and each role's logits [n, classes]."""

    layers: dict[str, LayerResult[ArrayT]]
    logits: dict[str, ArrayT]

    def _count(self) -> int:
        return len(next(iter(self.logits.values())))

    def _sheet(self, images: list[NDArray[np.uint8]] | None, index: list[int], kinds: Sequence[str] | None) -> Sheet:
        layers = {name: layer.kinds for name, layer in self.layers.items()}
        return layers_sheet(layers, images, index, chosen_kinds(kinds, DRAWN_KINDS[:1], list(next(iter(layers.values())))))


class Explainer:
    """Explains images with two or three networks: ``explainer(images, labels) -> Explanation``.

    student, base, teacher: a model reference, the path of a file that ``kdx export`` wrote, a `kdx.models.Network`, or a PyTorch
    module (used as it is, without preprocessing). The teacher is optional.
    layers: names that all networks share, or a mapping from the student's and base's layer to the teacher's.
    runtime: ``auto``, ``eager``, ``onnx``, ``openvino`` or ``tensorrt``. The last three export the networks once, into ``folder`` or a
    temporary folder. Files in ``folder`` are used again, except for PyTorch modules, whose code no reference identifies.
    device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
    precision: the number format of the networks. ``tf32`` lets a GPU round the factors of products and convolutions to ten bits, in the
    runtimes eager and onnx. ``bfloat16`` needs the runtime openvino and a CPU that supports it. Features then
    keep two to three digits; maps and scores are computed from them in float32.
    geometry: the images that an image is compared with. ``whole`` and ``batch`` both stand for all images of one call, so give a set in
    one call; ``kdx explain`` is for sets that do not fit in memory. ``reference`` stands for the images of `use_references`, which must be
    called first; UniCAM's maps are then compared with them, and scores and the maps that add up to them with the images of the call.
    ``auto`` is reference after `use_references`, and whole otherwise.
    objective, weighting: as in `kdx.unicam`.
    chunk: images per pass of a network, by default all images of a call, or 64 for an engine. It does not change the results.
    permutations, confidence, seed: for the p-values and intervals of the scores.
    file: an explainer file. It replaces the networks, the objective and the weighting; its layers are the default.
    features: ``raw``, or ``salient`` for scores, contrasts and p-values of salient features. At each layer these are a network's features
    of its own salient images (`kdx.salient_images`), in which the share ``keep`` of the pixels is kept and the rest is imputed with
    ``noise``. salient_class: the class of which pixels are kept: the one that the network ``predicted``, or the ``true`` one.
    salient_score: whether the ``logit`` of that class or its ``probability`` (softmax) ranks the pixels; a probability of 1 has no
    gradient. The maps are always those of the raw features. Salient features cost one additional backward pass per network, and one
    additional forward pass per network and layer. Exported files contain no gradients for them.

    The explainer is a context manager; `close` frees the networks. ``choice.why`` states in one line what ``auto`` chose and why. If a
    network cannot be exported, ``auto`` falls back to PyTorch and states it there; any other runtime raises KdxError.
    """

    def __init__(
        self,
        *,
        student: NetworkLike | None = None,
        base: NetworkLike | None = None,
        teacher: NetworkLike | None = None,
        layers: str | Iterable[str] | Mapping[str, str] = (),
        runtime: RuntimeName = "auto",
        device: str = "auto",
        precision: Precision = "float32",
        geometry: GeometryName = "auto",
        objective: ObjectiveName = "relevance",
        weighting: Weighting = "gap",
        chunk: int | None = None,
        permutations: int = 999,
        confidence: float = 0.95,
        seed: int = 0,
        folder: Path | None = None,
        file: str | Path | None = None,
        features: Features = "raw",
        keep: float = 0.5,
        noise: float = 0.0,
        salient_class: SalientClass = "predicted",
        salient_score: SalientScore = "logit",
    ) -> None:
        settings = Settings(
            runtime=runtime,
            device=device,
            precision=precision,
            geometry=geometry,
            objective=objective,
            weighting=weighting,
            chunk=chunk,
            permutations=permutations,
            confidence=confidence,
            seed=seed,
            features=features,
            keep=keep,
            noise=noise,
            salient_class=salient_class,
            salient_score=salient_score,
        )
        roles = {"teacher": teacher, "student": student, "base": base}
        networks = {role: network for role, network in roles.items() if network is not None}
        self._set_up(networks, layers, settings, folder, None if file is None else Path(file))

    @classmethod
    def of(
        cls,
        networks: Mapping[str, NetworkLike],
        layers: str | Iterable[str] | Mapping[str, str],
        settings: Settings,
        *,
        folder: Path | None = None,
        file: Path | None = None,
    ) -> Self:
        """An explainer of networks by role, or of an explainer file, from one Settings object."""
        explainer = cls.__new__(cls)
        explainer._set_up(networks, layers, settings, folder, file)
        return explainer

    def _set_up(
        self,
        networks: Mapping[str, NetworkLike],
        layers: str | Iterable[str] | Mapping[str, str],
        settings: Settings,
        folder: Path | None,
        file: Path | None,
    ) -> None:
        if isinstance(layers, str):
            layers = [layers]
        pairs = dict(layers) if isinstance(layers, Mapping) else {layer: layer for layer in layers}
        self.settings = settings
        self._has_references = False
        self._networks: NetworkSet
        if file is None:
            self._networks = NetworkRunners({role: networks[role] for role in roles_among(networks)}, pairs, settings, folder)
        elif networks:
            raise ValueError(f"an explainer file contains its networks; do not give {', '.join(networks)} as well")
        else:
            self._networks = ExplainerFile(file, pairs, settings, folder)
        self.layers, self.roles = self._networks.layers, self._networks.roles

    @property
    def choice(self) -> Choice:
        """The runtime and device, and the reason."""
        return self._networks.choice

    @ambient.neutral()
    def open(self, image_size: tuple[int, int]) -> None:
        """Prepare for images of this size; otherwise the first call does this. Every runtime except eager then exports the networks."""
        self._networks.open(image_size)

    def networks(self) -> dict[str, NetworkRecord]:
        """The record of each role's network: its reference, hash, parameter count, preprocessing, image size and whether it is trained."""
        return self._networks.networks()

    @ambient.neutral()
    def use_references(self, images: Array, labels: Array) -> None:
        """Switch to reference mode: UniCAM maps every later image among these m images instead of the other images of the call.

        images [m, 3, h, w] in [0, 1]. labels [m]. An explainer file has no reference mode and raises KdxError.
        """
        if self.settings.geometry in ("whole", "batch"):
            raise KdxError(
                f"The explainer has the geometry {self.settings.geometry}, which compares an image with the others of its call.",
                'Make it with geometry="reference" or "auto".',
            )
        arrays.check_same(len(labels), len(images), "reference labels", "reference images")
        self._has_references = True
        self._networks.use_references(arrays.pixels(images), arrays.tensor(labels, "reference labels"))

    @ambient.neutral()
    def features(self, images: Tensor) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        """Each role's logits [n, classes], and per layer each role's features [n, C, H, W], of images [n, 3, h, w] in [0, 1].

        Raises KdxError for an explainer file, which does not output features.
        """
        return self._networks.features(arrays.pixels(images))

    @ambient.neutral()
    def explain(
        self, images: Tensor, labels: Tensor, seed: int | Sequence[int] | None = None, *, classes: Tensor | None = None
    ) -> tuple[dict[str, Tensor], dict[str, LayerMeasurement]]:
        """Each role's logits [n, classes] and one LayerMeasurement per layer, from images [n, 3, h, w] in [0, 1] and labels [n] or [n, e].

        seed: of the permutations for p-values and of the noise in salient images; by default the explainer's own. classes [n]: the true
        classes, for salient features of the true class where the labels are an embedding. Calling the explainer turns the same
        measurements into scores.
        """
        if isinstance(seed, Tensor):
            raise TypeError("explain makes its permutations itself: give only a seed")
        seed = self.settings.seed if seed is None else seed
        permutations = permutation_table(len(labels), self.settings.permutations, seed)
        return self._networks.explain(arrays.pixels(images), labels, permutations, np.random.SeedSequence(seed), classes)

    @ambient.neutral()
    def __call__(self, images: ArrayT, labels: Array, *, classes: Array | None = None) -> Explanation[ArrayT]:
        """Maps and scores of n images [n, 3, h, w] in [0, 1] with labels [n] or an embedding [n, e], from NumPy or PyTorch.

        classes [n]: as in `explain`.
        """
        batch, target = arrays.tensor(images, "images"), arrays.tensor(labels, "target")
        arrays.check_images(len(batch))
        arrays.check_same(len(target), len(batch), "the target", "images")
        if self.settings.geometry == "reference" and not self._has_references:
            raise KdxError("The geometry reference needs reference images.", "Call use_references(images, labels) first.")
        true = None if classes is None else arrays.tensor(classes, "classes")
        logits, measurements = self.explain(batch, target, classes=true)
        layers = {layer: self._result(measurement, len(batch), images) for layer, measurement in measurements.items()}
        return Explanation(layers, {role: arrays.like(rows, images) for role, rows in logits.items()})

    def _result(self, measurement: LayerMeasurement, n: int, images: ArrayT) -> LayerResult[ArrayT]:
        summary = pooled_scores(
            measurement.products,
            measurement.permuted,
            measurement.moments,
            n=n,
            confidence=self.settings.confidence,
            roles=self.roles,
        )
        maps = {
            name: Maps(arrays.like(value.maps, images), arrays.like(value.weights, images), value.score)
            for name, value in measurement.maps.items()
        }
        score_maps = {
            kind.symbol: self._decomposition(kind, measurement, images)
            for kind in score_maps_among(self.roles).values()
            if measurement.shares
        }
        return LayerResult(
            maps["distilled"], maps["residual"], maps.get("missed"), maps.get("new"), score_maps, summary.scores, summary.contrasts
        )

    def _decomposition(self, kind: ScoreMap, measurement: LayerMeasurement, images: ArrayT) -> Decomposition[ArrayT]:
        parts = terms(kind, measurement.shares, measurement.products, (*self.roles, TARGET))  # [contexts, n, h, w]
        contexts = torch.stack(parts).sum(0)
        maps = contexts.sum(0)
        other = arrays.like(-parts[1].sum(0), images) if len(parts) == 2 else None
        known = arrays.like(stability(*contexts), images) if len(contexts) == 2 else None  # an explainer file gives one context
        return Decomposition(arrays.like(maps, images), arrays.like(parts[0].sum(0), images), other, float(maps.sum()), known)

    def close(self) -> None:
        self._networks.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        self.close()

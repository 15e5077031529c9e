"""The Explainer: student, base and teacher and their layers, ready to say of any batch what passed between them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from torch import Tensor

from kdx.choices import Features, ObjectiveName, Precision, RuntimeName, Weighting
from kdx.errors import KdxError
from kdx.explain.explainer_file import ExplainerFile
from kdx.explain.layer import LayerMeasurement
from kdx.explain.networks import NetworkLike, Runners
from kdx.explain.settings import Settings
from kdx.features import arrays
from kdx.features.arrays import Array
from kdx.maps.unicam import Maps
from kdx.roles import roles_among
from kdx.runtimes.choice import Choice
from kdx.scores.pool import pooled_scores
from kdx.scores.score import Contrast, Score
from kdx.scores.uncertainty import permutation_table


@dataclass(frozen=True)
class LayerResult:
    """What passed between the networks at one layer: maps, scores by name, differences of scores.

    distilled: the student's features that the base's do not explain; residual: the base's that the student's do not;
    missed: the teacher's that the student's do not; new: the student's that the teacher's do not. Without a teacher the
    last two are None, and no score or difference names it.
    """

    distilled: Maps[Any]
    residual: Maps[Any]
    missed: Maps[Any] | None
    new: Maps[Any] | None
    scores: dict[str, Score]
    contrasts: dict[str, Contrast]

    @property
    def fss(self) -> Score:
        """FSS(S,T), how alike student and teacher are. Raises KdxError where there is no teacher."""
        if "FSS(S,T)" not in self.scores:
            raise KdxError("FSS compares the student with its teacher, and there is none.", "Give kdx.Explainer a teacher.")
        return self.scores["FSS(S,T)"]

    @property
    def rs(self) -> Score:
        """RS(S), how relevant the student's features are to the target."""
        return self.scores["RS(S)"]


@dataclass(frozen=True)
class Explanation:
    """One batch explained: a LayerResult a layer, and each role's logits [n, classes]."""

    layers: dict[str, LayerResult]
    logits: dict[str, Any]


class Explainer:
    """Explains batches of images by two or three networks: ``explainer(images, labels) -> Explanation``.

    student, base, teacher: a model reference, a path of a file that ``kdx export`` wrote, a `kdx.models.Network`, or a
    PyTorch module (taken as it is, without preprocessing); the teacher may be left out. layers: names, shared by all, or a
    mapping from the student's and base's layer to the teacher's. runtime: ``auto``, ``eager``, ``onnx``, ``openvino`` or ``tensorrt``;
    the last three export the networks once, into ``folder`` or a temporary one. What is in ``folder`` is used again, but for PyTorch
    modules, whose code has no name to know it by. objective, weighting: as in `kdx.unicam`. chunk: how many images go through
    a network at once (by default all of a batch, or 64 where an engine is built); it changes no result. permutations,
    confidence, seed: of the scores. file: an explainer file, which stands in place of the networks, the layers (all of its, where
    none is named), the objective and the weighting.

    features: ``raw``, or ``salient`` for scores, contrasts and p-values of salient features, as published: at each layer, a
    network's features of its own salient images (`kdx.salient_images`, of the class that it predicts), of which the share
    ``keep`` is kept and the rest imputed with ``noise``. The maps are those of the raw features either way. Salient features
    cost a backward pass a network and a forward pass a layer more; exported files hold no gradients for them.

    precision: of the networks. ``bfloat16`` is openvino's, on a CPU that has it; features then keep two to three digits, and
    what is made of them stays float32.

    A context manager; `close` frees the networks. ``choice.why`` says in a line what ``auto`` chose and why. Where a network
    cannot be exported, ``auto`` takes PyTorch and says so there; a runtime asked for by name raises.
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
    ) -> None:
        settings = Settings(
            runtime=runtime,
            device=device,
            precision=precision,
            objective=objective,
            weighting=weighting,
            chunk=chunk,
            permutations=permutations,
            confidence=confidence,
            seed=seed,
            features=features,
            keep=keep,
            noise=noise,
        )
        named = {"teacher": teacher, "student": student, "base": base}
        networks = {role: network for role, network in named.items() if network is not None}
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
        """An explainer of networks by role, or of an explainer file, with settings that are at hand as one object."""
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
        self.layers = dict(layers) if isinstance(layers, Mapping) else {layer: layer for layer in layers}
        self.settings = settings
        self._source: Runners | ExplainerFile
        if file is not None:
            if networks:
                raise ValueError(f"an explainer file contains its networks; do not give {', '.join(networks)} as well")
            self._source = ExplainerFile(file, self.layers, settings, folder)
            self.layers, self.roles = self._source.layers, self._source.roles
            return
        self.roles = roles_among(networks)
        self._source = Runners({role: networks[role] for role in self.roles}, self.layers, settings, folder)

    @property
    def choice(self) -> Choice:
        """The runtime and device, and why."""
        return self._source.choice

    def open(self, image_size: tuple[int, int]) -> None:
        """Make ready for images of this size; the first call does it too. Under onnx this exports the networks."""
        self._source.open(image_size)

    def networks(self) -> dict[str, dict[str, Any]]:
        """What is known of each role's network: reference, weights' SHA-256, parameter count, preprocessing, the image size
        that it takes (None where any will do), and whether its weights are trained ones, as far as can be told."""
        return self._source.networks()

    def use_references(self, images: Array, labels: Array) -> None:
        """Switch to reference mode: every later image is mapped among these m images, whatever stands beside it in its batch."""
        arrays.check_same(len(labels), len(images), "reference labels", "reference images")
        self._source.use_references(arrays.pixels(images), arrays.tensor(labels, "reference labels"))

    def explain(
        self, images: Tensor, labels: Tensor, seed: int | Sequence[int] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, LayerMeasurement]]:
        """Each role's logits [n, classes] and one LayerMeasurement per layer, from images [n, 3, h, w] in [0, 1] and labels [n] or [n, e].

        seed: seeds the permutations of the p-values and the noise in salient images; by default it is the explainer's own. Calling the
        explainer turns the same numbers into scores.
        """
        seed = self.settings.seed if seed is None else seed
        permutations = permutation_table(len(labels), self.settings.permutations, seed)
        return self._source.explain(arrays.pixels(images), labels, permutations, np.random.SeedSequence(seed))

    def __call__(self, images: Array, labels: Array) -> Explanation:
        """Maps and scores of one batch: images [n, 3, h, w] in [0, 1], labels [n] or embedding [n, e], NumPy or PyTorch."""
        batch, target = arrays.tensor(images, "images"), arrays.tensor(labels, "target")
        arrays.check_images(len(batch))
        arrays.check_same(len(target), len(batch), "the target", "images")
        logits, measurements = self.explain(batch, target)
        layers = {layer: self._result(measurement, len(batch), images) for layer, measurement in measurements.items()}
        return Explanation(layers, {role: arrays.like(rows, images) for role, rows in logits.items()})

    def _result(self, measurement: LayerMeasurement, n: int, images: Array) -> LayerResult:
        summary = pooled_scores(
            measurement.products,
            measurement.permuted,
            measurement.left_out,
            n=n,
            confidence=self.settings.confidence,
            roles=self.roles,
        )
        maps = {
            name: Maps(arrays.like(value.maps, images), arrays.like(value.weights, images), value.score)
            for name, value in measurement.maps.items()
        }
        return LayerResult(maps["distilled"], maps["residual"], maps.get("missed"), maps.get("new"), summary.scores, summary.contrasts)

    def close(self) -> None:
        self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        self.close()

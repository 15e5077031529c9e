"""The Explainer: student, base and teacher and their layers, ready to say of any batch what passed between them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, get_args

import numpy as np
from torch import Tensor

from kdx import arrays, transfer
from kdx.arrays import Array
from kdx.errors import KdxError
from kdx.export.graphs import ExplainerGraph, FeatureGraph
from kdx.kernels import geometry
from kdx.models import Network
from kdx.runner import Precision
from kdx.runtime import Choice, RuntimeName
from kdx.salient import Salience
from kdx.scores import Score, permutation_table
from kdx.sources import ExplainerFile, NetworkLike, Runners, without_gradients
from kdx.transfer import Measured, roles_among
from kdx.unicam import Maps, ObjectiveName, Weighting, check_weighting

Features = Literal["raw", "salient"]
"""What scores are measured on: networks' features of the images, or of each network's salient images."""


@dataclass(frozen=True)
class LayerResult:
    """What passed between the networks at one layer: maps, scores by name, differences of scores.

    distilled: the student's features that the base's do not explain; residual: the base's that the student's do not;
    missed: the teacher's that the student's do not; new: the student's that the teacher's do not. Without a teacher the
    last two are None, and no score or difference names it.
    """

    distilled: Maps
    residual: Maps
    missed: Maps | None
    new: Maps | None
    scores: dict[str, Score]
    contrasts: dict[str, tuple[float, tuple[float, float]]]

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
        salience = _salience(features, keep, noise)
        if isinstance(layers, str):
            layers = [layers]
        self.layers = dict(layers) if isinstance(layers, Mapping) else {layer: layer for layer in layers}
        self.permutations = permutations
        self.confidence = confidence
        self.seed = seed
        self._source: Runners | ExplainerFile
        named = {"teacher": teacher, "student": student, "base": base}
        given = {role: network for role, network in named.items() if network is not None}
        if file is not None:
            if given:
                raise ValueError(f"an explainer file holds its networks: no {', '.join(given)} beside it")
            if chunk is not None:
                raise KdxError("An explainer file takes a batch whole.", "Leave the chunk out and choose a smaller batch.")
            if (objective, weighting) != ("relevance", "gap"):
                raise KdxError(
                    f"The maps of an explainer file are of relevance, weighted by channel, not of {objective} weighted {weighting}.",
                    "Give the networks themselves for other maps.",
                )
            if salience is not None:
                raise without_gradients("An explainer file holds")
            self._source = ExplainerFile(Path(file), self.layers, runtime, device, precision=precision, folder=folder)
            self.layers, self.roles = self._source.layers, self._source.roles
            return
        if objective not in geometry.OBJECTIVES:
            raise ValueError(f"no objective {objective!r}")
        check_weighting(weighting)
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk must be 1 or more, not {chunk}")
        paired = [f"{layer}={other}" for layer, other in self.layers.items() if layer != other]
        if teacher is None and paired:
            raise KdxError(
                f"{paired[0]} pairs a layer with one of the teacher's, and there is no teacher.", "Name the layer alone, or give a teacher."
            )
        self.roles = roles_among(given)
        self._source = Runners(
            {role: given[role] for role in self.roles},
            self.layers,
            runtime,
            device,
            precision=precision,
            objective=geometry.OBJECTIVES[objective],
            weighting=weighting,
            chunk=chunk,
            folder=folder,
            salience=salience,
        )

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
        self, images: Tensor, labels: Tensor, permutations: Tensor, seed: int | Sequence[int] = 0
    ) -> tuple[dict[str, Tensor], dict[str, Measured]]:
        """Each role's logits [n, classes] and a Measured a layer, from images [n, 3, h, w] in [0, 1] and labels [n] or [n, e].

        permutations [p, n] are those of the p-values, seed that of the noise in salient images. Calling the explainer makes
        scores of the same numbers.
        """
        return self._source.explain(arrays.pixels(images), labels, permutations, np.random.SeedSequence(seed))

    def __call__(self, images: Array, labels: Array) -> Explanation:
        """Maps and scores of one batch: images [n, 3, h, w] in [0, 1], labels [n] or embedding [n, e], NumPy or PyTorch."""
        batch, target = arrays.tensor(images, "images"), arrays.tensor(labels, "target")
        arrays.check_images(len(batch))
        arrays.check_same(len(target), len(batch), "the target", "images")
        logits, measured = self.explain(batch, target, permutation_table(len(batch), self.permutations, self.seed), self.seed)
        layers = {}
        for layer, found in measured.items():
            summary = transfer.pool(found.products, found.moved, found.left_out, n=len(batch), confidence=self.confidence, roles=self.roles)
            maps = {
                name: Maps(arrays.like(value.maps, images), arrays.like(value.weights, images), value.score)
                for name, value in found.maps.items()
            }
            layers[layer] = LayerResult(
                maps["distilled"], maps["residual"], maps.get("missed"), maps.get("new"), summary.scores, summary.contrasts
            )
        return Explanation(layers, {role: arrays.like(rows, images) for role, rows in logits.items()})

    def close(self) -> None:
        self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        self.close()


def explainer_graph(networks: Mapping[str, Network], layers: Mapping[str, str]) -> ExplainerGraph:
    """The graph of an explainer file: a network a role, and the student's and base's layers with the teacher's."""
    roles = roles_among(networks)
    if len({networks[role].weights_hash for role in ("student", "base")}) == 1:
        raise KdxError("The student and the base have the same weights, so neither holds what the other does not.", "Name two networks.")
    graphs = {
        role: FeatureGraph(networks[role].module, [*(layers.values() if role == "teacher" else layers)], networks[role].preprocessing)
        for role in roles
    }
    matrices = {name: definition.matrices for name, definition in transfer.scores_among(roles).items()}
    return ExplainerGraph(graphs, transfer.maps_among(roles), matrices)


def largest_size(sizes: Iterable[tuple[int, int] | None]) -> tuple[int, int]:
    """The largest size, by area, that a network asks for: the graphs of the others resize it. KdxError where none asks for one."""
    asked = [size for size in sizes if size is not None]
    if not asked:
        raise KdxError(
            "None of the networks says what size of image it takes.", "Give it in the models file: [preprocessing] size = [height, width]."
        )
    return max(asked, key=lambda size: size[0] * size[1])


def _salience(features: Features, keep: float, noise: float) -> Salience | None:
    """What salient images keep; None for raw features, of which nothing is left out."""
    if features not in get_args(Features):
        raise ValueError(f"no features {features!r}")
    salience = Salience(keep, noise)
    if features == "salient":
        return salience
    if salience != Salience():
        raise KdxError(
            "A share of pixels to keep, or noise, is said of salient features, and the features are raw.",
            "Choose salient features (--features salient), or leave keep and noise out.",
        )
    return None

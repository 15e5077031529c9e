"""The Explainer: three networks and their layers, ready to say of any batch what passed between them."""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, get_args

import torch
from torch import Tensor, nn

from kdx import arrays, models, transfer
from kdx.arrays import Array
from kdx.errors import KdxError
from kdx.export import onnx_file
from kdx.export.graphs import FeatureGraph, Preprocessing
from kdx.kernels import geometry
from kdx.models import Network
from kdx.runtime import Choice, EagerRunner, OrtRunner, Outputs, Runner, RuntimeName, choose
from kdx.scores import Score, permutation_table
from kdx.transfer import ROLES, Measured, References, Target
from kdx.unicam import Maps, ObjectiveName, Weighting

log = logging.getLogger("kdx")

NetworkLike = str | Path | Network | nn.Module


@dataclass(frozen=True)
class LayerResult:
    """What passed between the networks at one layer: four maps, nine scores by name, two differences of scores.

    distilled: the student's features that the base's do not explain; residual: the base's that the student's do not;
    missed: the teacher's that the student's do not; new: the student's that the teacher's do not.
    """

    distilled: Maps
    residual: Maps
    missed: Maps
    new: Maps
    scores: dict[str, Score]
    contrasts: dict[str, tuple[float, tuple[float, float]]]

    @property
    def fss(self) -> Score:
        """FSS(S,T), how alike student and teacher are."""
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
    """Explains batches of images by three networks: ``explainer(images, labels) -> Explanation``.

    student, base, teacher: a model reference, a path of a file that ``kdx export`` wrote, a `kdx.models.Network`, or a
    PyTorch module (taken as it is, without preprocessing). layers: names, shared by all three, or a mapping from the
    student's and base's layer to the teacher's. runtime: ``auto``, ``eager`` or ``onnx`` (which exports the networks once,
    into ``folder`` or a temporary one). objective, weighting: as in `kdx.unicam`. chunk: how many images go through a network
    at once (all of a batch by default); it changes no result. permutations, confidence, seed: of the scores.

    A context manager; `close` frees the networks. ``choice.why`` says in a line what ``auto`` chose and why. Where a network
    cannot be exported, ``auto`` takes PyTorch and says so there; ``onnx`` raises.
    """

    def __init__(
        self,
        *,
        student: NetworkLike,
        base: NetworkLike,
        teacher: NetworkLike,
        layers: str | Iterable[str] | Mapping[str, str],
        runtime: RuntimeName = "auto",
        device: str = "auto",
        objective: ObjectiveName = "relevance",
        weighting: Weighting = "gap",
        chunk: int | None = None,
        permutations: int = 999,
        confidence: float = 0.95,
        seed: int = 0,
        folder: Path | None = None,
    ) -> None:
        if isinstance(layers, str):
            layers = [layers]
        self.layers = dict(layers) if isinstance(layers, Mapping) else {layer: layer for layer in layers}
        if objective not in geometry.OBJECTIVES or weighting not in get_args(Weighting):
            raise ValueError(f"no objective {objective!r}" if objective not in geometry.OBJECTIVES else f"no weighting {weighting!r}")
        if not self.layers:
            raise KdxError("No layer was named.", "Name at least one; kdx.models.layers(model) lists the sensible ones.")
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk must be 1 or more, not {chunk}")
        self.objective = geometry.OBJECTIVES[objective]
        self.weighting = weighting
        self.chunk = chunk
        self.permutations = permutations
        self.confidence = confidence
        self.seed = seed
        self._may_fall_back = runtime == "auto"
        given = {"teacher": teacher, "student": student, "base": base}
        files = [role for role in ROLES if _is_file(given[role])]
        if files and len(files) < len(ROLES):
            raise KdxError(
                f"Only the {' and '.join(files)} is given as an .onnx file.", "Give all three as files, or all three as networks."
            )
        self.choice = choose(runtime, device, files=bool(files))
        self._references: dict[str, References] = {}
        self._runners: dict[str, Runner] = {}
        self._networks: dict[str, tuple[Network, FeatureGraph]] = {}
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._folder = folder
        for role in ROLES:
            wanted = tuple(self.layers.values() if role == "teacher" else self.layers)
            if files:
                self._runners[role] = _open_file(Path(str(given[role])), wanted)
            else:
                network = _as_network(given[role])
                self._networks[role] = network, FeatureGraph(network.module, wanted, network.preprocessing)

    def open(self, image_size: tuple[int, int]) -> None:
        """Open the runners for images of this size; the first call does it too. Under onnx this exports the networks."""
        if self._runners:
            return
        if not self._networks:
            raise ValueError("the explainer is closed")
        try:
            self._runners = {role: self._runner(role, image_size) for role in ROLES}
        except KdxError as error:
            if not (self._may_fall_back and self.choice.runtime == "onnx"):
                raise
            self.choice = Choice("eager", self.choice.device, f"eager on the CPU, since the export failed: {error.problem}")
            self._runners = {role: self._runner(role, image_size) for role in ROLES}
        log.info("runtime: %s", self.choice.why)

    def _runner(self, role: str, image_size: tuple[int, int]) -> Runner:
        network, graph = self._networks[role]
        if self.choice.runtime == "eager":
            return EagerRunner(graph, self.choice.device)
        if self._folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="kdx-", ignore_cleanup_errors=True)
            self._folder = Path(self._temporary.name)
        path = self._folder / f"{role}-{network.weights_hash[:12]}.onnx"
        if not onnx_file.holds(path, graph, network.weights_hash):
            size = network.preprocessing.size or image_size
            onnx_file.write(graph, path, reference=network.reference, weights=network.weights_hash, image_size=size)
        return OrtRunner(path)

    def networks(self) -> dict[str, dict[str, Any]]:
        """Each role's reference, weights' SHA-256, parameter count, preprocessing, and image size (None where any will do)."""
        found = {}
        for role in ROLES:
            if role in self._networks:
                network, _ = self._networks[role]
                about = (network.reference, network.weights_hash, network.parameters, network.preprocessing, network.preprocessing.size)
            else:
                runner = self._runners[role]
                assert isinstance(runner, OrtRunner)
                file = runner.description
                about = (file.reference, file.weights, file.parameters, file.preprocessing, file.preprocessing.size or file.image_size)
            reference, digest, parameters, preprocessing, size = about
            found[role] = {
                "reference": reference,
                "sha256": digest,
                "parameters": parameters,
                "preprocessing": asdict(preprocessing),
                "image_size": size,
            }
        return found

    def use_references(self, images: Array, labels: Array) -> None:
        """Switch to reference mode: every later image is mapped among these m images, whatever stands beside it in its batch."""
        arrays.check_same(len(labels), len(images), "reference labels", "reference images")
        known = arrays.tensor(labels, "reference labels").to(self.choice.device)
        passed = self.infer(arrays.tensor(images, "reference images"))
        self._references = {layer: References.of(_roles(passed, layer, other), known) for layer, other in self.layers.items()}

    def infer(self, images: Tensor) -> dict[str, Outputs]:
        """One pass of each network over images [n, 3, h, w] in [0, 1], ``chunk`` at a time."""
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise KdxError(
                f"The images have shape {list(images.shape)} and type {images.dtype}.",
                "Give floating-point RGB images [n, 3, height, width] in [0, 1].",
            )
        self.open((images.shape[2], images.shape[3]))
        parts = images.split(self.chunk or len(images))
        return {role: _joined([runner.infer(part) for part in parts]) for role, runner in self._runners.items()}

    def measure(self, passed: Mapping[str, Outputs], labels: Tensor, permutations: Tensor) -> dict[str, Measured]:
        """The geometry of one batch, a Measured a layer, from one pass of the networks."""
        with torch.no_grad():
            labels = labels.to(self.choice.device)
            target = Target.of(labels)
            return {
                layer: transfer.measure(
                    _roles(passed, layer, other),
                    target,
                    objective=self.objective,
                    weighting=self.weighting,
                    permutations=permutations.to(self.choice.device),
                    references=self._references.get(layer),
                    labels=labels,
                )
                for layer, other in self.layers.items()
            }

    def __call__(self, images: Array, labels: Array) -> Explanation:
        """Maps and scores of one batch: images [n, 3, h, w] in [0, 1], labels [n] or embedding [n, e], NumPy or PyTorch."""
        batch, target = arrays.tensor(images, "images"), arrays.tensor(labels, "target")
        arrays.check_images(len(batch))
        arrays.check_same(len(target), len(batch), "the target", "images")
        passed = self.infer(batch)
        measured = self.measure(passed, target, permutation_table(len(batch), self.permutations, self.seed))
        layers = {}
        for layer, found in measured.items():
            summary = transfer.pool(found.products, found.moved, found.left_out, n=len(batch), confidence=self.confidence)
            maps = {
                name: Maps(arrays.like(value.maps, images), arrays.like(value.weights, images), value.score)
                for name, value in found.maps.items()
            }
            layers[layer] = LayerResult(**maps, scores=summary.scores, contrasts=summary.contrasts)
        return Explanation(layers, {role: arrays.like(outputs.logits, images) for role, outputs in passed.items()})

    def close(self) -> None:
        for runner in self._runners.values():
            runner.close()
        self._networks, self._references = {}, {}
        if self._temporary is not None:
            self._temporary.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        self.close()


def _is_file(given: NetworkLike) -> bool:
    return isinstance(given, str | Path) and str(given).endswith(".onnx")


def _open_file(path: Path, layers: tuple[str, ...]) -> Runner:
    found = OrtRunner(path)
    absent = [layer for layer in layers if layer not in found.layers]
    if absent:
        raise KdxError(f"{path} does not hold the layer {absent[0]!r}.", f"It holds {', '.join(found.layers)}; export it with the layer.")
    return found


def _as_network(given: NetworkLike) -> Network:
    if isinstance(given, Network):
        return given
    if isinstance(given, nn.Module):  # a copy: its mode and device are its owner's
        return Network(type(given).__name__, copy.deepcopy(given).eval(), Preprocessing())
    return models.load(str(given))


def _roles(passed: Mapping[str, Outputs], layer: str, teacher_layer: str) -> dict[str, Tensor]:
    return {role: outputs.features[teacher_layer if role == "teacher" else layer] for role, outputs in passed.items()}


def _joined(parts: list[Outputs]) -> Outputs:
    if len(parts) == 1:
        return parts[0]
    features = {layer: torch.cat([part.features[layer] for part in parts]) for layer in parts[0].features}
    return Outputs(torch.cat([part.logits for part in parts]), features)

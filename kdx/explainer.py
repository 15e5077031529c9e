"""The Explainer: student, base and teacher and their layers, ready to say of any batch what passed between them."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from torch import Tensor, nn

from kdx import arrays, models, salient, transfer
from kdx.arrays import Array
from kdx.errors import KdxError
from kdx.export import engine, onnx_file
from kdx.export.engine import Batch
from kdx.export.graphs import ExplainerGraph, FeatureGraph, GradientGraph
from kdx.export.onnx_file import Description, NetworkDescription, Origin
from kdx.kernels import geometry
from kdx.models import Network
from kdx.runtime import Choice, EagerRunner, FileRunner, Outputs, Runner, RuntimeName, choose, describe_file, is_file, open_file, parts
from kdx.salient import Salience
from kdx.scores import Score, permutation_table
from kdx.transfer import Measured, References, Target, roles_among
from kdx.unicam import Maps, ObjectiveName, Weighting

log = logging.getLogger("kdx")

_ENGINE_IMAGES = 64
"""Images through an engine at once, where no chunk says it."""

NetworkLike = str | Path | Network | nn.Module

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
    mapping from the student's and base's layer to the teacher's. runtime: ``auto``, ``eager``, ``onnx`` or ``tensorrt``; the
    last two export the networks once, into ``folder`` or a temporary one. What is in ``folder`` is used again, but for PyTorch
    modules, whose code has no name to know it by. objective, weighting: as in `kdx.unicam`. chunk: how many images go through
    a network at once (by default all of a batch, or 64 where an engine is built); it changes no result. permutations,
    confidence, seed: of the scores. file: an explainer file, which stands in place of the networks, the layers (all of its, where
    none is named), the objective and the weighting.

    features: ``raw``, or ``salient`` for scores, contrasts and p-values of salient features, as published: at each layer, a
    network's features of its own salient images (`kdx.salient_images`, of the class that it predicts), of which the share
    ``keep`` is kept and the rest imputed with ``noise``. The maps are those of the raw features either way. Salient features
    cost a backward pass a network and a forward pass a layer more; exported files hold no gradients for them.

    A context manager; `close` frees the networks. ``choice.why`` says in a line what ``auto`` chose and why. Where a network
    cannot be exported, ``auto`` takes PyTorch and says so there; asked for by name, ``onnx`` and ``tensorrt`` raise.
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
        self._source: _Runners | _ExplainerFile
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
                raise _without_gradients("An explainer file holds")
            self._source = _ExplainerFile(Path(file), self.layers, runtime, device, folder)
            self.layers, self.roles = self._source.layers, self._source.roles
            return
        if objective not in geometry.OBJECTIVES or weighting not in get_args(Weighting):
            raise ValueError(f"no objective {objective!r}" if objective not in geometry.OBJECTIVES else f"no weighting {weighting!r}")
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk must be 1 or more, not {chunk}")
        paired = [f"{layer}={other}" for layer, other in self.layers.items() if layer != other]
        if teacher is None and paired:
            raise KdxError(
                f"{paired[0]} pairs a layer with one of the teacher's, and there is no teacher.", "Name the layer alone, or give a teacher."
            )
        self.roles = roles_among(given)
        self._source = _Runners(
            {role: given[role] for role in self.roles},
            self.layers,
            runtime,
            device,
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


class _Runners:
    """What an Explainer computes with: a runner a network, and the geometry of the features that they give."""

    def __init__(
        self,
        given: Mapping[str, NetworkLike],
        layers: Mapping[str, str],
        runtime: RuntimeName,
        device: str,
        *,
        objective: geometry.Objective,
        weighting: Weighting,
        chunk: int | None,
        folder: Path | None,
        salience: Salience | None,
    ) -> None:
        self._given = given
        self._layers = layers
        self._objective: geometry.Objective = objective
        self._weighting = weighting
        self._chunk = chunk
        self._folder = _Folder(folder)
        self._salience = salience
        self._may_fall_back = runtime == "auto"
        files = {role: Path(str(network)) for role, network in given.items() if is_file(network)}
        if files and salience is not None:
            raise _without_gradients("Exported files of features hold")
        suffixes = sorted({path.suffix for path in files.values()})
        if files and len(files) < len(given):
            raise KdxError(f"Only the {' and '.join(files)} is given as an exported file.", "Give every network as a file, or none.")
        if len(suffixes) > 1:
            raise KdxError(f"The networks are given as {' and '.join(suffixes)} files.", "Give all of one kind.")
        self.choice = choose(runtime, device, files=bool(files), engines=suffixes == [".engine"])
        self._files = {role: (path, describe_file(path)) for role, path in files.items()}
        if not layers:
            known = self._files["student"][1].layers if files else _sensible(models.as_network(given["student"]))
            raise KdxError("No layer was named.", f"Name one or more of the student's: {', '.join(known)}.")
        self._references: dict[str, References] = {}
        self._runners: dict[str, Runner] = {}
        self._gradients: dict[str, Runner] = {}
        self._networks: dict[str, tuple[Network, FeatureGraph]] = {}
        for role, network in given.items():
            wanted = self._layers_of(role)
            if files:
                _check_holds(*self._files[role], wanted)
            else:
                loaded = models.as_network(network)
                self._networks[role] = loaded, FeatureGraph(loaded.module, wanted, loaded.preprocessing)

    def open(self, image_size: tuple[int, int]) -> None:
        if self._runners:
            return
        if not self._given:
            raise ValueError("the explainer is closed")
        try:
            self._start(image_size)
        except KdxError as error:
            if not (self._may_fall_back and self.choice.runtime == "onnx" and self._networks):
                raise
            self.choice = Choice("eager", self.choice.device, f"eager on the CPU, since the export failed: {error.problem}")
            self._start(image_size)
        log.info("runtime: %s", self.choice.why)

    def _start(self, image_size: tuple[int, int]) -> None:
        """Every runner, or none."""
        runners: dict[str, Runner] = {}
        gradients: dict[str, Runner] = {}
        for role, (path, file) in self._files.items():
            weights = file.networks["network"].weights
            runners[role] = self._opened(path, f"{role}-{weights[:12]}", image_size if file.image_size is None else None)
        for role, (network, graph) in self._networks.items():
            runners[role] = self._runner(role, graph, image_size)
            if self._salience is not None:
                differentiable = GradientGraph(network.module, list(dict.fromkeys(graph.layers)), network.preprocessing)
                gradients[role] = self._runner(role, differentiable, image_size)
        self._runners, self._gradients = runners, gradients

    def _runner(self, role: str, graph: FeatureGraph | GradientGraph, image_size: tuple[int, int]) -> Runner:
        """The runner of a graph of a role's network, which the runtimes of files have exported first."""
        if self.choice.runtime == "eager":
            return EagerRunner(graph, self.choice.device)
        network, _ = self._networks[role]
        suffix = ".onnx" if graph.kind == "features" else f".{graph.kind}.onnx"
        path = self._folder.path / f"{role}-{network.weights_hash[:12]}{suffix}"
        # Modules with equal weights may differ in their code; a reference says which code it is.
        bare = isinstance(self._given[role], nn.Module)
        size = network.preprocessing.size
        if bare or not onnx_file.holds(path, graph, network.weights_hash):
            onnx_file.write(graph, path, origin=Origin(network.reference, network.weights_hash), image_size=size or image_size)
        return self._opened(path, path.stem, image_size if size else None)

    def _opened(self, path: Path, name: str, image_size: tuple[int, int] | None) -> Runner:
        most = self._chunk or _ENGINE_IMAGES
        return _opened(path, self.choice, self._folder, name, (1, most, most), image_size)

    def networks(self) -> dict[str, dict[str, Any]]:
        found = {}
        for role in self._given:
            if role in self._networks:
                network, _ = self._networks[role]
                found[role] = {
                    "reference": network.reference,
                    "sha256": network.weights_hash,
                    "parameters": network.parameters,
                    "preprocessing": asdict(network.preprocessing),
                    "image_size": network.preprocessing.size,
                    "trained": network.trained,
                }
            else:
                _, file = self._files[role]
                found[role] = _about(file.networks["network"], file)
        return found

    def use_references(self, images: Tensor, labels: Tensor) -> None:
        known, passed = labels.to(self.choice.device), self._infer(images)
        self._references = {layer: References.of(self._features(passed, layer), known) for layer in self._layers}

    def explain(
        self, images: Tensor, labels: Tensor, permutations: Tensor, seed: np.random.SeedSequence
    ) -> tuple[dict[str, Tensor], dict[str, Measured]]:
        passed = self._infer(images)
        with torch.no_grad():
            labels, permutations = labels.to(self.choice.device), permutations.to(self.choice.device)
            target = Target.of(labels)
            shown = {} if self._salience is None else self._salient_distances(self._salience, images, passed, seed)
            measured = {
                layer: transfer.measure(
                    self._features(passed, layer),
                    target,
                    objective=self._objective,
                    weighting=self._weighting,
                    permutations=permutations,
                    references=self._references.get(layer),
                    labels=labels,
                    distances=shown.get(layer),
                )
                for layer in self._layers
            }
        return {role: outputs.logits for role, outputs in passed.items()}, measured

    def _salient_distances(
        self, salience: Salience, images: Tensor, passed: Mapping[str, Outputs], seed: np.random.SeedSequence
    ) -> dict[str, dict[str, Tensor]]:
        """At each layer, each role's distances [n, n] between its features of its salient images."""
        images = images.to(self.choice.device)
        ranked = {}
        for role, runner in self._gradients.items():
            logits = passed[role].logits
            ranked[role] = salient.ranking_maps(runner, runner.layers, images, logits.argmax(1), logits.shape[1], self._chunk)
        found: dict[str, dict[str, Tensor]] = {layer: {} for layer in self._layers}
        for layer in self._layers:
            # Seeds of their own: noise that two networks' images had in common would read as likeness.
            for role, own in zip(ranked, seed.spawn(len(ranked)), strict=True):
                name = self._layer_of(role, layer)
                shown = salience.images(images, ranked[role][name], int(own.generate_state(1)[0]))
                rows = self._passed(role, shown).features[name].flatten(1)
                found[layer][role] = arrays.measured(geometry.distances(rows), rows, f"{role}'s salient features")
        return found

    def _infer(self, images: Tensor) -> dict[str, Outputs]:
        """One pass of each network."""
        self.open((images.shape[2], images.shape[3]))
        return {role: self._passed(role, images) for role in self._runners}

    def _passed(self, role: str, images: Tensor) -> Outputs:
        """One pass of a role's network, ``chunk`` images at a time, and no more than an engine takes."""
        runner = self._runners[role]
        return _joined([runner.infer(images[part]) for part in parts(runner, self._chunk, len(images))])

    def _layer_of(self, role: str, layer: str) -> str:
        """What a role calls one of the student's layers."""
        return self._layers[layer] if role == "teacher" else layer

    def _layers_of(self, role: str) -> tuple[str, ...]:
        return tuple(self._layer_of(role, layer) for layer in self._layers)

    def _features(self, passed: Mapping[str, Outputs], layer: str) -> dict[str, Tensor]:
        return {role: outputs.features[self._layer_of(role, layer)] for role, outputs in passed.items()}

    def close(self) -> None:
        for runner in (*self._runners.values(), *self._gradients.values()):
            runner.close()
        self._given, self._files, self._networks, self._references = {}, {}, {}, {}
        self._folder.close()


class _ExplainerFile:
    """What an Explainer computes with: one file that holds the networks and the geometry."""

    def __init__(self, path: Path, layers: Mapping[str, str], runtime: RuntimeName, device: str, folder: Path | None) -> None:
        file = describe_file(path)
        if file.kind != "explainer":
            raise KdxError(f"{path} is a file of {file.kind}, not an explainer.", "Write one with kdx export --explainer.")
        self._path, self._file, self._folder = path, file, _Folder(folder)
        self.roles = roles_among(file.networks)
        held = paired_layers(file)
        for layer, other in layers.items():
            if held.get(layer) != other:
                known = ", ".join(a if a == b else f"{a}={b}" for a, b in held.items())
                name = layer if layer == other else f"{layer}={other}"
                raise KdxError(f"{path} does not hold the layer {name!r}.", f"It holds {known}; export it with the layer.")
        self.layers = dict(layers) or held
        self.choice = choose(runtime, device, files=True, engines=path.suffix == ".engine")
        self._runner: FileRunner | None = None

    def open(self, image_size: tuple[int, int]) -> None:
        if self._runner is not None:
            return
        batch = arrays.MIN_IMAGES, _ENGINE_IMAGES, _ENGINE_IMAGES
        size = image_size if self._file.image_size is None else None
        self._runner = _opened(self._path, self.choice, self._folder, self._path.stem, batch, size)
        log.info("runtime: %s", self.choice.why)

    def networks(self) -> dict[str, dict[str, Any]]:
        return {role: _about(self._file.networks[role], self._file) for role in self.roles}

    def use_references(self, images: Tensor, labels: Tensor) -> None:
        raise without_references()

    def explain(
        self, images: Tensor, labels: Tensor, permutations: Tensor, _seed: np.random.SeedSequence
    ) -> tuple[dict[str, Tensor], dict[str, Measured]]:
        self.open((images.shape[2], images.shape[3]))
        assert self._runner is not None
        target = Target.of(labels.to(self.choice.device))
        found = self._runner.run({"images": images, "target": self._as_wide_as_taken(target.rows)})
        measured = {}
        for layer in self.layers:
            among = dict(zip(self.roles, found[f"{layer}/distances"], strict=True))
            values = dict(zip(self._file.scores, found[f"{layer}/scores"].tolist(), strict=True))
            maps = {
                name: Maps(found[f"{layer}/{name}/maps"], found[f"{layer}/{name}/weights"], values[transfer.map_score(name)])
                for name in transfer.maps_among(self.roles)
            }
            measured[layer] = Measured(maps, *transfer.measure_distances(among, target, permutations.to(self.choice.device)))
        return {role: found[f"logits/{role}"] for role in self.roles}, measured

    def _as_wide_as_taken(self, rows: Tensor) -> Tensor:
        """The target's rows with columns of zeros, which change no distance, up to the width that an engine is built for."""
        assert self._runner is not None
        width = self._runner.inputs["target"][1]
        if isinstance(width, str) or rows.shape[1] == width:
            return rows
        if rows.shape[1] > width:
            raise KdxError(
                f"The target has {rows.shape[1]} columns, and the engine takes {width}.",
                "Give labels, or use the .onnx file that it was built from.",
            )
        return torch.nn.functional.pad(rows, (0, width - rows.shape[1]))

    def close(self) -> None:
        if self._runner is not None:
            self._runner.close()
        self._folder.close()


class _Folder:
    """Where an explainer writes files and engines: the user's folder, or a temporary one, which is made when it is asked for."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    @property
    def path(self) -> Path:
        if self._path is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="kdx-", ignore_cleanup_errors=True)
            self._path = Path(self._temporary.name)
        return self._path

    def close(self) -> None:
        if self._temporary is not None:
            self._temporary.cleanup()


def _opened(path: Path, choice: Choice, folder: _Folder, name: str, batch: Batch, image_size: tuple[int, int] | None) -> FileRunner:
    """The runner of a file; TensorRT's by way of an engine ``name``, for images of ``image_size`` where the file takes any."""
    if choice.runtime == "tensorrt" and path.suffix != ".engine":
        built = folder.path / f"{name}.engine"
        engine.build(path, built, batch=batch, image_size=image_size)
        path = built
    return open_file(path, choice.device)


def paired_layers(file: Description) -> dict[str, str]:
    """The layers of an explainer file: the student's and base's to the teacher's, or to themselves where there is no teacher."""
    teacher = file.networks.get("teacher")
    return dict(zip(file.layers, file.layers if teacher is None else teacher.layers, strict=True))


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


def _without_gradients(what: str) -> KdxError:
    return KdxError(
        f"{what} no gradients, which salient features are made with.",
        "Give the networks themselves, or a models file that names them; or take raw features (--features raw).",
    )


def without_references() -> KdxError:
    """The error of reference mode by an explainer file, whose geometry is that of the batch."""
    return KdxError(
        "An explainer file maps an image among its batch mates alone.",
        "Give the networks themselves, or a models file that names them, for reference mode.",
    )


def _about(network: NetworkDescription, file: Description) -> dict[str, Any]:
    """What is known of a network in a file."""
    return {
        "reference": network.reference,
        "sha256": network.weights,
        "parameters": network.parameters,
        "preprocessing": asdict(network.preprocessing),
        "image_size": network.preprocessing.size or file.image_size,
        "trained": True,
    }


def _check_holds(path: Path, file: Description, layers: Iterable[str]) -> None:
    if file.kind != "features":
        raise KdxError(f"{path} is a file of {file.kind}, and features are asked for.", "Export it with --kind features.")
    absent = [layer for layer in layers if layer not in file.layers]
    if absent:
        raise KdxError(f"{path} does not hold the layer {absent[0]!r}.", f"It holds {', '.join(file.layers)}; export it with the layer.")


def _sensible(network: Network) -> Iterable[str]:
    """The layers to advise: the sensible ones, or all where the network does not run on an image of the size that it seems to take."""
    try:
        return models.layers(network)
    except KdxError:
        return [name for name, _ in network.module.named_modules() if name]


def _joined(parts: list[Outputs]) -> Outputs:
    if len(parts) == 1:
        return parts[0]
    features = {layer: torch.cat([part.features[layer] for part in parts]) for layer in parts[0].features}
    return Outputs(torch.cat([part.logits for part in parts]), features)

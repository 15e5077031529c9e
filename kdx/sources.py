"""What an Explainer computes with: a runner a network, and the geometry of what they give; or one file that holds all of it."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdx import arrays, models, salient, transfer
from kdx.errors import KdxError
from kdx.export import engine, onnx_file
from kdx.export.engine import Batch
from kdx.export.graphs import FeatureGraph, GradientGraph
from kdx.export.onnx_file import Description, NetworkDescription, Origin
from kdx.kernels import geometry
from kdx.models import Network
from kdx.openvino import rounds_geometry
from kdx.runner import FileRunner, Outputs, Precision, Runner
from kdx.runtime import Choice, EagerRunner, RuntimeName, choose, describe_file, is_file, layer_not_held, open_file, parts
from kdx.salient import Salience
from kdx.transfer import Measured, References, Target, roles_among
from kdx.unicam import Maps, Weighting

log = logging.getLogger("kdx")

NetworkLike = str | Path | Network | nn.Module

_ENGINE_IMAGES = 64
"""Images through an engine at once, where no chunk says it."""


class Runners:
    """A runner a network, and the geometry of the features that they give."""

    def __init__(
        self,
        given: Mapping[str, NetworkLike],
        layers: Mapping[str, str],
        runtime: RuntimeName,
        device: str,
        *,
        precision: Precision,
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
        self._may_fall_back = runtime == "auto" and precision == "float32"
        files = {role: Path(str(network)) for role, network in given.items() if is_file(network)}
        if files and salience is not None:
            raise without_gradients("Exported files of features hold")
        suffixes = sorted({path.suffix for path in files.values()})
        if files and len(files) < len(given):
            raise KdxError(f"Only the {' and '.join(files)} is given as an exported file.", "Give every network as a file, or none.")
        if len(suffixes) > 1:
            raise KdxError(f"The networks are given as {' and '.join(suffixes)} files.", "Give all of one kind.")
        self.choice = choose(runtime, device, precision=precision, files=bool(files), engines=suffixes == [".engine"])
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
            if not (self._may_fall_back and self.choice.runtime in ("onnx", "openvino") and self._networks):
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
        held = {role: _about_file(file.networks["network"], file) for role, (_, file) in self._files.items()}
        return held | {role: _about(network, network.weights_hash, network.trained) for role, (network, _) in self._networks.items()}

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


class ExplainerFile:
    """One file that holds the networks and the geometry."""

    def __init__(
        self, path: Path, layers: Mapping[str, str], runtime: RuntimeName, device: str, *, precision: Precision, folder: Path | None
    ) -> None:
        file = describe_explainer(path)
        self._path, self._file, self._folder = path, file, _Folder(folder)
        self.roles = roles_among(file.networks)
        held = paired_layers(file)
        for layer, other in layers.items():
            if held.get(layer) != other:
                raise layer_not_held(path, _pair(layer, other), [_pair(*pair) for pair in held.items()])
        self.layers = dict(layers) or held
        self.choice = choose(runtime, device, precision=precision, files=True, engines=path.suffix == ".engine")
        if self.choice.precision != "float32":
            raise rounds_geometry(path)
        self._runner: FileRunner | None = None

    def open(self, image_size: tuple[int, int]) -> None:
        if self._runner is not None:
            return
        batch = arrays.MIN_IMAGES, _ENGINE_IMAGES, _ENGINE_IMAGES
        size = image_size if self._file.image_size is None else None
        self._runner = _opened(self._path, self.choice, self._folder, self._path.stem, batch, size)
        log.info("runtime: %s", self.choice.why)

    def networks(self) -> dict[str, dict[str, Any]]:
        return {role: _about_file(self._file.networks[role], self._file) for role in self.roles}

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
    return open_file(path, choice)


def describe_explainer(path: Path) -> Description:
    """What an explainer file says of itself; KdxError for a file of another kind."""
    file = describe_file(path)
    if file.kind != "explainer":
        raise KdxError(
            f"{path} is a file of {file.kind}, not an explainer.",
            "Write one with kdx export --explainer; files of features are named a network each.",
        )
    return file


def paired_layers(file: Description) -> dict[str, str]:
    """The layers of an explainer file: the student's and base's to the teacher's, or to themselves where there is no teacher."""
    teacher = file.networks.get("teacher")
    return dict(zip(file.layers, file.layers if teacher is None else teacher.layers, strict=True))


def _pair(layer: str, other: str) -> str:
    """A layer of the student's and base's with the teacher's, as it is named to an explainer."""
    return layer if layer == other else f"{layer}={other}"


def without_gradients(what: str) -> KdxError:
    """The error of salient features where ``what`` has no gradients to make them with."""
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


def _about(network: Network | NetworkDescription, weights: str, trained: bool, image_size: tuple[int, int] | None = None) -> dict[str, Any]:
    """What is known of a network; image_size: the one that it takes where it does not resize."""
    return {
        "reference": network.reference,
        "sha256": weights,
        "parameters": network.parameters,
        "preprocessing": asdict(network.preprocessing),
        "image_size": network.preprocessing.size or image_size,
        "trained": trained,
    }


def _about_file(network: NetworkDescription, file: Description) -> dict[str, Any]:
    return _about(network, network.weights, True, file.image_size)


def _check_holds(path: Path, file: Description, layers: Iterable[str]) -> None:
    if file.kind != "features":
        raise KdxError(f"{path} is a file of {file.kind}, and features are asked for.", "Export it with --kind features.")
    for layer in layers:
        if layer not in file.layers:
            raise layer_not_held(path, layer, file.layers)


def _sensible(network: Network) -> Iterable[str]:
    """The layers to advise: the sensible ones, or all where the network does not run on an image of the size that it seems to take."""
    try:
        return models.layers(network)
    except KdxError:
        return [name for name, _ in network.module.named_modules() if name]


def _joined(pieces: list[Outputs]) -> Outputs:
    if len(pieces) == 1:
        return pieces[0]
    features = {layer: torch.cat([piece.features[layer] for piece in pieces]) for layer in pieces[0].features}
    return Outputs(torch.cat([piece.logits for piece in pieces]), features)

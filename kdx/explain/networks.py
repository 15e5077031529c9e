"""An Explainer's source: one runner per network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdx import models
from kdx.disk import log
from kdx.errors import KdxError
from kdx.explain.explainer_file import without_gradients
from kdx.explain.exported import ENGINE_IMAGES, ExportFolder, about_file, about_network, open_exported
from kdx.explain.layer import LayerMeasurement, LayerReferences, measure
from kdx.explain.settings import Settings
from kdx.export import onnx_file
from kdx.export.description import Description, Origin, is_export_of
from kdx.export.graphs import FeatureGraph, GradientGraph
from kdx.features import arrays
from kdx.features.target import Target
from kdx.kernels import geometry
from kdx.maps.salient_images import Salience, ranking_maps
from kdx.models.network import Network
from kdx.runtimes.choice import Choice, choose, describe_file, is_file
from kdx.runtimes.eager import EagerRunner
from kdx.runtimes.runner import NetworkOutputs, Runner, layer_not_held, parts

NetworkLike = str | Path | Network | nn.Module


class Runners:
    """A runner a network, and the geometry of the features that they give."""

    def __init__(self, given: Mapping[str, NetworkLike], layers: Mapping[str, str], settings: Settings, folder: Path | None) -> None:
        paired = [f"{layer}={other}" for layer, other in layers.items() if layer != other]
        if "teacher" not in given and paired:
            raise KdxError(
                f"{paired[0]} pairs a layer with one of the teacher's, and there is no teacher.", "Name the layer alone, or give a teacher."
            )
        self._given = given
        self._layers = layers
        self._settings = settings
        self._folder = ExportFolder(folder)
        self._salience = settings.salience
        self._may_fall_back = settings.runtime == "auto" and settings.precision == "float32"
        files = {role: Path(str(network)) for role, network in given.items() if is_file(network)}
        if files and self._salience is not None:
            raise without_gradients("Exported files of features hold")
        suffixes = sorted({path.suffix for path in files.values()})
        if files and len(files) < len(given):
            raise KdxError(f"Only the {' and '.join(files)} is given as an exported file.", "Give every network as a file, or none.")
        if len(suffixes) > 1:
            raise KdxError(f"The networks are given as {' and '.join(suffixes)} files.", "Give all of one kind.")
        self.choice = choose(
            settings.runtime, settings.device, precision=settings.precision, files=bool(files), engines=suffixes == [".engine"]
        )
        self._files = {role: (path, describe_file(path)) for role, path in files.items()}
        if not layers:
            known = self._files["student"][1].layers if files else _sensible(models.as_network(given["student"]))
            raise KdxError("No layer was named.", f"Name one or more of the student's: {', '.join(known)}.")
        self._references: dict[str, LayerReferences] = {}
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
        if bare or not is_export_of(path, graph, network.weights_hash):
            onnx_file.write(graph, path, origin=Origin(network.reference, network.weights_hash), image_size=size or image_size)
        return self._opened(path, path.stem, image_size if size else None)

    def _opened(self, path: Path, name: str, image_size: tuple[int, int] | None) -> Runner:
        most = self._settings.chunk or ENGINE_IMAGES
        return open_exported(path, self.choice, self._folder, name, (1, most, most), image_size)

    def networks(self) -> dict[str, dict[str, Any]]:
        held = {role: about_file(file.networks["network"], file) for role, (_, file) in self._files.items()}
        return held | {role: about_network(network, network.weights_hash, network.trained) for role, (network, _) in self._networks.items()}

    def use_references(self, images: Tensor, labels: Tensor) -> None:
        known, passed = labels.to(self.choice.device), self._infer(images)
        self._references = {layer: LayerReferences.of(self._features(passed, layer), known) for layer in self._layers}

    def explain(
        self, images: Tensor, labels: Tensor, permutations: Tensor, seed: np.random.SeedSequence
    ) -> tuple[dict[str, Tensor], dict[str, LayerMeasurement]]:
        passed = self._infer(images)
        with torch.no_grad():
            labels, permutations = labels.to(self.choice.device), permutations.to(self.choice.device)
            target = Target.of(labels)
            shown = {} if self._salience is None else self._salient_distances(self._salience, images, passed, seed)
            measured = {
                layer: measure(
                    self._features(passed, layer),
                    target,
                    objective=geometry.OBJECTIVES[self._settings.objective],
                    weighting=self._settings.weighting,
                    permutations=permutations,
                    references=self._references.get(layer),
                    labels=labels,
                    distances=shown.get(layer),
                )
                for layer in self._layers
            }
        return {role: outputs.logits for role, outputs in passed.items()}, measured

    def _salient_distances(
        self, salience: Salience, images: Tensor, passed: Mapping[str, NetworkOutputs], seed: np.random.SeedSequence
    ) -> dict[str, dict[str, Tensor]]:
        """At each layer, each role's distances [n, n] between its features of its salient images."""
        images = images.to(self.choice.device)
        ranked = {}
        for role, runner in self._gradients.items():
            logits = passed[role].logits
            ranked[role] = ranking_maps(runner, runner.layers, images, logits.argmax(1), logits.shape[1], self._settings.chunk)
        found: dict[str, dict[str, Tensor]] = {layer: {} for layer in self._layers}
        for layer in self._layers:
            # Seeds of their own: noise that two networks' images had in common would read as likeness.
            for role, own in zip(ranked, seed.spawn(len(ranked)), strict=True):
                name = self._layer_of(role, layer)
                shown = salience.images(images, ranked[role][name], int(own.generate_state(1)[0]))
                rows = self._passed(role, shown).features[name].flatten(1)
                found[layer][role] = arrays.measured(geometry.distances(rows), rows, f"{role}'s salient features")
        return found

    def _infer(self, images: Tensor) -> dict[str, NetworkOutputs]:
        """One pass of each network."""
        self.open((images.shape[2], images.shape[3]))
        return {role: self._passed(role, images) for role in self._runners}

    def _passed(self, role: str, images: Tensor) -> NetworkOutputs:
        """One pass of a role's network, ``chunk`` images at a time, and no more than an engine takes."""
        runner = self._runners[role]
        return _joined([runner.infer(images[part]) for part in parts(runner, self._settings.chunk, len(images))])

    def _layer_of(self, role: str, layer: str) -> str:
        """What a role calls one of the student's layers."""
        return self._layers[layer] if role == "teacher" else layer

    def _layers_of(self, role: str) -> tuple[str, ...]:
        return tuple(self._layer_of(role, layer) for layer in self._layers)

    def _features(self, passed: Mapping[str, NetworkOutputs], layer: str) -> dict[str, Tensor]:
        return {role: outputs.features[self._layer_of(role, layer)] for role, outputs in passed.items()}

    def close(self) -> None:
        for runner in (*self._runners.values(), *self._gradients.values()):
            runner.close()
        self._given, self._files, self._networks, self._references = {}, {}, {}, {}
        self._folder.close()


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


def _joined(pieces: list[NetworkOutputs]) -> NetworkOutputs:
    if len(pieces) == 1:
        return pieces[0]
    features = {layer: torch.cat([piece.features[layer] for piece in pieces]) for layer in pieces[0].features}
    return NetworkOutputs(torch.cat([piece.logits for piece in pieces]), features)

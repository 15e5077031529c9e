"""An Explainer's networks, each with its own runner."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdx import models
from kdx.choices import COVER
from kdx.data.inputs import InputFormat
from kdx.disk import log
from kdx.errors import KdxError, about
from kdx.explain.batch_target import BatchTarget
from kdx.explain.explainer_file import no_gradients
from kdx.explain.exported import ENGINE_IMAGES, Export, ExportFolder, open_exported
from kdx.explain.layer import LayerMethod, LayerReferences, PendingMeasurement, begin
from kdx.explain.layer_graphs import LayerGraphs
from kdx.explain.network_set import NetworkRecord
from kdx.explain.runtime_cost import FEW_IMAGES, ExportCost
from kdx.explain.settings import Settings
from kdx.explain.shared_features import SharedFeatures, network_key, pixels_key
from kdx.export.description import Description
from kdx.export.graphs import FeatureGraph, GradientGraph
from kdx.features import arrays
from kdx.kernels import geometry
from kdx.kernels.dispatch import BatchDistances, TorchBackend
from kdx.maps.salient_images import Salience, ranking_maps
from kdx.maps.unicam import distance_rows
from kdx.models.layer_pairs import LayerNames
from kdx.models.models_file import ModelsFile
from kdx.models.network import Network
from kdx.roles import ROLES
from kdx.runtimes.choice import Choice, choose, describe_file, is_file
from kdx.runtimes.eager import EagerRunner
from kdx.runtimes.runner import NetworkOutputs, Runner, missing_layer, parts

NetworkLike = str | Path | Network | nn.Module


def networks_of(file: ModelsFile) -> dict[str, NetworkLike]:
    """The network of each role in a models file: the path of an exported file, or the loaded network."""
    return {role: file.path.parent / reference if is_file(reference) else file.load(role) for role, reference in file.references.items()}


class NetworkRunners:
    """One runner per network, plus the distance geometry of their features.

    networks: by role, all as exported files or none. layers: each role's names by the student's. folder: where exported
    files and engines are written; a temporary folder by default. shared: where outputs of all networks but the student are looked up and
    stored; modules, whose code no reference identifies, are always run.
    """

    def __init__(
        self,
        networks: Mapping[str, NetworkLike],
        layers: Mapping[str, LayerNames],
        settings: Settings,
        folder: Path | None,
        shared: SharedFeatures | None = None,
    ) -> None:
        _check_names(networks, layers)
        self.roles = tuple(networks)
        self.layers = dict(layers)
        self._networks = networks
        self._settings = settings
        self._folder = ExportFolder(folder)
        self._shared = shared
        self._identities: dict[str, dict[str, Any]] = {}
        self._salience = settings.salience
        self._reported: set[tuple[str, str]] = set()
        self._may_fall_back = settings.runtime == "auto" and settings.precision == "float32"
        paths = {role: Path(str(network)) for role, network in networks.items() if is_file(network)}
        _check_files(networks, paths, settings)
        self.choice = choose(
            settings.runtime,
            settings.device,
            precision=settings.precision,
            files=bool(paths),
            engines=any(path.suffix == ".engine" for path in paths.values()),
        )
        self._files = {role: (path, describe_file(path)) for role, path in paths.items()}
        if not layers:
            suggested = self._files["student"][1].layers if paths else _suggested_layers(models.as_network(networks["student"]))
            raise KdxError("No layer was named.", f"Name one or more of the student's: {', '.join(suggested)}.")
        for role, (path, file) in self._files.items():
            with about(role):
                _check_layers(path, file, self._layers_of(role))
        self._graphs: dict[str, tuple[Network, FeatureGraph]] = {}
        if not paths:
            for role, network in networks.items():
                loaded = models.as_network(network)
                with about(role):
                    self._graphs[role] = loaded, FeatureGraph(loaded.module, self._layers_of(role), loaded.preprocessing)
        self.classes: tuple[str, ...] = self._files["student"][1].classes if paths else ()
        self._references: dict[str, LayerReferences] = {}
        self._captured = LayerGraphs()
        self._runners: dict[str, Runner] = {}
        self._gradients: dict[str, Runner] = {}
        self._is_automatic = self._may_fall_back and self.choice.runtime in ("onnx", "openvino") and not paths
        self._candidate: Choice | None = None  # the runtime to export for, while PyTorch runs because that would not pay
        self._cost: ExportCost | None = None
        self._images = 0
        self._batch: int | None = None

    def open(self, image_size: tuple[int, int], images: int | None = None, runtime: str | None = None, batch: int | None = None) -> None:
        if self._runners:
            return
        self._batch = batch
        if not self._networks:
            raise ValueError("the explainer is closed")
        if self._is_automatic and runtime == "eager":
            self.choice = Choice("eager", self.choice.device, "eager on the CPU: the run was started with it")
        elif self._is_automatic and runtime is None and images is not None:
            self._images = images
            self._open_provisionally(image_size)
        if not self._runners:
            self._start_or_fall_back(image_size)
        self._candidate = None

    def _open_provisionally(self, image_size: tuple[int, int]) -> None:
        """Start with exported files if they are there already, else with PyTorch until an export pays for the number of images."""
        self._candidate = candidate = self.choice
        if all(self._has_export(role, graph, image_size) for role, graph in self._all_graphs()):
            self._candidate = None
            self.choice = replace(candidate, why=f"{candidate.runtime} on the CPU: the networks are exported already")
        else:
            why = f"eager on the CPU: an export takes longer than it would save for {self._images} images"
            self.choice = Choice("eager", candidate.device, why)
        self._start_or_fall_back(image_size)
        self._reconsider(image_size)

    def _reconsider(self, image_size: tuple[int, int]) -> None:
        """Export the networks as soon as this pays for the number of images so far."""
        if self._candidate is None or self._images <= FEW_IMAGES:
            return
        if self._cost is None:
            salient = self._salience is not None
            runners = [runner for runner in self._runners.values() if isinstance(runner, EagerRunner)]
            passes = 4 + len(self.layers) if salient else 1  # the gradients take about three passes
            self._cost = ExportCost.measured(runners, image_size, 2 if salient else 1, passes)
        candidate, pays = self._candidate, self._cost.pays(self._images)
        reason = self._cost.why(self._images, candidate.runtime)
        self.choice = replace(candidate if pays else self.choice, why=f"{candidate.runtime if pays else 'eager'} on the CPU: {reason}")
        if pays:
            self._candidate = None
            self._close_runners()
            self._start_or_fall_back(image_size)

    def _start_or_fall_back(self, image_size: tuple[int, int]) -> None:
        """Start every runner; with ``auto``, in PyTorch if the export fails."""
        try:
            self._start(image_size)
        except KdxError as error:
            if not (self._may_fall_back and self.choice.runtime in ("onnx", "openvino") and self._graphs):
                raise
            self.choice = Choice("eager", self.choice.device, f"eager on the CPU, since the export failed: {error.problem}")
            self._start(image_size)
        log.info("runtime: %s", self.choice.why)

    def _all_graphs(self) -> Iterator[tuple[str, FeatureGraph | GradientGraph]]:
        """Every graph to run, with the role of its network."""
        for role, (network, graph) in self._graphs.items():
            yield role, graph
            if self._salience is not None:
                yield role, GradientGraph(network.module, list(dict.fromkeys(graph.layers)), network.preprocessing)

    def _start(self, image_size: tuple[int, int]) -> None:
        """Start every runner. After an error none is kept."""
        runners: dict[str, Runner] = {}
        gradients: dict[str, Runner] = {}
        for role, (path, file) in self._files.items():
            weights = file.networks["network"].weights
            runners[role] = self._open_file(path, f"{role}-{weights[:12]}", image_size if file.image_size is None else None)
        for role, graph in self._all_graphs():
            (runners if graph.kind == "features" else gradients)[role] = self._runner(role, graph, image_size)
        self._runners, self._gradients = runners, gradients

    def _runner(self, role: str, graph: FeatureGraph | GradientGraph, image_size: tuple[int, int]) -> Runner:
        """The runner of a graph of a role's network. For every runtime but PyTorch the graph is exported, unless its file is there."""
        if self.choice.runtime == "eager":
            return EagerRunner(graph, self.choice.device, self.choice.precision)
        export = self._export_of(role, graph, image_size)
        if not export.is_there():
            export.write()
        size = graph.preprocessing.size
        return self._open_file(export.path, export.path.stem, image_size if size else None)

    def _has_export(self, role: str, graph: FeatureGraph | GradientGraph, image_size: tuple[int, int]) -> bool:
        return self._export_of(role, graph, image_size).is_available()

    def _export_of(self, role: str, graph: FeatureGraph | GradientGraph, image_size: tuple[int, int]) -> Export:
        # Modules with equal weights may differ in their code. A model reference identifies the code as well.
        network, _ = self._graphs[role]
        is_module = isinstance(self._networks[role], nn.Module)
        return Export(network, graph, role, self._folder, image_size, reusable=not is_module)

    def _open_file(self, path: Path, name: str, image_size: tuple[int, int] | None) -> Runner:
        most = self._settings.chunk or self._batch or ENGINE_IMAGES
        return open_exported(path, self.choice, self._folder, name, (1, most, most), image_size)

    @property
    def input_format(self) -> InputFormat:
        files = [file for _, file in self._files.values()]
        preprocessing = [file.networks["network"].preprocessing for file in files]
        preprocessing += [network.preprocessing for network, _ in self._graphs.values()]
        resizing = next((network.resizing for network, _ in self._graphs.values()), COVER)
        return InputFormat.of(preprocessing, [file.image_size for file in files], resizing)

    def networks(self) -> dict[str, NetworkRecord]:
        files = {role: NetworkRecord.of_file(file.networks["network"], file) for role, (_, file) in self._files.items()}
        return files | {role: NetworkRecord.of_network(network) for role, (network, _) in self._graphs.items()}

    def features(self, images: Tensor) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        outputs = self._infer(images)
        return {role: passed.logits for role, passed in outputs.items()}, {layer: self._features(outputs, layer) for layer in self.layers}

    def use_references(self, images: Tensor, labels: Tensor) -> None:
        labels, outputs = labels.to(self.choice.device), self._infer(images)
        self._references = {
            layer: LayerReferences.of(self._features(outputs, layer), labels, pooled=self._settings.pooled) for layer in self.layers
        }

    def begin(self, images: Tensor, batch: BatchTarget) -> tuple[dict[str, Tensor], dict[str, PendingMeasurement]]:
        outputs = self._infer(images)
        distances = {} if self._salience is None else self._salient_distances(self._salience, images, batch, outputs)
        settings = self._settings
        method = LayerMethod(geometry.OBJECTIVES[settings.objective], settings.weighting, settings.pooled)
        measurements = {
            layer: begin(
                self._features(outputs, layer),
                batch.target,
                batch.permutations,
                method,
                references=self._references.get(layer),
                distances=distances.get(layer),
                graphs=self._captured,
            )
            for layer in self.layers
        }
        return {role: passed.logits for role, passed in outputs.items()}, measurements

    def _salient_distances(
        self,
        salience: Salience,
        images: Tensor,
        batch: BatchTarget,
        outputs: Mapping[str, NetworkOutputs],
    ) -> dict[str, dict[str, BatchDistances]]:
        """Per layer and role: the distances [n, n] between the role's features of its own salient images."""
        rankings = {}
        for role, runner in self._gradients.items():
            cotangents = salience.cotangents(outputs[role].logits, batch.classes)
            rankings[role] = ranking_maps(runner, runner.layers, images, cotangents, self._settings.chunk)
        distances: dict[str, dict[str, BatchDistances]] = {layer: {} for layer in self.layers}
        for layer in self.layers:
            # Each network has its own seed: noise that two networks' images share would raise their similarity.
            for role, noise_seed in zip(rankings, batch.seed.spawn(len(rankings)), strict=True):
                name = self._layer_of(role, layer)
                # The authors' code ranks the pixels once, at the deepest layer.
                ranked = self._layers_of(role)[-1] if salience.image == "published" else name
                self._report_empty(role, ranked, rankings[role][ranked])
                preprocessing = self._graphs[role][0].preprocessing
                salient = salience.images(images, rankings[role][ranked], int(noise_seed.generate_state(1)[0]), preprocessing)
                rows = distance_rows(self._run(role, salient).features[name], self._settings.pooled)
                distances[layer][role] = arrays.row_distances({f"{role}'s salient features": rows}, TorchBackend())[0]
        return distances

    def _report_empty(self, role: str, layer: str, maps: Tensor) -> None:
        """Log, once per network and layer, that maps which rank pixels are zero everywhere."""
        count = int((maps == 0).flatten(1).all(1).sum())
        if count and (role, layer) not in self._reported:
            self._reported.add((role, layer))
            message = "HiResCAM of the %s at %s is zero everywhere for %d of %d images; their salient images keep %s."
            kept = "all pixels" if self._settings.salient_image == "published" else "the first rows"
            log.warning(message, role, layer, count, len(maps), kept)

    def _infer(self, images: Tensor) -> dict[str, NetworkOutputs]:
        """One pass of every network."""
        size = images.shape[2], images.shape[3]
        self._images += len(images)
        if self._is_automatic and not self._runners and self._networks:
            self._open_provisionally(size)
        elif not self._runners:
            self.open(size)
        self._reconsider(size)
        pixels = "" if self._shared is None else pixels_key(images)
        return {role: self._run_once(role, images, pixels) for role in self._runners}

    def _run_once(self, role: str, images: Tensor, pixels: str) -> NetworkOutputs:
        """`_run`, or its stored outputs where other runs share them. pixels: the key of the images."""
        if self._shared is None or role == "student" or isinstance(self._networks[role], nn.Module):
            return self._run(role, images)
        return self._shared.outputs(self._key(role), pixels, lambda: self._run(role, images), self.choice.device)

    def _key(self, role: str) -> str:
        """The key of everything except the images that a network's outputs depend on."""
        if role not in self._identities:
            record, file = self.networks()[role], self._files.get(role)
            self._identities[role] = {
                "reference": record.reference,
                "weights": record.sha256,
                "preprocessing": asdict(record.preprocessing),
                # Exporters and runtimes may compute a layer differently if other layers are outputs as well.
                "layers": list(dict.fromkeys(self._layers_of(role))),
                "code": record.code,
                "file": None if file is None else hashlib.sha256(file[0].read_bytes()).hexdigest(),
                "chunk": self._settings.chunk,
            }
        choice = {"runtime": self.choice.runtime, "device": str(self.choice.device), "precision": self.choice.precision}
        return network_key(self._identities[role] | choice)

    def _run(self, role: str, images: Tensor) -> NetworkOutputs:
        """One pass of a role's network, in chunks of at most ``chunk`` images and of at most an engine's batch."""
        runner = self._runners[role]
        with about(role):
            return _concatenated([runner.infer(images[part]) for part in parts(runner, self._settings.chunk, len(images))])

    def _layer_of(self, role: str, layer: str) -> str:
        """A role's own name of a student's layer."""
        return self.layers[layer].at(role)

    def _layers_of(self, role: str) -> tuple[str, ...]:
        return tuple(self._layer_of(role, layer) for layer in self.layers)

    def _features(self, outputs: Mapping[str, NetworkOutputs], layer: str) -> dict[str, Tensor]:
        """Every role's features at a student's layer."""
        return {role: passed.features[self._layer_of(role, layer)] for role, passed in outputs.items()}

    def _close_runners(self) -> None:
        for runner in (*self._runners.values(), *self._gradients.values()):
            runner.close()

    def close(self) -> None:
        self._close_runners()
        self._networks, self._files, self._graphs, self._references = {}, {}, {}, {}
        self._captured.close()
        self._folder.close()


def _check_names(networks: Mapping[str, NetworkLike], layers: Mapping[str, LayerNames]) -> None:
    """KdxError for a layer with a name for a role that has no network."""
    for names in layers.values():
        for role in ROLES:
            if role not in networks and names.at(role) != names.student:
                raise KdxError(f"{names} names a layer of the {role}, but there is no {role}.", f"Name the layer alone, or give a {role}.")


def _check_files(networks: Mapping[str, NetworkLike], paths: Mapping[str, Path], settings: Settings) -> None:
    """KdxError for exported files that do not serve: for salient features, beside other networks, or of both kinds."""
    if paths and settings.salience is not None:
        raise no_gradients("Exported files of features contain no gradients, which salient features need.")
    if paths and len(paths) < len(networks):
        raise KdxError(f"Only the {' and '.join(paths)} is an exported file.", "Give every network as a file, or none.")
    suffixes = sorted({path.suffix for path in paths.values()})
    if len(suffixes) > 1:
        raise KdxError(f"The networks are {' and '.join(suffixes)} files.", "Give files of one kind.")


def _check_layers(path: Path, file: Description, layers: Iterable[str]) -> None:
    """KdxError for a file that is not one of features, or does not contain one of the layers."""
    if file.kind != "features":
        raise KdxError(f"{path} is a file of {file.kind}, not of features.", "Export it with --kind features.")
    for layer in layers:
        if layer not in file.layers:
            raise missing_layer(path, layer, file.layers)


def _suggested_layers(network: Network) -> Iterable[str]:
    """The layers to suggest; all of them if the network does not run on an image of the size that it seems to take."""
    try:
        return models.layers(network)
    except KdxError:
        return [name for name, _ in network.module.named_modules() if name]


def _concatenated(outputs: list[NetworkOutputs]) -> NetworkOutputs:
    if len(outputs) == 1:
        return outputs[0]
    features = {layer: torch.cat([part.features[layer] for part in outputs]) for layer in outputs[0].features}
    return NetworkOutputs(torch.cat([part.logits for part in outputs]), features)

"""An Explainer's networks in one explainer file, which also computes the geometry."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from kdx.data.inputs import InputFormat
from kdx.disk import log
from kdx.errors import KdxError
from kdx.explain.batch_target import BatchTarget
from kdx.explain.exported import ENGINE_IMAGES, ExportFolder, open_exported
from kdx.explain.layer import LayerMeasurement, PendingMeasurement, measure_distances
from kdx.explain.network_set import NetworkRecord
from kdx.explain.settings import Settings
from kdx.export.description import Description
from kdx.features.score_maps import coefficients
from kdx.features.target import Target
from kdx.maps.unicam import Maps
from kdx.models.layer_pairs import LayerNames
from kdx.roles import MAPS, TARGET, maps_among, roles_among, score_maps_among
from kdx.runtimes.choice import choose, describe_file
from kdx.runtimes.openvino import rounds_geometry
from kdx.runtimes.runner import FileRunner, missing_layer


class ExplainerFile:
    """One file that contains the networks and the geometry.

    layers: those of the file's layers to explain; all of them by default. folder: where an engine is built; a temporary folder by
    default.
    """

    def __init__(self, path: Path, layers: Mapping[str, LayerNames], settings: Settings, folder: Path | None) -> None:
        _check_settings(settings)
        file = describe_explainer(path)
        if file.pooled != settings.pooled:
            between = "spatial means" if file.pooled else "whole features"
            raise KdxError(
                f"The explainer file {path} measures distances between {between}.",
                "Set pooled (--pooled) as the file was exported, or export another file.",
            )
        self._path, self._file, self._folder = path, file, ExportFolder(folder)
        self.roles = roles_among(file.networks)
        available = paired_layers(file)
        for layer, names in layers.items():
            if available.get(layer) != names:
                raise missing_layer(path, str(names), list(map(str, available.values())))
        self.layers = dict(layers) or available
        self.classes = file.classes
        self.choice = choose(settings.runtime, settings.device, precision=settings.precision, files=True, engines=path.suffix == ".engine")
        if self.choice.precision != "float32":
            raise rounds_geometry(path)
        self._runner: FileRunner | None = None

    def open(self, image_size: tuple[int, int], images: int | None = None, runtime: str | None = None, batch: int | None = None) -> None:
        if self._runner is not None:
            return
        most = max(batch or ENGINE_IMAGES, self._file.least_images)  # a file takes a whole batch at once
        size = image_size if self._file.image_size is None else None
        self._runner = open_exported(self._path, self.choice, self._folder, self._path.stem, (self._file.least_images, most, most), size)
        log.info("runtime: %s", self.choice.why)

    @property
    def input_format(self) -> InputFormat:
        return InputFormat.of((network.preprocessing for network in self._file.networks.values()), [self._file.image_size])

    def networks(self) -> dict[str, NetworkRecord]:
        return {role: NetworkRecord.of_file(self._file.networks[role], self._file) for role in self.roles}

    def features(self, images: Tensor) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        raise KdxError("An explainer file does not output features.", "Give the networks themselves, or a models file that names them.")

    def use_references(self, images: Tensor, labels: Tensor) -> None:
        raise no_reference_mode(self._file)

    def begin(self, images: Tensor, batch: BatchTarget) -> tuple[dict[str, Tensor], dict[str, PendingMeasurement]]:
        self.open((images.shape[2], images.shape[3]), batch=max(ENGINE_IMAGES, len(images)))
        assert self._runner is not None
        outputs = self._runner.run({"images": images} | self._target_input(batch.target))
        measurements = {}
        for layer in self.layers:
            distances = dict(zip(self.roles, outputs[f"{layer}/distances"], strict=True))
            # In a file with reference images, each image has its own scores.
            values = outputs[f"{layer}/scores"].reshape(-1, len(self._file.scores)).mean(0).tolist()
            scores = dict(zip(self._file.scores, values, strict=True))
            maps = {
                name: Maps(outputs[f"{layer}/{name}/maps"], outputs[f"{layer}/{name}/weights"], scores[MAPS[name].score])
                for name in maps_among(self.roles)
            }
            products, permuted, left_out = measure_distances(distances, batch.target, batch.permutations)
            measured = LayerMeasurement(maps, self._shares(outputs, layer, products), products, permuted, left_out)
            measurements[layer] = PendingMeasurement.complete(measured)
        return {role: outputs[f"logits/{role}"] for role in self.roles}, measurements

    def _target_input(self, target: Target) -> dict[str, Tensor]:
        """The file's second input: the labels, or the target's rows."""
        if self._file.references is None:
            return {"target": self._padded(target.rows)}
        if target.values.ndim != 1:
            raise KdxError(
                "An explainer file with reference images takes labels, and this target is an embedding.",
                "Give integer labels [n], or use an explainer file without reference images.",
            )
        return {"labels": target.values}

    def _shares(self, outputs: Mapping[str, Tensor], layer: str, products: Tensor) -> dict[tuple[str, str], Tensor]:
        """The shares of `LayerMeasurement`, from the score maps that consist of one share.

        Empty if the file compares each image with reference images, because its score maps do not add up to the scores of the batch, and
        if the file is of an older version.
        """
        names = (*self.roles, TARGET)
        shares = {}
        for kind in score_maps_among(self.roles).values():
            output = f"{layer}/{kind.name}/maps"
            if len(kind.shares) == 1 and self._file.references is None and output in outputs:
                (coefficient,) = coefficients(kind, products, names)
                shares[kind.shares[0]] = (outputs[output].to(products) / coefficient)[None]
        return shares

    def _padded(self, rows: Tensor) -> Tensor:
        """The target's rows, padded with columns of zeros to the width of an engine. Zeros change no distance."""
        assert self._runner is not None
        width = self._runner.inputs["target"][1]
        if isinstance(width, str) or rows.shape[1] == width:
            return rows
        if rows.shape[1] > width:
            raise KdxError(
                f"The target has {rows.shape[1]} columns, and the engine takes {width}.",
                "Give labels, or use the .onnx file from which the engine was built.",
            )
        return torch.nn.functional.pad(rows, (0, width - rows.shape[1]))

    def close(self) -> None:
        if self._runner is not None:
            self._runner.close()
        self._folder.close()


def describe_explainer(path: Path) -> Description:
    """The description in an explainer file. Raises KdxError for a file of another kind."""
    file = describe_file(path)
    if file.kind != "explainer":
        raise KdxError(
            f"{path} is a file of {file.kind}, not an explainer.",
            "Write one with kdx export --explainer, or name one file of features per network in a models file.",
        )
    return file


def paired_layers(file: Description) -> dict[str, LayerNames]:
    """The names of an explainer file's layers by the student's."""
    by_role = {role: network.layers for role, network in file.networks.items()}
    return {layer: LayerNames.of({role: layers[place] for role, layers in by_role.items()}) for place, layer in enumerate(file.layers)}


def no_reference_mode(file: Description) -> KdxError:
    """The error for reference mode with an explainer file, whose geometry is that of the batch or of its own reference images."""
    if file.references is not None:
        return KdxError(
            f"The explainer file already compares each image with its own {len(file.references.labels)} reference images.",
            "Leave the reference images out, or give the networks themselves.",
        )
    return KdxError(
        "An explainer file compares an image only with the other images of its batch.",
        "For reference mode give the networks themselves, or a models file that names them.",
    )


def no_gradients(problem: str) -> KdxError:
    """The error for salient features of networks that have no gradients."""
    return KdxError(problem, "Give the networks themselves, or a models file that names them, or choose raw features (--features raw).")


def _check_settings(settings: Settings) -> None:
    """KdxError for settings that an explainer file does not support."""
    if settings.chunk is not None:
        raise KdxError("An explainer file takes a whole batch at once.", "Leave the chunk out and choose a smaller batch.")
    if (settings.objective, settings.weighting) != ("relevance", "gap"):
        raise KdxError(
            "The maps of an explainer file have the objective relevance and the weighting gap, "
            f"not {settings.objective} and {settings.weighting}.",
            "Give the networks themselves for other maps.",
        )
    if settings.features == "salient":
        raise no_gradients("An explainer file contains no gradients, which salient features need.")

"""An Explainer's source: one file that contains the networks and the geometry."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdx.disk import log
from kdx.errors import KdxError
from kdx.explain.exported import ENGINE_IMAGES, ExportFolder, about_file, open_exported
from kdx.explain.layer import LayerMeasurement, measure_distances
from kdx.explain.settings import Settings
from kdx.export.description import Description
from kdx.features import arrays
from kdx.features.target import Target
from kdx.maps.unicam import Maps
from kdx.roles import MAPS, maps_among, roles_among
from kdx.runtimes.choice import choose, describe_file
from kdx.runtimes.openvino import rounds_geometry
from kdx.runtimes.runner import FileRunner, layer_not_held


class ExplainerFile:
    """One file that holds the networks and the geometry."""

    def __init__(self, path: Path, layers: Mapping[str, str], settings: Settings, folder: Path | None) -> None:
        _check_settings(settings)
        file = describe_explainer(path)
        self._path, self._file, self._folder = path, file, ExportFolder(folder)
        self.roles = roles_among(file.networks)
        held = paired_layers(file)
        for layer, other in layers.items():
            if held.get(layer) != other:
                raise layer_not_held(path, _pair(layer, other), [_pair(*pair) for pair in held.items()])
        self.layers = dict(layers) or held
        self.choice = choose(settings.runtime, settings.device, precision=settings.precision, files=True, engines=path.suffix == ".engine")
        if self.choice.precision != "float32":
            raise rounds_geometry(path)
        self._runner: FileRunner | None = None

    def open(self, image_size: tuple[int, int]) -> None:
        if self._runner is not None:
            return
        batch = arrays.MIN_IMAGES, ENGINE_IMAGES, ENGINE_IMAGES
        size = image_size if self._file.image_size is None else None
        self._runner = open_exported(self._path, self.choice, self._folder, self._path.stem, batch, size)
        log.info("runtime: %s", self.choice.why)

    def networks(self) -> dict[str, dict[str, Any]]:
        return {role: about_file(self._file.networks[role], self._file) for role in self.roles}

    def use_references(self, images: Tensor, labels: Tensor) -> None:
        raise without_references()

    def explain(
        self, images: Tensor, labels: Tensor, permutations: Tensor, _seed: np.random.SeedSequence
    ) -> tuple[dict[str, Tensor], dict[str, LayerMeasurement]]:
        self.open((images.shape[2], images.shape[3]))
        assert self._runner is not None
        target = Target.of(labels.to(self.choice.device)).checked()
        found = self._runner.run({"images": images, "target": self._as_wide_as_taken(target.rows)})
        measured = {}
        for layer in self.layers:
            among = dict(zip(self.roles, found[f"{layer}/distances"], strict=True))
            values = dict(zip(self._file.scores, found[f"{layer}/scores"].tolist(), strict=True))
            maps = {
                name: Maps(found[f"{layer}/{name}/maps"], found[f"{layer}/{name}/weights"], values[MAPS[name].score])
                for name in maps_among(self.roles)
            }
            measured[layer] = LayerMeasurement(maps, *measure_distances(among, target, permutations.to(self.choice.device)))
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


def without_references() -> KdxError:
    """The error of reference mode by an explainer file, whose geometry is that of the batch."""
    return KdxError(
        "An explainer file maps an image among its batch mates alone.",
        "Give the networks themselves, or a models file that names them, for reference mode.",
    )


def without_gradients(what: str) -> KdxError:
    """The error for salient features where the networks have no gradients."""
    return KdxError(
        f"{what} no gradients, which salient features need.",
        "Give the networks themselves, or a models file that names them; or take raw features (--features raw).",
    )


def _check_settings(settings: Settings) -> None:
    """KdxError for settings that an explainer file cannot follow."""
    if settings.chunk is not None:
        raise KdxError("An explainer file takes a batch whole.", "Leave the chunk out and choose a smaller batch.")
    if (settings.objective, settings.weighting) != ("relevance", "gap"):
        raise KdxError(
            "The maps of an explainer file are of relevance, weighted by channel, "
            f"not of {settings.objective} weighted {settings.weighting}.",
            "Give the networks themselves for other maps.",
        )
    if settings.features == "salient":
        raise without_gradients("An explainer file contains")

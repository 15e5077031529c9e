"""The results of all images of a run, whatever geometry they were computed with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kdx.errors import KdxError
from kdx.explain.map_statistics import MapStatistics, NullStrength
from kdx.runs import grouped_scores, schema
from kdx.runs.influences import RunInfluences
from kdx.runs.schema import StoredLayer, StoredMaps
from kdx.scores.groups import GroupScores, adjusted_groups
from kdx.scores.pool import LayerScores, adjusted


@dataclass(frozen=True)
class Collected:
    """Everything that a run computed except the maps.

    columns: of samples.parquet, and INDEX. scores, statistics and null strengths: per layer, and the last two per kind of map. unreadable:
    the name and the reason for each image that could not be read. grouped: per ``classes`` and ``groups`` the scores of each layer and
    name; left_out: the reason for each of the two that is absent, where one applies. influences: the influences on the scores, in the
    geometry ``whole``.
    """

    columns: dict[str, NDArray[Any]]
    scores: dict[str, LayerScores]
    statistics: dict[str, dict[str, MapStatistics]]
    null: dict[str, dict[str, NullStrength]]
    unreadable: list[tuple[str, str]]
    grouped: dict[str, dict[str, dict[str, GroupScores]]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    influences: RunInfluences | None = None

    def stored_layers(self) -> dict[str, StoredLayer]:
        """The scores of all layers in the form of scores.json, with p-values adjusted over layers."""
        layers: dict[str, StoredLayer] = {
            layer: {**schema.stored_layer(scores), "maps": self.stored_maps(layer)} for layer, scores in adjusted(self.scores).items()
        }
        for kind in schema.GROUPED_TABLES:
            for layer, groups in adjusted_groups(self.grouped.get(kind, {})).items():
                stored = {name: grouped_scores.stored_group(group) for name, group in groups.items()}
                layers[layer] |= {"classes": stored} if kind == "classes" else {"groups": stored}
        return layers

    def map_columns(self) -> dict[str, NDArray[Any]]:
        """The columns of samples.parquet about maps."""
        columns = {}
        for layer, kinds in self.statistics.items():
            for kind, statistics in kinds.items():
                values = statistics.total, statistics.relative_strength, statistics.stability
                for name, column in zip(schema.MAP_COLUMNS, values, strict=True):
                    columns[schema.map_column(layer, kind, name)] = column.numpy().astype(np.float32 if name != "total" else np.float64)
        return columns

    def stored_maps(self, layer: str) -> dict[str, StoredMaps]:
        """The summaries of the maps of a layer, in the form of scores.json."""
        result: dict[str, StoredMaps] = {}
        for kind, statistics in self.statistics[layer].items():
            null, mean = self.null[layer].get(kind), float(statistics.strength.mean())
            known = statistics.stability[~statistics.stability.isnan()]
            result[kind] = {
                "empty": statistics.empty,
                "strength": mean,
                "stability": float(known.median()) if len(known) else None,
                "null_strength": null.high / mean if null is not None and mean else None,
                "above_null": float((statistics.strength > null.high).double().mean()) if null is not None else None,
            }
        return result


def predictions(logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The columns of each role's predicted class [n] and of its confidence [n], from the logits [n, classes], on their device."""
    columns: dict[str, Tensor] = {}
    for role, rows in logits.items():
        columns[schema.confidence_column(role)], columns[schema.prediction_column(role)] = rows.float().softmax(1).max(1)
    return columns


def prediction_columns(logits: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    """`predictions` as NumPy arrays."""
    return {name: column.numpy(force=True) for name, column in predictions(logits).items()}


def check_classes(logits: Mapping[str, Tensor], classes: int) -> None:
    """KdxError if a network does not predict the classes of the data."""
    for role, rows in logits.items():
        if rows.shape[1] != classes:
            raise KdxError(
                f"The {role} predicts {rows.shape[1]} classes, and the data has {classes}.",
                "Name the networks' classes in their order, in the models file: classes = [...].",
            )

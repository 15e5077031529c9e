"""The records of finished batches and layers in the folder progress/ of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kdx.disk import parse_json
from kdx.explain.map_statistics import MapStatistics, NullStrength
from kdx.kernels.moments import Influences, Moments
from kdx.scores.groups import GroupContrast, GroupScores
from kdx.scores.score import Score

_MOMENTS = ("variance", "interaction", "slope")
"""The arrays of a layer's moments. Batches that an older kdx stored do not have them."""


class LayerProducts(NamedTuple):
    """The inner products that a batch adds to a layer's pool: the arguments of `kdx.scores.pool.Pool.add`.

    With r roles: products [r + 1, r + 1], permuted [p, r + 1] per permuted matrix, and moments of the products, or None for fewer than five
    images and in batches that an older kdx stored.
    """

    products: torch.Tensor
    permuted: dict[str, torch.Tensor]
    moments: Moments | None


@dataclass(frozen=True)
class BatchRecord:
    """What a finished batch stores besides its maps.

    columns: INDEX and each role's prediction and confidence, one row per readable image.
    layers: the inner products per layer. unreadable: the name and the reason for each image that could not be read. shares: per layer, the
    shares [2, n, h, w] or [1, n, h, w] of each (role, matrix), as in `kdx.explain.layer.LayerMeasurement`; no layer in the records of kdx
    0.1.0.
    """

    columns: dict[str, NDArray[Any]]
    layers: dict[str, LayerProducts]
    unreadable: tuple[tuple[str, str], ...]
    shares: dict[str, dict[tuple[str, str], torch.Tensor]] = field(default_factory=dict)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays of the batch's file. An array of a layer has the name KIND/LAYER.

        On disk the kind of permuted products is ``moved_NAME``, the name that older runs gave it, so that they can still resume.
        """
        arrays = dict(self.columns)
        for layer, products in self.layers.items():
            arrays |= _product_arrays(products, f"/{layer}")
        for layer, shares in self.shares.items():
            arrays |= {f"share_{role}_{matrix}/{layer}": values.numpy(force=True) for (role, matrix), values in shares.items()}
        return arrays | {"unreadable": np.array(self.unreadable, dtype=np.str_).reshape(-1, 2)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> BatchRecord:
        """The record of a batch from the arrays of its file, the inverse of `arrays`."""
        columns = {name: values for name, values in arrays.items() if "/" not in name and name != "unreadable"}
        by_layer: dict[str, dict[str, NDArray[Any]]] = {}
        for name, values in arrays.items():
            kind, slash, layer = name.partition("/")
            if slash:
                by_layer.setdefault(layer, {})[kind] = values
        shares = {layer: _shares(kinds) for layer, kinds in by_layer.items()}
        return cls(
            columns,
            {layer: _products(kinds) for layer, kinds in by_layer.items()},
            tuple((str(name), str(reason)) for name, reason in arrays["unreadable"]),
            {layer: values for layer, values in shares.items() if values},
        )


@dataclass(frozen=True)
class LayerRecord:
    """What a finished layer of a run with the geometry ``whole`` stores besides its maps.

    products: over all images. statistics and null: per kind of map. grouped: the scores of ``classes`` and ``groups``, by the order of
    their names; older versions did not store them. influences: of parts of the images on the products; None in records of older versions.
    """

    products: LayerProducts
    statistics: dict[str, MapStatistics]
    null: dict[str, NullStrength]
    grouped: dict[str, list[GroupScores]] = field(default_factory=dict)
    influences: Influences | None = None

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays of the layer's file."""
        arrays = _product_arrays(self.products)
        if self.influences is not None:
            arrays["influences/first"] = self.influences.first.numpy(force=True)
            if self.influences.second is not None:
                arrays["influences/second"] = self.influences.second.numpy(force=True)
        for kind, groups in self.grouped.items():
            arrays[f"grouped/{kind}"] = np.array([json.dumps(asdict(group)) for group in groups], dtype=np.str_)
        for kind, values in self.statistics.items():
            arrays[f"statistics/{kind}"] = torch.stack([values.total, values.strength, values.stability]).numpy()
        return arrays | {f"null/{kind}": np.array([value.median, value.high]) for kind, value in self.null.items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> LayerRecord:
        """The record of a layer from the arrays of its file, the inverse of `arrays`."""
        kinds: dict[str, dict[str, NDArray[Any]]] = {"statistics": {}, "null": {}, "grouped": {}, "influences": {}}
        for name, values in arrays.items():
            group, slash, kind = name.partition("/")
            if slash:
                kinds[group][kind] = values
        return cls(
            _products({name: values for name, values in arrays.items() if "/" not in name}),
            {kind: MapStatistics(*torch.from_numpy(values)) for kind, values in kinds["statistics"].items()},
            {kind: NullStrength(*values.tolist()) for kind, values in kinds["null"].items()},
            {kind: [_group(parse_json(text)) for text in values.tolist()] for kind, values in kinds["grouped"].items()},
            _influences({name: torch.from_numpy(values) for name, values in kinds["influences"].items()}),
        )


def _influences(stored: Mapping[str, torch.Tensor]) -> Influences | None:
    return Influences(stored["first"], stored.get("second")) if stored else None


def _group(stored: Mapping[str, Any]) -> GroupScores:
    """The scores of a group from the fields of its dataclasses."""
    return GroupScores(
        stored["n"],
        {name: Score(**{**score, "interval": tuple(score["interval"])}) for name, score in stored["scores"].items()},
        {name: GroupContrast(value, (low, high), *p_values) for name, (value, (low, high), *p_values) in stored["contrasts"].items()},
        stored["missing"],
    )


def _product_arrays(products: LayerProducts, suffix: str = "") -> dict[str, NDArray[Any]]:
    arrays = {f"products{suffix}": products.products.numpy(force=True)}
    arrays |= {f"moved_{name}{suffix}": rows.numpy(force=True) for name, rows in products.permuted.items()}
    if products.moments is not None:
        arrays[f"parts{suffix}"] = np.array(products.moments.parts)
        arrays |= {f"{name}{suffix}": getattr(products.moments, name).numpy(force=True) for name in _MOMENTS}
    return arrays


def _products(arrays: Mapping[str, NDArray[Any]]) -> LayerProducts:
    moments = Moments(int(arrays["parts"]), *(torch.from_numpy(arrays[name]) for name in _MOMENTS)) if "parts" in arrays else None
    return LayerProducts(
        torch.from_numpy(arrays["products"]),
        {name.removeprefix("moved_"): torch.from_numpy(rows) for name, rows in arrays.items() if name.startswith("moved_")},
        moments,
    )


def _shares(arrays: Mapping[str, NDArray[Any]]) -> dict[tuple[str, str], torch.Tensor]:
    result = {}
    for name, values in arrays.items():
        if name.startswith("share_"):
            _, role, matrix = name.split("_")
            result[role, matrix] = torch.from_numpy(values)
    return result

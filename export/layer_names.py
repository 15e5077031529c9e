"""The names of layers: a dotted module path, the index of one of several outputs, and a stated layout."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from torch import nn

from kdx.errors import KdxError
from kdx.features.layout import StatedLayout, parse_layout

_RESERVED = ("images", "cotangent", "logits")
"""Names of inputs and outputs that do not belong to layers."""


@dataclass(frozen=True)
class LayerName:
    """The parts of ``path[index]:layout``. index and layout are None if the name does not have them."""

    path: str
    index: int | None
    layout: StatedLayout | None


def parse_layer(layer: str) -> LayerName:
    """The parts of a layer's name. Raises KdxError for a layout that is not one."""
    name, colon, layout = layer.partition(":")
    match = re.fullmatch(r"(.+)\[(\d+)\]", name)
    path, index = (match[1], int(match[2])) if match else (name, None)
    return LayerName(path, index, parse_layout(layout) if colon else None)


def find_layer(network: nn.Module, layer: str) -> nn.Module:
    """The module at the dotted path of a layer's name. Raises KdxError with the nearest names.

    A path may contain the names that DataParallel and torch.compile add (``module.`` and ``_orig_mod.``).
    """
    modules: dict[str, nn.Module] = {path: module for path, module in network.named_modules(remove_duplicate=False) if path}
    path = parse_layer(layer).path
    if path not in modules:
        path = path.replace("_orig_mod.", "").removeprefix("module.")
    if path in modules:
        return modules[path]
    near = difflib.get_close_matches(path, modules, n=4, cutoff=0.5) or [path for path, _ in network.named_children()][:6]
    raise KdxError(f"The network has no layer {layer!r}.", f"Near matches: {', '.join(near)}.")


def output_name(layer: str) -> str:
    """The name of a graph's output with the feature of ``layer``: the layer's own, unless a graph uses that name for something else."""
    return f"feature/{layer}" if layer in _RESERVED else layer

"""Which options a help page shows together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import typer.core

from kdx.cluster.options import LOCAL

PANELS: dict[str, dict[str, tuple[str, ...]]] = {
    "explain": {
        "Images": ("split", "resize", "interpolation", "decoder", "workers", "max_unreadable"),
        "A few images": ("among", "label"),
        "Networks": ("runtime", "device", "precision", "batch", "chunk", "base", "random_baseline"),
        "Geometry": ("geometry", "reference", "store", "keep_features", "project", "max_disk", "max_minutes"),
        "Maps and scores": ("objective", "weighting", "pooled", "target", "ratios", "permutations", "confidence"),
        "Salient features": ("features", "keep", "noise", "salient_class", "salient_score", "salient_image"),
        "Page": ("gallery", "order", "images"),
        "Cluster": ("cluster", "workers_per_gpu", "cpus_per_worker"),
    },
    "similarity": {
        "Layers": ("layer_a", "layer_b", "layer_c", "max_layers"),
        "Images": ("split", "max_images", "image_size", "resize", "interpolation", "max_unreadable", "workers"),
        "Networks": ("runtime", "device", "precision", "batch"),
        "Geometry": ("geometry", "project", "store", "max_disk", "max_minutes", "confidence"),
    },
    "study": {"Cluster": ("cluster", "workers_per_gpu", "cpus_per_worker")},
    "distill": {
        "Images": ("max_unreadable", "split_seed"),
        "Speed and machine": ("device",),
    },
    "export": {
        "Explainer files": ("explainer", "student", "base", "teacher", "pooled", "reference", "data", "seed"),
        "TensorRT engines": ("to", "batch", "arch", "tf32"),
    },
}
"""The panels of each command's help page, in order, and the options in them by their names in Python. The others come first.

`kdx.cli.distill` states the panels of most of its options itself."""


class Command(typer.core.TyperCommand):
    """A command whose options are in the panels that PANELS states."""

    def __init__(self, name: str | None, **settings: Any) -> None:
        super().__init__(name, **settings)
        panels = PANELS.get(name or "", {})
        place = {option: (number, panel) for number, (panel, options) in enumerate(panels.items()) for option in options}
        for parameter in self.params:
            if parameter.name in place and isinstance(parameter, typer.core.TyperOption):
                parameter.rich_help_panel = place[parameter.name][1]
        self._addresses = [name for parameter in self.params if parameter.name == "cluster" for name in parameter.opts]
        self.params.sort(key=lambda parameter: place.get(parameter.name or "", (-1, ""))[0])

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """``--cluster`` without an address stands for ``--cluster local``: typer has no options with an optional value."""
        parsed: list[str] = super().parse_args(ctx, _with_addresses(args, self._addresses))
        return parsed


def _with_addresses(args: Sequence[str], options: Sequence[str]) -> list[str]:
    complete = []
    for place, arg in enumerate(args):
        complete.append(arg)
        if arg in options and (place + 1 == len(args) or args[place + 1].startswith("-")):
            complete.append(LOCAL)
    return complete

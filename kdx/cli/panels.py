"""Which options a help page shows together."""

from __future__ import annotations

from typing import Any

import typer.core

PANELS: dict[str, dict[str, tuple[str, ...]]] = {
    "explain": {
        "Images": ("split", "resize", "interpolation", "decoder", "workers", "max_unreadable"),
        "A few images": ("among", "label"),
        "Networks": ("runtime", "device", "precision", "batch", "chunk", "base", "random_baseline"),
        "Geometry": ("geometry", "reference", "store", "keep_features", "project", "max_disk", "max_minutes"),
        "Maps and scores": ("objective", "weighting", "pooled", "target", "ratios", "permutations", "confidence"),
        "Salient features": ("features", "keep", "noise", "salient_class", "salient_score", "salient_image"),
        "Page": ("gallery", "order", "images"),
    },
    "similarity": {
        "Layers": ("layer_a", "layer_b", "layer_c", "max_layers"),
        "Images": ("split", "max_images", "image_size", "resize", "interpolation", "max_unreadable", "workers"),
        "Networks": ("runtime", "device", "precision", "batch"),
        "Geometry": ("geometry", "project", "store", "max_disk", "max_minutes", "confidence"),
    },
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
        self.params.sort(key=lambda parameter: place.get(parameter.name or "", (-1, ""))[0])

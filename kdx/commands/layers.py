"""`kdx layers`: the layers of a network."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from kdx.models.feature_layers import described_layers
from kdx.models.models_file import load_any


def layers_table(model: str, layers: Sequence[str] = (), image_size: int | None = None) -> Table:
    """A table of a network's stages and blocks, or of the named layers: feature, grid, layout, how it is known, and the advice.

    model: a model reference or ``MODELS.toml:ROLE``. image_size: the side of the images, by default the network's own size, or 224.
    Raises KdxError for a reference, a size or a layer that does not fit.
    """
    network, _ = load_any(model)
    size = (image_size, image_size) if image_size is not None else network.preprocessing.size or (224, 224)
    table = Table(box=None, pad_edge=False, title=f"{network.reference} on images of {size[0]} x {size[1]}", title_justify="left")
    for heading in ("layer", "channels", "grid", "layout", "known from", "advised"):
        table.add_column(heading, overflow="fold", justify="right" if heading == "channels" else "left")
    for layer in described_layers(network.module, size, layers):
        if layer.feature is None:
            table.add_row(Text(layer.name), "", "", Text(layer.problem), "", "no")
            continue
        channels, height, width = layer.feature
        advice = "yes" if layer.advised else f"no. {layer.problem}".rstrip(". ")
        table.add_row(Text(layer.name), str(channels), f"{height} x {width}", Text(layer.layout), layer.source, advice)
    return table

"""`kdx layers`."""

from __future__ import annotations

from typing import Annotated

import typer

from kdx import progress


def layers(
    model: Annotated[str, typer.Argument(help="A model reference, or MODELS.toml:ROLE.")],
    layer: Annotated[
        list[str] | None,
        typer.Option(
            "--layer", "-l", help="Describe this layer instead, such as blocks.9:tokens(prefix=1). Repeat for more.", show_default=False
        ),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="The side of the square images; by default the network's own size, or 224.")
    ] = None,
) -> None:
    """List a network's stages and blocks, with the shape and layout of their features, and which of them are worth explaining."""
    from kdx.commands.layers import layers_table

    with progress.console().status("Running the network"):
        table = layers_table(model, layer or (), image_size)
    progress.console().print(table)

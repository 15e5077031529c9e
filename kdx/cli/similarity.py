"""`kdx similarity`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from kdx import progress
from kdx.choices import Interpolation, Precision, ResizeMode, RuntimeName, SimilarityGeometry, StoredPrecision
from kdx.cli.options import (
    DataArgument,
    DeviceOption,
    InterpolationHelp,
    ResizeHelp,
    SeedOption,
    UnreadableOption,
    announce_line,
)
from kdx.remote import local_path

_Model = "A model reference, MODELS.toml:ROLE, or an exported .onnx file."


def _layers(network: str) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(
        help=f"A layer of {network}; fully connected layers are allowed. Repeat the option for more. "
        "By default those that kdx layers advises.",
        show_default=False,
    )
    return option


def similarity(
    a: Annotated[str, typer.Argument(metavar="A", help=f"The first network. {_Model}")],
    b: Annotated[str, typer.Argument(metavar="B", help="The second network. The same reference as A compares the network with itself.")],
    data: DataArgument,
    out: Annotated[Path, typer.Option(callback=local_path, help="The folder of the results.")],
    given: Annotated[
        str | None,
        typer.Option(help="A third network C: also compute what A and B share beyond C (partial correlation).", show_default=False),
    ] = None,
    layer_a: Annotated[list[str] | None, _layers("A")] = None,
    layer_b: Annotated[list[str] | None, _layers("B")] = None,
    layer_c: Annotated[list[str] | None, _layers("C")] = None,
    max_layers: Annotated[int, typer.Option(min=1, help="The most layers per network if none are named; they are evenly spaced.")] = 20,
    split: Annotated[
        str | None,
        typer.Option(help="The split: test, validation, train or all. By default test for the data that A was trained on, otherwise all."),
    ] = None,
    max_images: Annotated[
        int | None, typer.Option(min=4, help="Compare over at most this many images, chosen at random.", show_default=False)
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(min=1, help="The side of the square images for all networks; by default each network's own size.", show_default=False),
    ] = None,
    resize: Annotated[
        ResizeMode | None, typer.Option(help=f"{ResizeHelp} By default as A's models file states, otherwise cover.", show_default=False)
    ] = None,
    interpolation: Annotated[
        Interpolation | None,
        typer.Option(help=f"{InterpolationHelp} By default as A's models file states, otherwise bicubic.", show_default=False),
    ] = None,
    max_unreadable: UnreadableOption = 0.01,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Threads that decode images; by default one per core.", show_default=False)
    ] = None,
    runtime: Annotated[RuntimeName, typer.Option(help="What executes the networks.")] = "auto",
    device: DeviceOption = "auto",
    precision: Annotated[Precision, typer.Option(help="Number format of the networks, as in kdx explain.")] = "float32",
    batch: Annotated[
        int, typer.Option(min=4, help="Images that the networks process at once. It changes results only with --geometry batch.")
    ] = 64,
    geometry: Annotated[
        SimilarityGeometry,
        typer.Option(
            help="whole: every image is compared with all others, exactly. batch: every image is compared with those of its batch, and "
            "inner products are summed. "
            "auto: whole within --max-disk and --max-minutes, otherwise batch."
        ),
    ] = "auto",
    project: Annotated[
        int,
        typer.Option(
            min=0,
            help="For whole: project the features of each layer to this many random numbers per image, such as 2048; 0 for none. "
            "This is faster and needs less space, but results become approximate.",
        ),
    ] = 0,
    store: Annotated[
        StoredPrecision, typer.Option(help="For whole: the number format of the features on disk. float16 takes half the space.")
    ] = "float32",
    max_disk: Annotated[
        float | None,
        typer.Option(
            min=0, help="For whole: the gigabytes that features may take on disk; by default half of the free space.", show_default=False
        ),
    ] = None,
    max_minutes: Annotated[
        float | None,
        typer.Option(min=0, help="For auto: the minutes that the distances may take, as estimated; by default 60.", show_default=False),
    ] = None,
    confidence: Annotated[float, typer.Option(min=0.5, max=0.999, help="Confidence level of the intervals.")] = 0.95,
    figure: Annotated[
        Path | None, typer.Option(help="Also save the heat maps in this file, with the ending .png, .svg or .pdf.", show_default=False)
    ] = None,
    seed: SeedOption = 0,
) -> None:
    """Compare every layer of one network with every layer of another: heat maps with intervals, a table, and a page."""
    from kdx.commands.similarity import matches_table, run
    from kdx.runs.similarity_options import SimilarityOptions

    options = SimilarityOptions(
        layers={"A": layer_a or (), "B": layer_b or (), "C": layer_c or ()},
        max_layers=max_layers,
        geometry=geometry,
        batch=batch,
        runtime=runtime,
        device=device,
        precision=precision,
        image_size=image_size,
        resize=resize,
        interpolation=interpolation,
        split=split,
        max_images=max_images,
        max_unreadable=max_unreadable,
        workers=workers,
        project=project,
        stored_precision=store,
        max_disk=max_disk,
        max_minutes=max_minutes,
        confidence=confidence,
        seed=seed,
    )
    references = {"A": a, "B": b} | ({} if given is None else {"C": given})
    page, result = run(references, data, out, options, figure=figure, command=["kdx", *sys.argv[1:]], announce=announce_line)
    progress.console().print(matches_table(result))
    typer.echo(f"The page: {page}")

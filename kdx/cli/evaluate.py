"""`kdx evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdx import progress
from kdx.cli.options import DeviceOption, SeedOption, announce_line
from kdx.remote import as_path


def evaluate(
    run: Annotated[Path, typer.Argument(parser=as_path, metavar="RUN", help="The folder or the URL of a finished run.")],
    masks: Annotated[
        Path | None,
        typer.Option(
            help="Where the objects are: a folder of mask images with the names of the images, a JSON file of COCO, or a folder of XML "
            "files of Pascal VOC. By default the masks of the data itself, if it has any.",
            show_default=False,
        ),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="A metric, such as energy, pointing, insertion, road_keep or randomisation. Repeat the option for more; by default all "
            "whose requirements the run meets, within the limit of --max-minutes.",
            show_default=False,
        ),
    ] = None,
    map_: Annotated[
        list[str] | None,
        typer.Option(
            "--map",
            help="A map by name or symbol, such as 'RS(S) - RS(B)', distilled, grad_cam_student or centre. Repeat the option for more; "
            "'all' selects every map. By default the main maps.",
            show_default=False,
        ),
    ] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option("--layer", "-l", help="A layer of the run. Repeat the option for more; by default all.", show_default=False),
    ] = None,
    images: Annotated[int, typer.Option(min=0, help="How many images are evaluated, balanced over the classes; 0 for all.")] = 200,
    tolerance: Annotated[
        float,
        typer.Option(
            min=0, help="Pointing game: a position up to this many pixels of the networks' input outside the mask counts as a hit."
        ),
    ] = 0,
    detailed: Annotated[
        int,
        typer.Option(
            min=12,
            help="How many of these images are used by the metrics that run the networks again, such as insertion, ROAD and randomisation.",
        ),
    ] = 64,
    max_minutes: Annotated[
        float,
        typer.Option(min=0, help="Without --metric: leave out metrics that run the networks again and do not fit into this time together."),
    ] = 10.0,
    data: Annotated[str | None, typer.Option(help="Where the run's data is now.", show_default=False)] = None,
    models: Annotated[Path | None, typer.Option(help="Where the run's models file is now.", show_default=False)] = None,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
) -> None:
    """Measure whether the maps of a run mean something, next to Grad-CAM, HiResCAM and baselines, and show it on the run's page."""
    from kdx.commands.evaluate import run as evaluate_run
    from kdx.commands.evaluate import tables
    from kdx.evaluate.metrics import EvaluationOptions

    evaluation, page = evaluate_run(
        run,
        masks=masks,
        metrics=metric or (),
        maps=map_ or (),
        layers=layer or (),
        images=images or None,
        seed=seed,
        data=data,
        models=models,
        device=device,
        max_minutes=max_minutes,
        options=EvaluationOptions(tolerance=tolerance, detailed=detailed),
        announce=announce_line,
    )
    for table in tables(evaluation):
        progress.console().print(table)
    typer.echo(f"The page: {page}")

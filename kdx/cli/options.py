"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from kdx import progress
from kdx.choices import DATA_KINDS

DataArgument = Annotated[str, typer.Argument(help=f"The data set: {DATA_KINDS}.")]
LayerOption = Annotated[
    list[str] | None,
    typer.Option(
        "--layer",
        "-l",
        help="A layer, STUDENT_LAYER=TEACHER_LAYER, or student=LAYER,teacher=LAYER. Repeat the option for more layers.",
        show_default=False,
    ),
]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of every random choice except the split of the data. It is recorded.")]
UnreadableOption = Annotated[
    float,
    typer.Option(
        min=0,
        max=1,
        help="The share of corrupt images above which the command fails. One corrupt image is always accepted, unless this is 0.",
    ),
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, a GPU by number such as cuda:1, or auto, which prefers a GPU.")]
GalleryOption = Annotated[int, typer.Option(min=0, help="How many images the page shows.")]
ORDER_HELP = (
    "The images of the page: balanced over the classes, or those with the highest value of a number: "
    "changed (prediction of student and base), wrong (confidence in a wrong class), disagreement, or LAYER/KIND/strength."
)
OrderOption = Annotated[str, typer.Option(help=ORDER_HELP)]
ImagesOption = Annotated[
    str | None, typer.Option(help="The images of the page by name, such as cat/a.jpg,dog/b.jpg, in place of --gallery.", show_default=False)
]


ClusterOption = Annotated[
    str | None,
    typer.Option(
        help="Distribute the work with Ray (docs/cluster.md): on this machine without an address or with local, on a running cluster with "
        "auto or an address such as head:6379.",
        metavar="[ADDRESS]",
        show_default=False,
    ),
]
WorkersPerGpuOption = Annotated[int, typer.Option(min=1, help="With --cluster: the workers that share a GPU.")]
CpusPerWorkerOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="With --cluster: the cores and threads of a worker; by default OMP_NUM_THREADS if it is set, otherwise 1, or on GPUs an equal "
        "part of the machine's cores.",
        show_default=False,
    ),
]


def is_given(context: typer.Context, name: str) -> bool:
    """Whether the command line gives the option with this name in Python."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def with_preset(context: typer.Context, preset: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` of the command line, with those of the preset where the command line gives none."""
    return {**values, **{name: value for name, value in preset.items() if not is_given(context, name)}}


def image_names(text: str | None) -> tuple[str, ...]:
    """The names in the value of --images."""
    return tuple(filter(None, (name.strip() for name in (text or "").split(","))))


ResizeHelp = "How images of other proportions are brought to the networks' size: cover and crop, squash, or letterbox with grey bars."
InterpolationHelp = "How the pixels of a resized image are computed."


def announce_line(line: str) -> None:
    """Print a line; a warning is bold and yellow in a terminal."""
    progress.print_line(line, "bold yellow" if line.startswith("Warning: ") else None)

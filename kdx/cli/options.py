"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

DataArgument = Annotated[str, typer.Argument(help="A folder with one folder per class, cifar10:FOLDER, or digits.")]
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
        min=0, max=1, help="The share of corrupt images above which the command fails. One image always may be, unless this is 0."
    ),
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, a GPU by number such as cuda:1, or auto, which prefers a GPU.")]


def announce_line(line: str) -> None:
    """Print a line; a warning is bold and yellow in a terminal."""
    warning = line.startswith("Warning: ")
    typer.secho(line, bold=warning, fg="yellow" if warning else None)

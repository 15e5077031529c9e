"""`kdx demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdx import progress
from kdx.choices import DemoName
from kdx.cli.options import SeedOption, announce_line
from kdx.remote import local_path


def demo(
    out: Annotated[Path, typer.Option(callback=local_path, help="The folder to write to.")] = Path("kdx-demo"),
    data: Annotated[
        DemoName, typer.Option(help="The images: handwritten digits, or drawn composites, which need scikit-image.")
    ] = "digits",
    seed: SeedOption = 0,
) -> None:
    """Distil, export and explain networks, and write the reports. This takes one minute (digits) or two (composites) on two cores."""
    from kdx.commands.demo import run, table

    runs = run(out, data=data, seed=seed, announce=announce_line)
    progress.console().print(table(runs))
    for method, folder in runs.items():
        typer.echo(f"The page of the student distilled with {method}: {folder / 'report.html'}")
    typer.echo(f"The page of both students: {out / 'report.html'}")

"""`kdx report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdx.choices import TableFormat


def report(
    run: Annotated[Path, typer.Argument(help="The folder of a run.")],
    table: Annotated[
        TableFormat | None,
        typer.Option(
            help="Print a table instead of writing the page: the scores as csv, latex (booktabs) or markdown, "
            "or the numbers of all images as CSV (images).",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write the page of a run again, from the stored results, or print its scores as a table."""
    if table is not None:
        from kdx.runs.opened import open_run

        typer.echo(open_run(run).table(table), nl=False)
        return
    from kdx.report.page import write_page

    typer.echo(f"The page: {write_page(run)}")

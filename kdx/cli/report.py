"""`kdx report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(run: Annotated[Path, typer.Argument(help="The folder of a run.")]) -> None:
    """Write the page of a run again, from the stored results."""
    from kdx.report.page import write_page

    typer.echo(f"The page: {write_page(run)}")

"""`kdx report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdx.choices import GroupKind, TableFormat
from kdx.cli.options import ORDER_HELP, ImagesOption, image_names
from kdx.remote import as_path


def report(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="The folder or the URL of a run. Several runs, RUN or NAME=RUN, are compared on one page, --out.",
            show_default=False,
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="The HTML file of the page that compares several runs.", show_default=False)] = None,
    table: Annotated[
        TableFormat | None,
        typer.Option(
            help="Print a table instead of writing the page: the scores as csv, latex (booktabs) or markdown, "
            "or the numbers of all images as CSV (images).",
            show_default=False,
        ),
    ] = None,
    by: Annotated[
        GroupKind | None,
        typer.Option(help="With --table csv, latex or markdown: the scores of each class, or of each group.", show_default=False),
    ] = None,
    gallery: Annotated[
        int | None, typer.Option(min=0, help="How many images the page shows; the run keeps this choice.", show_default=False)
    ] = None,
    order: Annotated[str | None, typer.Option(help=ORDER_HELP, show_default=False)] = None,
    images: ImagesOption = None,
    data: Annotated[
        str | None, typer.Option(help="Where the run's data is now, for images that have no picture in the run.", show_default=False)
    ] = None,
) -> None:
    """Write the page of a run again, or one page that compares several runs, from the stored results. Or print the scores as a table."""
    from kdx.commands.report import check_options, check_runs, compare

    check_options(table, by, gallery, order, images, data)
    check_runs(runs, out, table, by, changes_images=not {gallery, order, images} <= {None})
    if len(runs) > 1:
        typer.echo(compare(runs, out, table), nl=table is None)
        return
    run = as_path(runs[0])
    if table is not None:
        from kdx.runs.opened import open_run

        typer.echo(open_run(run).table(table, by=by), nl=False)
        return
    from kdx.report.page import write_page

    if gallery is not None or order is not None or images is not None:
        from kdx.runs.gallery_choice import GalleryChoice, choose_again
        from kdx.runs.record import read_run

        default = GalleryChoice()
        choice = GalleryChoice(
            default.count if gallery is None else gallery, default.order if order is None else order, image_names(images)
        )
        choose_again(read_run(run), choice, data)
    typer.echo(f"The page: {write_page(run)}")

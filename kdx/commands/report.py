"""`kdx report`: which of its options exclude each other, and the comparison of several runs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from kdx.choices import GroupKind, TableFormat
from kdx.errors import KdxError
from kdx.remote import as_path


def check_options(
    table: TableFormat | None, by: GroupKind | None, gallery: int | None, order: str | None, images: str | None, data: str | None
) -> None:
    """KdxError for options without an effect beside the others."""
    if table is not None and {gallery, order, images, data} != {None}:
        raise KdxError("A table does not depend on the images of the page.", "Give --table alone, or leave it out.")
    if by is not None and table is None:
        raise KdxError(
            "--by chooses the scores of a table.", "Give --table with it; the page shows the scores of classes and groups anyway."
        )
    if images is not None and (gallery is not None or order is not None):
        raise KdxError("--images names all images of the page.", "Give --images alone, or --gallery and --order.")
    if data is not None and gallery is None and order is None and images is None:
        raise KdxError(
            "The page shows the same images as before, whose pictures are in the run.", "Give --data with --gallery, --order or --images."
        )


def check_runs(runs: Sequence[str], out: Path | None, table: TableFormat | None, by: GroupKind | None, *, changes_images: bool) -> None:
    """KdxError for options that do not apply to one run, or to several."""
    if len(runs) == 1:
        if out is not None:
            raise KdxError("--out names the page that compares several runs.", "Name another run, or leave --out out.")
        return
    if changes_images:
        raise KdxError("The page of several runs shows the images of their pages.", "Choose other images for each run with kdx report RUN.")
    if by is not None:
        raise KdxError("The joint table of several runs has no scores of classes or groups.", "Print them run by run: kdx report RUN.")
    if (out is None) == (table is None):
        raise KdxError("Several runs make one page or one table.", "Name the page with --out comparison.html, or give --table.")
    if out is not None and out.is_dir():
        raise KdxError(f"{out} is a folder, and --out names a file.", f"Name the page, such as --out {out / 'comparison.html'}.")


def compare(runs: Sequence[str], out: Path | None, table: TableFormat | None) -> str:
    """The joint table of several runs, or the line that names the page that compares them. runs: each a folder, or ``NAME=FOLDER``.

    Raises KdxError for a name that is given twice, and for runs that cannot be compared.
    """
    from kdx.report.comparison import compare_runs
    from kdx.report.comparison_page import write_comparison
    from kdx.report.comparison_text import joint_table

    folders = named_runs(runs)
    if out is None:
        return joint_table(compare_runs(folders), table or "markdown")
    return f"The page: {write_comparison(folders, out)}"


def named_runs(runs: Sequence[str]) -> dict[str, Path]:
    """The folder of each run by its name: that of ``NAME=FOLDER``, or the part of the path that differs from the other runs'."""
    from kdx.report.comparison import run_names

    named = [re.fullmatch(r"([^=/\\]+)=(.+)", run) if not as_path(run).exists() else None for run in runs]
    folders = [as_path(run if match is None else match[2]) for run, match in zip(runs, named, strict=True)]
    names = [default if match is None else match[1] for default, match in zip(run_names(folders), named, strict=True)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise KdxError(f"Two runs are named {twice}.", "Give each run another name: NAME=RUN.")
    return dict(zip(names, folders, strict=True))

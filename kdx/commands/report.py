"""`kdx report`: which of its options exclude each other."""

from __future__ import annotations

from kdx.choices import GroupKind, TableFormat
from kdx.errors import KdxError


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

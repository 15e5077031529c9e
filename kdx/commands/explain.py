"""`kdx explain`: a run over a data set, then its page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from kdx.errors import KdxError
from kdx.report.page import write_page
from kdx.runs.gallery_choice import GalleryChoice, choose_again, read_choice
from kdx.runs.record import LostResult, read_run
from kdx.runs.run import RunOptions, explain_dataset


def check_data_set(data: Sequence[str], labels: Sequence[str] | None) -> None:
    """Raise KdxError for image files, several data sets, or labels of images, where one data set is expected."""
    if labels or len(data) > 1 or (Path(data[0]).is_file() and not data[0].lower().endswith(".csv")):
        raise KdxError(
            "Image files and their labels need a data set to be compared with.", "Name it with --data, or explain a single data set."
        )


def run(
    data: str,
    models: Path,
    out: Path,
    layers: Sequence[str] = (),
    options: RunOptions = RunOptions(),
    *,
    networks: Path | None = None,
    command: Sequence[str] = (),
    announce: Callable[[str], None] = print,
) -> Path:
    """Explain a data set with `kdx.runs.run.explain_dataset`, which has the same arguments, and write the run's page. Returns its path.

    If a file of a complete run is missing or damaged, the run is computed again.
    """

    def explain_and_write(restart: bool) -> Path:
        explain_dataset(data, models, out, layers, options, networks=networks, command=command, restart=restart, announce=announce)
        if options.gallery_choice not in (GalleryChoice(), read_choice(run := read_run(out))[0]):  # a run that was already complete
            choose_again(run, options.gallery_choice, data)
        return write_page(out)

    try:
        return explain_and_write(restart=False)
    except LostResult as error:
        announce(f"{error.problem} It is computed again.")
        return explain_and_write(restart=True)

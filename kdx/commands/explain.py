"""`kdx explain`: a run over a data set, then its page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from kdx.cluster.executor import Executor
from kdx.data.dataset import source_of
from kdx.errors import KdxError, printable, resumable
from kdx.report.page import write_page
from kdx.runs.gallery_choice import GalleryChoice, choose_again, read_choice
from kdx.runs.record import LostResult, RunRecord, read_run
from kdx.runs.run import RunOptions, explain_dataset


def check_data_set(data: Sequence[str], labels: Sequence[str] | None) -> None:
    """Raise KdxError for image files, several data sets, or labels of images, where one data set is expected."""
    if labels or len(data) > 1 or (Path(data[0]).is_file() and source_of(data[0]) == "folder"):
        raise KdxError("Image files need a data set with which they are compared.", "Name it with --data, or explain a single data set.")


def check_distributed(students: Sequence[str] | None, among: str | None) -> None:
    """Raise KdxError for several students or a few images, which are not explained in several processes."""
    if students or among is not None:
        raise KdxError(
            "Several processes cannot explain several students or a few images.",
            "Leave --cluster and torchrun out, or explain a data set with the models file of one student.",
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
    shared_features: Path | None = None,
    executor: Executor | None = None,
    announce: Callable[[str], None] = print,
) -> Path:
    """Explain a data set with `kdx.runs.run.explain_dataset`, which has the same arguments, and write the run's page. Returns its path.

    If a file of a complete run is missing or damaged, the run is computed again.
    """

    def explain_and_write(restart: bool) -> Path:
        explain_dataset(
            data,
            models,
            out,
            layers,
            options,
            networks=networks,
            command=command,
            restart=restart,
            shared_features=shared_features,
            executor=executor,
            announce=announce,
        )
        with resumable(lambda: True):  # the run is complete
            if options.gallery_choice not in (GalleryChoice(), read_choice(run := read_run(out))[0]):  # it was already complete before
                choose_again(run, options.gallery_choice, data)
            _report_unreadable(read_run(out), announce)
            return write_page(out)

    try:
        return explain_and_write(restart=False)
    except LostResult as error:
        announce(f"{error.problem} It is computed again.")
        return explain_and_write(restart=True)


def _report_unreadable(run: RunRecord, announce: Callable[[str], None]) -> None:
    """One line about the images that could not be read."""
    if run.unreadable:
        first, count = run.unreadable[0], len(run.unreadable)
        images = "1 image is" if count == 1 else f"{count:,} images are"
        announce(printable(f"{images} left out because unreadable, first {first['id']}: {first['reason']}"))

"""`kdx explain`: a run over a data set, then its page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from kdx.report.page import write_page
from kdx.runs.record import LostResult
from kdx.runs.run import RunOptions, explain_dataset


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
    """`kdx.runs.run.explain_dataset`, whose arguments these are, then the page of the run, whose path is returned.

    A complete run of which a file was lost is computed again.
    """

    def explained(restart: bool) -> Path:
        explain_dataset(data, models, out, layers, options, networks=networks, command=command, restart=restart, announce=announce)
        return write_page(out)

    try:
        return explained(restart=False)
    except LostResult as error:
        announce(f"{error.problem} It is computed again.")
        return explained(restart=True)

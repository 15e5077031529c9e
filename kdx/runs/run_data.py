"""The data set that a run explained, opened again."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from kdx.choices import COVER, Interpolation, ResizeMode, Resizing
from kdx.data.dataset import Dataset, open_data
from kdx.runs.record import RunRecord


def reopened(run: RunRecord, reference: str) -> Dataset:
    """The data that ``reference`` names, with the classes and the resizing of the run. Raises KdxError if it cannot be opened."""
    return replace(open_data(reference, run.classes), resizing=recorded_resizing(run))


def is_data_of(run: RunRecord, dataset: Dataset) -> bool:
    """Whether these are the images that the run explained, by their contents."""
    recorded = run.manifest["configuration"]["fingerprint"]
    return recorded in (dataset.fingerprint, dataset.fingerprint_of_0_1_0)


def recorded_resizing(run: RunRecord) -> Resizing:
    """How the run brought images to the size of its networks."""
    stored = run.manifest["configuration"].get("resize")
    return COVER if stored is None else Resizing(cast(ResizeMode, stored["mode"]), cast(Interpolation, stored["interpolation"]))

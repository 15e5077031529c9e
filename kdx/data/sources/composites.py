"""Composites as a data set: objects with exact masks on photographs."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
from PIL import Image

from kdx.data.composites import CompositeOptions, class_names, compose, picture_files
from kdx.data.labelled_images import SPLITS, Dataset, Indices
from kdx.errors import KdxError, near_names

_SHARES = {"train": 0.6, "validation": 0.15, "test": 0.25}
_DEFAULTS: dict[str, str | int | float] = asdict(CompositeOptions())


def parse_options(place: str) -> CompositeOptions:
    """The options in ``classes=shape,side=96``, with the defaults of all others.

    Raises KdxError for an option that does not exist, that occurs twice, or whose value is not of its type or range.
    """
    values: dict[str, str | int | float] = {}
    for entry in place.split(",") if place else []:
        name, _, text = (part.strip() for part in entry.partition("="))
        if name not in _DEFAULTS:
            raise KdxError(f"composites has no option {name!r}.", f"Options with similar names: {near_names(name, _DEFAULTS, _DEFAULTS)}.")
        if name in values:
            raise KdxError(f"The option {name} of composites occurs twice.", "Give each option once.")
        kind = type(_DEFAULTS[name])
        try:
            values[name] = kind(text)
        except ValueError as error:
            expected = "a whole number" if kind is int else "a number"
            raise KdxError(f"The option {name} of composites cannot be {text!r}.", f"Give {expected}.") from error
    return CompositeOptions(**values)  # type: ignore[arg-type]  # each value has the type of its option


def canonical_options(place: str) -> str:
    """The options that differ from their defaults, in a fixed order and form. Equal data sets have equal texts."""
    values = asdict(parse_options(place))
    return ",".join(f"{name}={value}" for name, value in values.items() if value != _DEFAULTS[name])


def open_composites(reference: str, place: str) -> Dataset:
    """The data set of `kdx.data.composites` with these options. Images are drawn when they are read, and are the same every time.

    60% of the images are the split train, 15% validation and 25% test. Crops of different splits have no pixel in common.
    `Dataset.masks` has the exact mask of each object.

    Raises KdxError for options that do not exist or are out of range, and if scikit-image is not installed.
    """
    options = parse_options(place)
    counts = {split: round(share * options.count) for split, share in _SHARES.items()}
    counts["train"] += options.count - sum(counts.values())
    rows = [(split, row) for split in SPLITS for row in range(counts[split])]
    classes = class_names(options)
    labels: Indices = np.array([row % len(classes) for _, row in rows], dtype=np.int64)
    ends = np.cumsum([counts[split] for split in SPLITS])
    splits = {split: np.arange(end - counts[split], end) for split, end in zip(SPLITS, ends, strict=True)}
    return Dataset(
        reference,
        classes,
        labels,
        tuple(f"{split}/{row:05d}" for split, row in rows),
        {**picture_files(), "options": repr(options).encode()},
        lambda index: Image.fromarray(compose(options, *rows[index]).image),
        splits,
        masks=lambda index: compose(options, *rows[index]).object_mask[None],
    )

"""The options after the place in a data reference, such as ``,label=COLUMN``."""

from __future__ import annotations

from collections.abc import Collection

from kdx.errors import KdxError
from kdx.remote import as_path

COLUMNS = ("image", "label", "classes")
"""The options that choose images and labels. ``classes`` is the path of a file."""


def place_options(source: str, place: str, names: Collection[str], form: str) -> tuple[str, dict[str, str]]:
    """The place and the options, by name, in ``PLACE,NAME=VALUE,...``.

    Raises KdxError, with ``form`` as its hint, without a place and for an option that is unknown, empty or given twice.
    """
    first, *entries = place.split(",")
    while entries and first.count("{") > first.count("}"):  # a comma in a pattern {a,b}
        first = f"{first},{entries.pop(0)}"
    options = dict(entry.partition("=")[::2] for entry in entries)
    if not first or options.keys() - set(names) or not all(options.values()) or len(options) < len(entries):
        raise KdxError(f"{source}:{place} is not a reference of a data set.", form)
    return first, options


def located_place(source: str, place: str, form: str) -> str:
    """``place`` with the options `COLUMNS`, where its path and that of ``classes`` are absolute."""
    first, options = place_options(source, place, COLUMNS, form)
    if "classes" in options:
        options["classes"] = str(as_path(options["classes"]).expanduser().resolve())
    return ",".join([str(as_path(first).expanduser().resolve()), *(f"{name}={value}" for name, value in options.items())])

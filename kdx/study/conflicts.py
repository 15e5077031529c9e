"""Whether a study that exists can be extended to another design."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdx.errors import KdxError

_AXES = ("data", "teachers", "assistants", "students", "methods")
"""The tables of a design whose names may be added and removed."""

_KEPT = ("training", "explain", "layers", "images")
"""The entries of a design on which every cell depends."""


def check_same_study(folder: Path, known: Mapping[str, Any], planned: Mapping[str, Any]) -> None:
    """Raise KdxError if a name of the study in the folder stands for something else in the planned one, or if an option has changed.

    known, planned: plans of study.json. Names and seeds may be added and removed: the other cells stay valid.
    """
    before, after = known["design"], planned["design"]
    for axis in _AXES:
        for name in before[axis].keys() & after[axis].keys():
            if before[axis][name] != after[axis][name]:
                _refuse(folder, f"{axis}.{name}", before[axis][name], after[axis][name])
    for key in _KEPT:
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            for name in sorted({*old, *new}):
                if old.get(name) != new.get(name):
                    _refuse(folder, f"{key}.{name}", old.get(name), new.get(name))
        elif old != new:
            _refuse(folder, key, old, new)
    for name in known["fingerprints"].keys() & planned["fingerprints"].keys():
        if known["fingerprints"][name] != planned["fingerprints"][name]:
            raise KdxError(
                f"The images of {name} are not those of the study in {folder}.", "Restore the data set, or choose another --out."
            )


def _refuse(folder: Path, key: str, old: Any, new: Any) -> None:
    before, after = ("the default" if value is None else repr(value) for value in (old, new))
    raise KdxError(
        f"The study in {folder} has {key} = {before}, and this one has {after}.",
        "Choose another --out, or give the old value; names and seeds may be added and removed.",
    )

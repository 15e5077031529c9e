"""The design of a study from a preset, a study file and the options of the command line; the later take precedence."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from kdx.choices import StudyPresetName
from kdx.distill.presets import PRESETS as TRAINING_PRESETS
from kdx.errors import KdxError, near_names
from kdx.study.design import Design, design_of, named, parse_setting, read_design, set_value, split_name, value_of_table, with_names
from kdx.study.presets import PRESETS


@dataclass(frozen=True)
class Flags:
    """The options of `kdx study` that belong to its design, as they were written. Empty or None where they were not given."""

    data: Sequence[str] = ()
    teachers: Sequence[str] = ()
    assistants: Sequence[str] = ()
    students: Sequence[str] = ()
    methods: Sequence[str] = ()
    seeds: str | None = None
    layers: Sequence[str] = ()
    images: int | None = None
    epochs: int | None = None
    settings: Sequence[str] = ()


def design_from(file: Path | None, preset: StudyPresetName | None, flags: Flags) -> Design:
    """The design of a file and flags. An axis in the flags replaces the axis of the file, and an axis of the file that of the preset.

    Handwritten digits without a file and without networks have the preset ``digits``. A data set of the preset that no one locates is left
    out if another one is located. Raises KdxError for anything that is not valid.
    """
    content = read_design(file) if file is not None else {}
    preset = _preset(content.pop("preset", None)) if preset is None else preset
    if preset is None and file is None and list(flags.data) == ["digits"] and not (flags.teachers or flags.students):
        preset = "digits"
    if file is None and preset is None and not flags.data:
        raise KdxError("The study has no file and no data.", "Give a study file, --preset, or --data with --teacher and --student.")
    known: dict[str, Any] = copy.deepcopy(PRESETS[preset]) if preset is not None else {}
    located = {name for name, entry in _table(content.get("data", {})).items() if not isinstance(entry, dict) or "reference" in entry}
    if "data" in content:
        content["data"] = _with_known(_table(content["data"]), known)
    content = {**known, **content}
    for key in ("training", "explain"):
        if key in known or key in content:
            content[key] = {**known.get(key, {}), **value_of_table(content.get(key, {}), key)}
    if flags.data:
        entries = with_names(map(split_name, flags.data), "data")
        content["data"], located = _with_known(dict(entries), content), set(entries)
    if preset == "paper":
        content["data"] = {name: entry for name, entry in content["data"].items() if name in located}
        if not content["data"]:
            raise KdxError(
                "The preset paper does not contain its data sets.",
                f"Name them: {' '.join(f'--data {name}=FOLDER' for name in TRAINING_PRESETS)}; docs/data.md describes each.",
            )
    _apply(content, flags)
    return design_of(content)


def _preset(value: Any) -> StudyPresetName | None:
    names = get_args(StudyPresetName)
    if value is not None and value not in names:
        raise KdxError(f"There is no study preset {value!r}.", f"Choose one of: {near_names(str(value), names, names)}.")
    return value  # type: ignore[no-any-return]


def _table(data: Any) -> dict[str, Any]:
    """The data sets of a file by name, also where the file has a list."""
    return data if isinstance(data, dict) else named(data, "data")


def _with_known(entries: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """The data sets, with the options that are known of those with the same name."""
    before = known.get("data", {})
    result = {}
    for name, entry in entries.items():
        options = before.get(name) if isinstance(before, dict) else None
        own = {"reference": entry} if isinstance(entry, str) else entry
        result[name] = {**options, **own} if isinstance(options, dict) and isinstance(own, dict) else entry
    return result


def _apply(content: dict[str, Any], flags: Flags) -> None:
    """Put the flags into the contents of a study file."""
    for group in ("teachers", "assistants", "students", "methods"):
        if values := getattr(flags, group):
            content[group] = with_names(map(split_name, values), group)
    if flags.seeds is not None:
        content["seeds"] = _seeds(flags.seeds)
    if flags.layers:
        content["layers"] = list(flags.layers)
    if flags.images is not None:
        content["images"] = flags.images
    for text in flags.settings:
        set_value(content, *parse_setting(text))
    if flags.epochs is not None:
        for table in (content, *(entry for entry in _table(content.get("data", {})).values() if isinstance(entry, dict))):
            if table is content or "training" in table:
                training = table.setdefault("training", {})
                training.pop("teacher_epochs", None)
                training["epochs"] = flags.epochs


def _seeds(text: str) -> int | list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise KdxError(f"The seeds cannot be {text!r}.", "Give a number of seeds, or seeds such as 3,4,5.") from None
    return numbers[0] if len(numbers) == 1 and "," not in text else numbers

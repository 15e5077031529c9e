"""Tables of a study file as dataclasses: the names, the types and the choices of their entries are those of the fields."""

from __future__ import annotations

import types
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from kdx.choices import COVER, NO_BASE, Interpolation, PresetName, ResizeMode, Resizing, TrainingPresetName
from kdx.distill import TrainingSettings
from kdx.distill.presets import PRESETS as TRAINING_PRESETS
from kdx.errors import KdxError, near_names
from kdx.runs.plan import RunOptions
from kdx.runs.presets import PRESETS as RUN_PRESETS


@dataclass(frozen=True)
class TrainingExtras:
    """What `kdx.distill.distill` takes beside the settings: see there. preset: of ``kdx distill``. base: ``none`` trains no base."""

    preset: TrainingPresetName | None = None
    resize: ResizeMode = COVER.mode
    interpolation: Interpolation = COVER.interpolation
    base: Literal["none"] | None = None
    teacher_cache: str | None = None
    log: tuple[str, ...] = ()
    probe: int | None = None
    device: str = "auto"

    @property
    def has_base(self) -> bool:
        return self.base != NO_BASE


_AXES = ("method", "seed")
"""The training settings that are axes of a study."""

TRAINING_KEYS = (
    *(f.name for f in fields(TrainingSettings) if f.name not in (*_AXES, "resizing")),
    *(f.name for f in fields(TrainingExtras)),
)
EXPLAIN_KEYS = ("preset", *(f.name for f in fields(RunOptions) if f.name != "base"))


def training_of(
    table: Mapping[str, Any], method: str | None, seed: int, where: str = "training"
) -> tuple[TrainingSettings, TrainingExtras]:
    """The settings of a training from a table [training]; a preset supplies what the table does not contain.

    method: None where no student is trained; the settings then name the default method, which does not matter.

    Raises KdxError for an unknown key, a value of another type, and for anything that `TrainingSettings` refuses.
    """
    check_keys(table, TRAINING_KEYS, where)
    extras = TrainingExtras(**_values(TrainingExtras, table, where))
    known = {} if extras.preset is None else TRAINING_PRESETS[extras.preset]
    values = {**known, **_values(TrainingSettings, table, where)}
    if extras.probe is not None and extras.probe < 4:
        raise KdxError(f"The training setting probe cannot be {extras.probe}.", "Give 4 images or more, because scores compare images.")
    values |= {} if method is None else {"method": method}
    return TrainingSettings(**values, seed=seed, resizing=Resizing(extras.resize, extras.interpolation)), extras


def run_options_of(table: Mapping[str, Any], base: str | None, where: str = "explain") -> RunOptions:
    """The options of a run from a table [explain]; a preset supplies what the table does not contain. base: as of `RunOptions`.

    Raises KdxError for an unknown key, a value of another type or out of range, and for anything that `RunOptions` refuses.
    """
    check_keys(table, EXPLAIN_KEYS, where)
    preset = None if "preset" not in table else value_of(PresetName | None, table["preset"], f"{where}.preset")
    values = _values(RunOptions, table, where)
    for name, is_in_range in _RANGES.items():
        if name in values and not is_in_range(values[name]):
            raise KdxError(f"The option {where}.{name} cannot be {values[name]!r}.", "See kdx explain --help for its range.")
    return RunOptions(**{**({} if preset is None else RUN_PRESETS[preset]), **values}, base=base)


_RANGES: dict[str, Callable[[Any], bool]] = {
    "batch": lambda value: value >= 4,
    "chunk": lambda value: value >= 1,
    "permutations": lambda value: value >= 0,
    "confidence": lambda value: 0.5 <= value <= 0.999,
    "max_unreadable": lambda value: 0 <= value <= 1,
    "reference_images": lambda value: value >= 0,
    "project": lambda value: value >= 0,
    "max_disk": lambda value: value >= 0,
    "max_minutes": lambda value: value >= 0,
    "max_classes": lambda value: value >= 0,
    "gallery": lambda value: value >= 0,
    "workers": lambda value: value >= 0,
    "seed": lambda value: value >= 0,
}
"""The ranges that the command line checks, and `RunOptions` does not."""


def check_keys(table: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Raise KdxError for a key that is not known, with the known keys that are spelled almost like it."""
    for key in table:
        if key in known:
            continue
        full = f"{where}.{key}" if where else key
        if where.endswith("training") and key in _AXES:
            raise KdxError(f"{full} is an axis of the study, not an option.", f"Write {key}s at the top of the file.")
        near = near_names(key, known, ())
        raise KdxError(
            f"A study has no option {full!r}.", f"Did you mean {near}?" if near else f"Known options: {', '.join(sorted(known))}."
        )


def _values(cls: type, table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The entries of the table that are fields of a dataclass, as values of the fields' types."""
    hints = get_type_hints(cls)
    return {f.name: value_of(hints[f.name], table[f.name], f"{where}.{f.name}") for f in fields(cls) if f.name in table}


def value_of(hint: Any, value: Any, name: str) -> Any:
    """A value of TOML as a value of a type. A single number stands for two equal ones where the type is a pair.

    Raises KdxError, which calls the value ``name``, if the value does not have the type or is none of its choices.
    """
    arms = [arm for arm in (get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)) if arm is not types.NoneType]
    choices = [choice for arm in arms if get_origin(arm) is Literal for choice in get_args(arm)]
    if value in choices and isinstance(value, str):
        return value
    for arm in arms:
        converted = _converted(arm, value)
        if converted is not None:
            return converted
    if choices:
        raise KdxError(f"{name} cannot be {value!r}.", f"Choose one of: {near_names(str(value), choices, choices)}.")
    raise KdxError(f"{name} cannot be {value!r}.", f"Give {_described(arms)}.")


def _converted(arm: Any, value: Any) -> Any:
    """The value as one of a type that is no union; None if it is not one."""
    if get_origin(arm) is tuple:
        member, *others = get_args(arm)
        values = [value] * 2 if isinstance(value, int) and others == [member] else value
        if not isinstance(values, list | tuple) or (others == [member] and len(values) != 2):
            return None
        members = [_converted(member, item) for item in values]
        return None if None in members else tuple(members)
    if arm in (bool, str) and isinstance(value, arm):
        return value
    if arm is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if arm is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return Path(value) if arm is Path and isinstance(value, str) else None


_WORDS = {bool: "true or false", str: "a text", int: "a whole number", float: "a number", Path: "a path"}


def _described(arms: Iterable[Any]) -> str:
    """The types in words."""
    parts = []
    for arm in arms:
        member = get_args(arm)[0] if get_origin(arm) is tuple else arm
        parts.append(f"a list, each entry of which is {_WORDS[member]}" if member is not arm else _WORDS[arm])
    return " or ".join(dict.fromkeys(parts))

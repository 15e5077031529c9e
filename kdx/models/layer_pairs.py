"""Layer names by role: which layer of the student is compared with which layer of the base and of the teacher."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from kdx.errors import KdxError
from kdx.roles import BASELINE, READING_ORDER, ROLES

_SYNTAX = "Write LAYER, STUDENT_LAYER=TEACHER_LAYER, or a layer per role: student=LAYER,teacher=LAYER."

_ROLE = re.compile(rf"(?:^|,)({'|'.join(ROLES)})=")
"""The start of a role's layer. The names of modules, and everything after them, may contain commas and equals signs."""


@dataclass(frozen=True)
class LayerNames:
    """One layer of the comparison: each role's own name of it. ``str`` is the shortest text that `parse_layers` reads as these names."""

    student: str
    base: str
    teacher: str

    @classmethod
    def of(cls, by_role: Mapping[str, str]) -> LayerNames:
        """A role that is not named has the student's name. Raises KdxError without a student's name, for an empty one, and for other
        roles."""
        if not {"student"} <= set(by_role) <= set(ROLES) or not all(by_role.values()):
            text = ",".join(f"{role}={name}" for role, name in by_role.items())
            raise KdxError(f"{text!r} is not a layer for each role: student, and optionally base and teacher.", _SYNTAX)
        return cls(**{role: by_role.get(role, by_role["student"]) for role in ROLES})

    def at(self, role: str) -> str:
        """The name that a role's network has for the layer."""
        return {"student": self.student, "base": self.base, "teacher": self.teacher, BASELINE: self.student}[role]

    def __str__(self) -> str:
        by_role = {role: self.at(role) for role in ("student", *READING_ORDER) if role == "student" or self.at(role) != self.student}
        if len(by_role) == 1:
            return f"student={self.student}" if "=" in self.student else self.student
        if set(by_role) == {"student", "teacher"} and "=" not in self.student and self.student not in ROLES:
            return f"{self.student}={self.teacher}"
        return ",".join(f"{role}={name}" for role, name in by_role.items())


LayerNamesLike = str | Iterable[str | Mapping[str, str] | LayerNames] | Mapping[str, str]
"""One layer, or several: each as text that `parse_layers` reads, as a mapping from roles to names, or as `LayerNames`. A mapping of several
layers is from the student's and base's layer to the teacher's."""


def parse_layers(names: Sequence[str]) -> dict[str, LayerNames]:
    """The names of each layer by the student's name, in order, from ``layer``, ``student_layer=teacher_layer`` or
    ``student=layer,base=layer,teacher=layer``. In the last form, a role that is not named has the student's layer; a layer that is itself
    called student, base or teacher needs this form.

    A layer may end in a stated layout, such as ``blocks.9:tokens(prefix=1,grid=14x14)``; an equals sign inside it does not separate.

    Raises KdxError for a layer without a name and for a student's layer that is named twice.
    """
    return _by_student(_parsed(name) for name in names)


def layer_names(layers: LayerNamesLike) -> dict[str, LayerNames]:
    """The names of each layer by the student's name, from any form of `LayerNamesLike`."""
    if isinstance(layers, str):
        return parse_layers([layers])
    if isinstance(layers, Mapping):
        if "student" in layers and set(layers) <= set(ROLES):
            return _by_student([LayerNames.of(layers)])
        return _by_student(LayerNames(student, student, teacher) for student, teacher in layers.items())
    return _by_student(_named(layer) for layer in layers)


def _named(layer: str | Mapping[str, str] | LayerNames) -> LayerNames:
    if isinstance(layer, LayerNames):
        return layer
    return LayerNames.of(layer) if isinstance(layer, Mapping) else _parsed(layer)


def _by_student(layers: Iterable[LayerNames]) -> dict[str, LayerNames]:
    result: dict[str, LayerNames] = {}
    for names in layers:
        if names.student in result:
            raise KdxError(f"The layer {names.student!r} is named twice.", "Name each layer of the student once.")
        result[names.student] = names
    return result


def _parsed(text: str) -> LayerNames:
    if _ROLE.match(text):
        starts = [*_ROLE.finditer(text)]
        ends = [match.start() for match in starts[1:]] + [len(text)]
        by_role = [(match[1], text[match.end() : end]) for match, end in zip(starts, ends, strict=True)]
        if len(dict(by_role)) < len(by_role):
            raise KdxError(f"{text!r} names the layer of a role twice.", _SYNTAX)
        return LayerNames.of(dict(by_role))
    student, equals, teacher = _partition(text)
    if not student or (equals and not teacher):
        raise KdxError(f"{text!r} is not a layer or a pair of layers.", _SYNTAX)
    return LayerNames(student, student, teacher or student)


def _partition(text: str) -> tuple[str, str, str]:
    """The parts before, at and after the first equals sign outside parentheses, in which layouts have options."""
    match = re.match(r"((?:[^=(]|\([^)]*\))*)=(.*)", text, re.S)
    return (match[1], "=", match[2]) if match else (text, "", "")

"""Layer pairs: which layer of the teacher is compared with which layer of student and base."""

from __future__ import annotations

import re
from collections.abc import Sequence

from kdx.errors import KdxError


def parse_layers(names: Sequence[str]) -> dict[str, str]:
    """From ``layer`` or ``student_layer=teacher_layer``, the teacher's layer by the layer of student and base, in order.

    A layer may end in a stated layout, such as ``blocks.9:tokens(prefix=1,grid=14x14)``; an equals sign inside it does not separate.

    Raises KdxError for a layer without a name and for one that is named twice.
    """
    pairs: dict[str, str] = {}
    for name in names:
        student, equals, teacher = _partition(name)
        if not student or (equals and not teacher):
            raise KdxError(f"{name!r} is not a layer or a pair of layers.", "Write LAYER, or STUDENT_LAYER=TEACHER_LAYER.")
        if student in pairs:
            raise KdxError(f"The layer {student!r} is named twice.", "Name each layer of the student once.")
        pairs[student] = teacher or student
    return pairs


def _partition(name: str) -> tuple[str, str, str]:
    """The parts before, at and after the first equals sign outside parentheses."""
    match = re.match(r"((?:[^=(]|\([^)]*\))*)=(.*)", name, re.S)
    return (match[1], "=", match[2]) if match else (name, "", "")

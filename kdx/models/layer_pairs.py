"""Layer pairs: which layer of the teacher is compared with which layer of student and base."""

from __future__ import annotations

from collections.abc import Sequence

from kdx.errors import KdxError


def parse_layers(names: Sequence[str]) -> dict[str, str]:
    """From ``layer`` or ``student_layer=teacher_layer``, the teacher's layer by the layer of student and base, in order.

    Raises KdxError for a layer without a name and for one that is named twice.
    """
    pairs: dict[str, str] = {}
    for name in names:
        student, equals, teacher = name.partition("=")
        if not student or (equals and not teacher):
            raise KdxError(f"{name!r} is not a layer or a pair of layers.", "Write LAYER, or STUDENT_LAYER=TEACHER_LAYER.")
        if student in pairs:
            raise KdxError(f"The layer {student!r} is named twice.", "Name each layer of the student once.")
        pairs[student] = teacher or student
    return pairs

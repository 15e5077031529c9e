"""Numbers as readers see them."""

from __future__ import annotations

import math


def number(value: float, digits: int = 2, sign: bool = False) -> str:
    """A number with a true minus sign and no negative zero; an en dash where it is not finite."""
    if not math.isfinite(value):
        return "–"
    value = float(round(value, digits)) or 0.0
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")

"""Colours as people with and without colour-vision deficiencies see them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def _linear(colour: NDArray[np.uint8]) -> NDArray[np.float64]:
    part = np.asarray(colour, dtype=np.float64) / 255
    return np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)


def _lab(linear: NDArray[np.float64]) -> NDArray[np.float64]:
    """CIE L*a*b* of linear sRGB."""
    xyz = linear @ np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]).T
    f = np.cbrt(np.clip(xyz / [0.9505, 1.0, 1.089], 1e-6, None))
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


# Linear sRGB as it appears without one kind of cone (Machado, Oliveira and Fernandes 2009, severity 1).
DEFICIENCIES = {
    "none": np.eye(3),
    "protanopia": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
    "deuteranopia": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),
    "tritanopia": np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]),
}


def seen(colours: NDArray[Any], deficiency: str) -> NDArray[np.float64]:
    """CIE L*a*b* of uint8 sRGB colours [..., 3] as they are seen. A distance of about 2 is just noticeable."""
    return _lab(np.clip(_linear(colours) @ DEFICIENCIES[deficiency].T, 0, 1))

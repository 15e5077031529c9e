"""scikit-learn's handwritten digits."""

from __future__ import annotations

import numpy as np
from PIL import Image

from kdx.data.labelled_images import Dataset


def open_digits(reference: str, place: str) -> Dataset:
    """The 1,797 scans of handwritten digits, 8 x 8, that scikit-learn contains."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    pixels = np.rint(scans.images * (255 / 16)).astype(np.uint8)  # 17 levels, 0 to 16
    labels = scans.target.astype(np.int64)
    ids = tuple(f"digits/{index:04d}" for index in range(len(labels)))
    classes = tuple(str(digit) for digit in range(10))
    return Dataset("digits", classes, labels, ids, {"digits": pixels.tobytes()}, lambda index: Image.fromarray(pixels[index]))

"""Data references, splits, batches, decoding, and generated images."""

from kdx.data.batches import random_batches
from kdx.data.dataset import Dataset, open_data
from kdx.data.images import load_images
from kdx.data.inputs import as_pixels
from kdx.data.planted_cues import Composites, draw_composites
from kdx.data.splits import class_balanced_sample, stratified_splits

__all__ = [
    "Composites",
    "Dataset",
    "as_pixels",
    "class_balanced_sample",
    "draw_composites",
    "load_images",
    "open_data",
    "random_batches",
    "stratified_splits",
]

"""Data references, splits, batches and decoding."""

from kdx.data.batches import random_batches
from kdx.data.dataset import Dataset, open_data
from kdx.data.images import load_images
from kdx.data.splits import class_balanced_sample, stratified_splits

__all__ = ["Dataset", "class_balanced_sample", "load_images", "open_data", "random_batches", "stratified_splits"]

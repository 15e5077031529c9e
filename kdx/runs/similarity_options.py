"""The options of `kdx similarity`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kdx.choices import Interpolation, Precision, ResizeMode, RuntimeName, SimilarityGeometry, StoredPrecision


@dataclass(frozen=True, kw_only=True)
class SimilarityOptions:
    """How networks are compared over a data set; the command `kdx similarity` describes each option.

    max_layers: the largest number of layers per network, if no layers are named. batch: the images per pass and, with the geometry
    ``batch``, per set of distances. stored_precision, max_disk, max_minutes: for the geometry ``whole``, as in `kdx.runs.plan.RunOptions`.
    project: with K > 0 and the geometry ``whole``, the features of an image at a layer are projected to K numbers
    (`kdx.features.projection.Sketch`) if there are more than K; squared distances then have a relative standard deviation of at most
    sqrt(2/K).
    """

    layers: Mapping[str, Sequence[str]]
    max_layers: int = 20
    geometry: SimilarityGeometry = "auto"
    batch: int = 64
    runtime: RuntimeName = "auto"
    device: str = "auto"
    precision: Precision = "float32"
    image_size: int | None = None
    resize: ResizeMode | None = None
    interpolation: Interpolation | None = None
    split: str | None = None
    max_images: int | None = None
    max_unreadable: float = 0.01
    workers: int | None = None
    project: int = 0
    stored_precision: StoredPrecision = "float32"
    max_disk: float | None = None
    max_minutes: float | None = None
    confidence: float = 0.95
    seed: int = 0

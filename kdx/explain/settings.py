"""The settings that `kdx.Explainer` and a run share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from kdx.choices import Features, GeometryName, ObjectiveName, Precision, RuntimeName, SalientClass, SalientImage, SalientScore, Weighting
from kdx.errors import KdxError
from kdx.kernels import geometry
from kdx.maps.salient_images import Salience
from kdx.maps.unicam import check_weighting


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the networks are executed, and which maps and scores are computed. `kdx.Explainer` documents each setting.

    Raises ValueError for an unknown objective, weighting, geometry, kind of features or of salient images and for a chunk below 1, and
    KdxError for ``keep`` and ``noise`` out of range, and for settings of salient images without salient features.
    """

    runtime: RuntimeName = "auto"
    device: str = "auto"
    precision: Precision = "float32"
    geometry: GeometryName = "auto"
    objective: ObjectiveName = "relevance"
    weighting: Weighting = "gap"
    chunk: int | None = None
    permutations: int = 999
    confidence: float = 0.95
    seed: int = 0
    pooled: bool = False
    features: Features = "raw"
    keep: float = 0.5
    noise: float = 0.0
    salient_class: SalientClass = "predicted"
    salient_score: SalientScore = "logit"
    salient_image: SalientImage = "exact"

    def __post_init__(self) -> None:
        if self.objective not in geometry.OBJECTIVES:
            raise ValueError(f"no objective {self.objective!r}")
        check_weighting(self.weighting)
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk must be 1 or more, not {self.chunk}")
        if self.geometry not in get_args(GeometryName):
            raise ValueError(f"no geometry {self.geometry!r}")
        if self.features not in get_args(Features):
            raise ValueError(f"no features {self.features!r}")
        for name, kinds in (("class", SalientClass), ("score", SalientScore), ("image", SalientImage)):
            if getattr(self, f"salient_{name}") not in get_args(kinds):
                raise ValueError(f"no salient {name} {getattr(self, f'salient_{name}')!r}")
        if self._salience != Salience() and self.features == "raw":
            raise KdxError(
                "`keep`, `noise`, and the class, score and kind of salient images apply only to salient features.",
                "Choose salient features (--features salient), or leave these settings out.",
            )

    @property
    def _salience(self) -> Salience:
        return Salience(self.keep, self.noise, self.salient_class, self.salient_score, self.salient_image)

    @property
    def salience(self) -> Salience | None:
        """What salient images keep, or None for raw features."""
        return self._salience if self.features == "salient" else None

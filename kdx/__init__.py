"""kdx shows what a student network learned from its teacher, and measures it."""

from typing import TYPE_CHECKING

from kdx.comparison import compare
from kdx.errors import KdxError
from kdx.explainer import Explainer, Explanation, LayerResult
from kdx.saliency import ClassMaps, grad_cam, hires_cam, unicam_before
from kdx.salient import impute, salient_images, top_mask
from kdx.scores import Score, fss, partial_rs, rs
from kdx.unicam import Maps, Reference, unicam

__all__ = [
    "ClassMaps",
    "Explainer",
    "Explanation",
    "KdxError",
    "LayerResult",
    "Maps",
    "Reference",
    "Score",
    "compare",
    "fss",
    "grad_cam",
    "hires_cam",
    "impute",
    "partial_rs",
    "rs",
    "salient_images",
    "top_mask",
    "unicam",
    "unicam_before",
]

if TYPE_CHECKING:
    __version__: str
else:

    def __getattr__(name: str) -> str:
        if name == "__version__":  # when asked for, since a checkout that is not installed has none
            from importlib.metadata import version

            return version("kdx")
        raise AttributeError(f"module 'kdx' has no attribute {name!r}")

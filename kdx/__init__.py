"""kdx shows what a student network learned from its teacher, and measures it."""

from kdx.errors import KdxError
from kdx.explainer import Explainer, Explanation, LayerResult
from kdx.scores import Score, fss, partial_rs, rs
from kdx.unicam import Maps, Reference, unicam

__all__ = ["Explainer", "Explanation", "KdxError", "LayerResult", "Maps", "Reference", "Score", "fss", "partial_rs", "rs", "unicam"]

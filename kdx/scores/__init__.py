"""FSS, RS and what they are made of: inner products, uncertainty, pooling over batches."""

from kdx.scores.metrics import fss, partial_rs, rs
from kdx.scores.pool import LayerScores
from kdx.scores.score import Contrast, Score

__all__ = ["Contrast", "LayerScores", "Score", "fss", "partial_rs", "rs"]

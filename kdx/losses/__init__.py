"""Losses on the geometry of features, for training."""

from kdx.losses.correlations import distance_correlation, relevance

__all__ = ["distance_correlation", "relevance"]

"""Callbacks for the training loops of other packages. Each package is imported when its callback is made."""

from kdx.callbacks.hugging_face import HuggingFaceProbe
from kdx.callbacks.lightning import LightningProbe

__all__ = ["HuggingFaceProbe", "LightningProbe"]

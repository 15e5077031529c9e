"""Training a teacher, a base and a student: losses, the loop, and the demonstration's recipe."""

from kdx.distill.losses import METHODS, Method, Outputs, attention_transfer, kd
from kdx.distill.settings import DEMO, Progress, Settings
from kdx.distill.train import distill

__all__ = ["DEMO", "METHODS", "Method", "Outputs", "Progress", "Settings", "attention_transfer", "distill", "kd"]

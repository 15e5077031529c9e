"""Mixed precision, memory layout and compilation of the networks that are trained."""

from __future__ import annotations

import torch
from torch import nn

from kdx.distill.settings import TrainingSettings
from kdx.errors import KdxError


def check_precision(settings: TrainingSettings, device: torch.device) -> None:
    """Raise KdxError for a number format that the device does not compute in."""
    if settings.precision == "float16" and device.type != "cuda":
        raise KdxError("float16 needs a GPU for training.", "Choose --precision bfloat16 where the processor has it, or float32.")
    if settings.precision == "bfloat16" and not has_bfloat16(device):
        raise KdxError(f"The device {device} does not compute in bfloat16.", "Choose --precision float32.")


def has_bfloat16(device: torch.device) -> bool:
    """Whether PyTorch computes in bfloat16 on this device; on a CPU, whether oneDNN has kernels for it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def autocast(settings: TrainingSettings, device: torch.device) -> torch.autocast:
    """The context in which networks compute in ``settings.precision``."""
    dtype = torch.float16 if settings.precision == "float16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=settings.precision != "float32")


def gradient_scaler(settings: TrainingSettings, device: torch.device) -> torch.amp.GradScaler:
    """Scales losses so that gradients do not vanish in float16, and leaves out steps whose gradients overflow. Off in other formats."""
    return torch.amp.GradScaler(device.type, enabled=settings.precision == "float16")


def prepare_layout(network: nn.Module, settings: TrainingSettings) -> None:
    """Bring the weights into the memory layout of ``settings.channels_last``."""
    if settings.channels_last:
        network.to(memory_format=torch.channels_last)

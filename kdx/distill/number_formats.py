"""Mixed precision, memory layout and compilation: what makes training faster and changes results only by rounding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdx.distill.losses import method_requirements
from kdx.distill.processes import Processes
from kdx.distill.settings import TrainingSettings
from kdx.errors import KdxError
from kdx.export.graphs import FeatureGraph, Preprocessing


def check_settings(settings: TrainingSettings, device: torch.device, processes: Processes) -> None:
    """Raise KdxError for settings that this device or this number of processes cannot train with."""
    parts = processes.count * settings.accumulate
    if settings.batch < 2 * parts:
        raise KdxError(
            f"A batch of {settings.batch} images cannot be split into {parts} parts.", f"Give a batch of {2 * parts} or more images."
        )
    if processes.count > 1 and method_requirements(settings.method).memory:
        raise KdxError(f"The method {settings.method} stores numbers of every image, and needs a single process.", "Start one process.")
    if settings.compile and method_requirements(settings.method).pre_activations:
        raise KdxError(
            f"The method {settings.method} reads features before the activation, which compiled networks do not show.",
            "Leave out --compile.",
        )
    if settings.precision == "float16" and device.type != "cuda":
        raise KdxError("float16 needs a GPU for training.", "Choose --precision bfloat16 where the processor has it, or float32.")
    if settings.precision == "bfloat16" and not has_bfloat16(device):
        raise KdxError(f"The device {device} does not compute in bfloat16.", "Choose --precision float32.")


def check_channels_last(network: nn.Module, device: torch.device) -> None:
    """Raise KdxError for a network whose gradients PyTorch writes beyond their memory in the layout with the channels last."""
    found = _overwriting_layer(network, device)
    if found is not None:
        name, module = found
        raise KdxError(
            f"This processor (AVX2) cannot train the layer {name} with --channels-last: its {module.in_channels} channels are not a "
            "multiple of 8, for which PyTorch writes beyond the memory of the gradient.",
            "Leave out --channels-last.",
        )


def _overwriting_layer(network: nn.Module, device: torch.device) -> tuple[str, nn.Conv2d] | None:
    """The first layer, with its name, whose gradient PyTorch writes beyond its memory if channels are last.

    oneDNN's gradient of a 1 x 1 convolution for AVX2 (jit_avx2_1x1_convolution_bwd_weights_t) does so in this layout unless the number of
    input channels is a multiple of 8. Valgrind shows it for PyTorch 2.13 and 2 input channels; the process may crash much later.
    """
    if device.type != "cpu" or torch.backends.cpu.get_cpu_capability() != "AVX2":
        return None
    convolutions = ((name, module) for name, module in network.named_modules() if isinstance(module, nn.Conv2d))
    return next(((name, module) for name, module in convolutions if module.kernel_size == (1, 1) and module.in_channels % 8), None)


def has_bfloat16(device: torch.device) -> bool:
    """Whether PyTorch computes in bfloat16 on this device; on a CPU, whether oneDNN has kernels for it."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def autocast(settings: TrainingSettings, device: torch.device) -> torch.autocast:
    """The context in which networks compute in ``settings.precision``."""
    dtype = torch.float16 if settings.precision == "float16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=settings.precision != "float32")


def gradient_scaler(settings: TrainingSettings, device: torch.device) -> torch.amp.GradScaler:
    """Scales losses so that gradients do not vanish in float16, and leaves out steps whose gradients overflow. Off in other formats."""
    return torch.amp.GradScaler(device.type, enabled=settings.precision == "float16")


class CompiledGraph(FeatureGraph):
    """A `FeatureGraph` whose network torch.compile has compiled, with its layers' features as further outputs.

    The hooks on the layers stay registered, because a compiled pass contains the hooks that were there when it was compiled.
    """

    def __init__(self, network: nn.Module, layers: Sequence[str], preprocessing: Preprocessing, backend: str = "inductor") -> None:
        super().__init__(network, layers, preprocessing)
        self._raw: dict[str, object] = {}
        self._register_hooks(self._raw, lambda raw: raw)

        def captured(images: Tensor) -> tuple[object, dict[str, object]]:
            self._raw.clear()
            return self._predict(images), dict(self._raw)

        # Compiled passes are stored with the code, and are reused for another network of the same shapes without looking at its hooks.
        captured.__code__ = captured.__code__.replace()
        # Inductor puts channels last on a processor.
        device = next(network.parameters(), torch.empty(0)).device
        options: dict[str, Any] | None = (
            {"layout_optimization": False} if backend == "inductor" and _overwriting_layer(network, device) else None
        )
        self._compiled = torch.compile(captured, backend=backend, options=options)

    def _pass(self, images: Tensor, capture: Callable[[Tensor], Tensor]) -> tuple[object, dict[str, object]]:
        return self._compiled(images)

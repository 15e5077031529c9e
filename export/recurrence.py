"""Recurrent layers in a network whose gradients are exported: their steps are unrolled, and each becomes about 60 operators."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from kdx.disk import log
from kdx.errors import KdxError
from kdx.export.graphs import GradientGraph

MOST_STEPS = 128
"""The most steps that an export unrolls, added over layers and directions. They take about five minutes on two slow cores."""

_SLOW_STEPS = 16

_SECONDS_PER_STEP = 3
"""On two slow cores, for tracing, converting and checking the about 60 operators of a step."""


def check_steps(graph: GradientGraph, images: Tensor) -> None:
    """Raise KdxError if an export would unroll too many steps of recurrent layers; announce a slow export.

    One eager pass of ``images`` counts the steps, before tracing, which takes minutes for such a network. Recurrent layers before the
    graph's layers are not differentiated and do not count. PyTorch's recurrent modules and cells count; recurrence that a network's
    own code writes as a loop does not.
    """
    modules = {path: module for path, module in graph.network.named_modules() if isinstance(module, nn.RNNBase | nn.RNNCellBase)}
    if not modules:
        return
    steps: dict[str, int] = {}
    hooks = [module.register_forward_hook(_counting(steps, path)) for path, module in modules.items()]
    try:
        graph.recorded(images)
    finally:
        for hook in hooks:
            hook.remove()
    total = sum(steps.values())
    if total > MOST_STEPS:
        first = next(iter(steps))
        raise KdxError(
            f"Gradients through {type(modules[first]).__name__} {first!r} cannot be exported: recurrent layers run {total} steps,"
            f" which would take up to {total * _SECONDS_PER_STEP / 60:.0f} minutes, and an export unrolls at most {MOST_STEPS}.",
            "Run the network with --runtime eager, export --kind features, or name layers after its recurrent layers.",
        )
    if total > _SLOW_STEPS:
        log.warning("unrolling %d steps of recurrent layers; the export takes up to %d s", total, total * _SECONDS_PER_STEP)


def _counting(steps: dict[str, int], path: str) -> Callable[[nn.Module, tuple[object, ...], object], None]:
    """A hook that adds the steps of a call to ``steps``, if gradients flow through the call."""

    def hook(module: nn.Module, inputs: tuple[object, ...], _output: object) -> None:
        sequence = inputs[0] if inputs else None
        if isinstance(sequence, Tensor) and sequence.requires_grad:
            steps[path] = steps.get(path, 0) + _steps(module, sequence)

    return hook


def _steps(module: nn.Module, sequence: Tensor) -> int:
    """The steps of one call, added over the module's layers and directions."""
    if not isinstance(module, nn.RNNBase):
        return 1
    length = sequence.shape[1 if module.batch_first and sequence.ndim == 3 else 0]
    return int(length) * module.num_layers * (2 if module.bidirectional else 1)

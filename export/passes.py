"""One pass of a network, without what its code does only to save memory or to skip training."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint as checkpointing
from torch.overrides import TorchFunctionMode

from kdx.errors import KdxError, first_line


@contextmanager
def network_errors(action: str = "The network") -> Iterator[None]:
    """Turn an exception of the network's own code into a KdxError that quotes it.

    Under tracing, exceptions pass unchanged: they may be part of the tracer's control flow, and the export quotes them itself.
    """
    try:
        yield
    except KdxError:
        raise
    except Exception as error:
        if torch.compiler.is_compiling():
            raise
        hint = "Give images of the size and the number of channels that it takes, or fix its code."
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            hint = "Compute fewer images at once: lower --chunk or --batch."
        raise KdxError(f"{action} raises {type(error).__name__}: {first_line(error)}.", hint) from error


class GradientsStayOn(TorchFunctionMode):
    """Within this context, ``torch.no_grad`` and ``torch.set_grad_enabled(False)`` do nothing in the current thread.

    A network that is trained only in its head often runs its backbone under ``torch.no_grad``. The derivative of its logits with
    respect to a layer of the backbone exists all the same, and an exported file computes it. ``detach()`` still cuts gradients.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch._C._set_grad_enabled:
            return None
        return func(*args, **(kwargs or {}))


_thread = threading.local()
_lock = threading.Lock()
_open_contexts = 0
_CheckpointFunction = checkpointing.CheckpointFunction
_generator = checkpointing._checkpoint_without_reentrant_generator


@contextmanager
def no_checkpointing() -> Iterator[None]:
    """Within this context, ``torch.utils.checkpoint`` calls its function and keeps the activations, in the current thread.

    Checkpointing runs a part of the forward pass again during the backward pass. By then the hooks that replace a layer's output are
    gone, so the gradients would be those of another pass. Networks import ``checkpoint`` under any name; it finds its two
    implementations in its own module, which is where this context replaces them. Other threads still get the originals.
    """
    depth = getattr(_thread, "depth", 0)
    _thread.depth = depth + 1
    _count_context(1)
    try:
        yield
    finally:
        _thread.depth = depth
        _count_context(-1)


def _count_context(change: int) -> None:
    global _open_contexts
    with _lock:
        _open_contexts += change
        replaced = _open_contexts > 0
        checkpointing.CheckpointFunction = _PlainFunction if replaced else _CheckpointFunction  # type: ignore[misc, assignment]
        checkpointing._checkpoint_without_reentrant_generator = _plain_generator if replaced else _generator


class _PlainFunction:
    """Takes the place of `torch.utils.checkpoint.CheckpointFunction`."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        if getattr(_thread, "depth", 0):
            return function(*args)
        return _CheckpointFunction.apply(function, preserve_rng_state, *args)


def _plain_generator(*args: Any, **kwargs: Any) -> Generator[None]:
    """Takes the place of the two halves of checkpointing, before and after the function that `checkpoint` calls itself."""
    if getattr(_thread, "depth", 0):
        yield
    else:
        yield from _generator(*args, **kwargs)

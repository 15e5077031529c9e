"""Float32 products and convolutions without TensorFloat-32 or bfloat16, which would leave ten or seven bits of each factor.

PyTorch's convolutions on a GPU use TensorFloat-32 unless a program forbids it. The settings belong to the whole process. They are
therefore changed by the first block that begins, in whatever thread, and restored by the last one that ends.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch

_lock = threading.Lock()


class _Blocks:
    """The blocks of one kind that are running now. allowed: whether reduced precision is allowed in them."""

    def __init__(self, allowed: bool) -> None:
        self._allowed = allowed
        self._running = 0
        self._restore: list[Callable[[], None]] = []

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with _lock:
            if self._running == 0:
                self._restore = _change(self._allowed)
            self._running += 1
        try:
            yield
        finally:
            with _lock:
                self._running -= 1
                if self._running == 0:
                    for restore in self._restore:
                        restore()


_exact, _reduced = _Blocks(allowed=False), _Blocks(allowed=True)


@contextmanager
def ieee_float32() -> Iterator[None]:
    """Run a block in which float32 products and convolutions are computed in float32, on a GPU and on the CPU."""
    with _exact():
        yield


@contextmanager
def tf32() -> Iterator[None]:
    """Run the pass of a network, within a block of `ieee_float32`, with TensorFloat-32 on a GPU.

    Meanwhile, the float32 products of other threads are reduced too.
    """
    with _reduced():
        yield


def _change(allowed: bool) -> list[Callable[[], None]]:
    """Allow or forbid reduced precision. Returns what restores the settings, in order.

    PyTorch has older and newer settings of the same thing, and refuses to work where they disagree. The older ones are changed unless a
    program has used the newer ones, after which the older ones cannot be read.
    """
    backends: Any = torch.backends
    older: list[tuple[Callable[[], Any], Callable[[Any], None], Any]] = [
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "high" if allowed else "highest"),
        (lambda: backends.cudnn.allow_tf32, partial(setattr, backends.cudnn, "allow_tf32"), allowed),
    ]
    newer = [(backends.cuda.matmul, backends.mkldnn.matmul), (backends.cudnn.conv, backends.cudnn.rnn)]
    restore: list[Callable[[], None]] = []
    for (get, change, value), settings in zip(older, newer, strict=True):
        before = [setting.fp32_precision for setting in settings]
        with suppress(RuntimeError):
            restore.append(partial(change, get()))
            change(value)
        for setting, precision in zip(settings, before, strict=True):
            restore.append(partial(setattr, setting, "fp32_precision", precision))
            if allowed and setting is not backends.mkldnn.matmul:
                setting.fp32_precision = "tf32"
            elif setting.fp32_precision != "none":
                setting.fp32_precision = "ieee"
    return restore

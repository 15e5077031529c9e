"""Float32 products and convolutions without TensorFloat-32 or bfloat16, which would leave ten or seven bits of each factor.

PyTorch's convolutions on a GPU use TensorFloat-32 unless a program forbids it. The settings belong to the whole process. They are
therefore changed by the first block of `ieee_float32` that begins, in whatever thread, and restored by the last one that ends.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch

_lock = threading.Lock()
_blocks = 0
_restore: list[Callable[[], None]] = []


@contextmanager
def ieee_float32() -> Iterator[None]:
    """Run a block in which float32 products and convolutions are computed in float32, on a GPU and on the CPU."""
    global _blocks
    with _lock:
        if _blocks == 0:
            _restore[:] = _forbid()
        _blocks += 1
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
            if _blocks == 0:
                for restore in _restore:
                    restore()


def _forbid() -> list[Callable[[], None]]:
    """Forbid reduced precision. Returns what restores the settings, in order.

    PyTorch has older and newer settings of the same thing, and refuses to work where they disagree. The older ones are changed unless a
    program has used the newer ones, after which the older ones cannot be read.
    """
    backends: Any = torch.backends
    older: list[tuple[Callable[[], Any], Callable[[Any], None], Any]] = [
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
        (lambda: backends.cudnn.allow_tf32, partial(setattr, backends.cudnn, "allow_tf32"), False),
    ]
    newer = [(backends.cuda.matmul, backends.mkldnn.matmul), (backends.cudnn.conv, backends.cudnn.rnn)]
    restore: list[Callable[[], None]] = []
    for (get, change, exact), settings in zip(older, newer, strict=True):
        before = [setting.fp32_precision for setting in settings]
        with suppress(RuntimeError):
            restore.append(partial(change, get()))
            change(exact)
        for setting, value in zip(settings, before, strict=True):
            restore.append(partial(setattr, setting, "fp32_precision", value))
            if setting.fp32_precision != "none":
                setting.fp32_precision = "ieee"
    return restore

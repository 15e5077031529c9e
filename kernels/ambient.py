"""PyTorch's ambient state, which a program sets around its calls of kdx, and which must not change a result.

The state that belongs to a thread is set here, in one place: autocast, inference mode, gradient recording and the default device. The
default number format belongs to the whole process, so code that makes a tensor names its type instead. The precision of float32 products
also belongs to the process; `kdx.kernels.precision` sets it for as long as any thread is in a function of kdx.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from kdx import patience, threads
from kdx.kernels.precision import ieee_float32


@contextmanager
def neutral() -> Iterator[None]:
    """Run a block, or as a decorator a function, without autocast, inference mode, recorded gradients, default device and TF32.

    In it, OpenMP's threads do not spin beside busy processes (`kdx.patience`), and there are at most as many as the process has cores
    (`kdx.threads`).
    Every public function that computes has this decorator, or that of `full_precision`. Code inside it that needs gradients uses
    torch.enable_grad().
    """
    with ExitStack() as stack:
        stack.enter_context(full_precision())
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(within_limits())
        stack.enter_context(patience.patient(torch.get_num_threads()))
        yield


@contextmanager
def full_precision() -> Iterator[None]:
    """Run a block, or as a decorator a function, without autocast, default device and TF32, but with the caller's recording of gradients.

    The caller decides whether gradients are recorded: for functions of tensors that are being trained.
    """
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(ieee_float32())
        yield


@contextmanager
def within_limits() -> Iterator[None]:
    """Run a block with at most as many threads of PyTorch as a container allows, unless the user has set one of `threads.COUNTS`.

    The number belongs to the calling thread. A thread that first uses PyTorch while another one is in the block starts with that
    block's number.
    """
    limit = threads.quota()
    if limit is None or torch.get_num_threads() <= limit or any(name in os.environ for name in threads.COUNTS):
        yield
        return
    with torch_threads(limit):
        yield


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Run a block with so many threads of PyTorch. The number belongs to the calling thread, as in `within_limits`."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def recordable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or a copy of an inference tensor, which autograd cannot record."""
    return tensor.clone() if tensor.is_inference() else tensor

"""One CUDA stream per runner."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kdx.errors import KdxError

CPU = torch.device("cpu")


class CudaStream:
    """A runner's own stream on the GPU, for one pass at a time.

    The default stream does not serve: ONNX Runtime takes its stream once, when a session starts, and TensorRT synchronises at every
    pass on the default stream. A pass waits for the pending work of PyTorch's current stream, and that stream then waits for the pass,
    so that PyTorch may reuse the memory afterwards.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._lock = threading.Lock()

    @property
    def handle(self) -> int:
        return int(self._stream.cuda_stream)

    @property
    def device(self) -> torch.device:
        return self._stream.device

    def synchronize(self) -> None:
        self._stream.synchronize()

    @contextmanager
    def taken(self) -> Iterator[int]:
        """The stream's handle, for one pass."""
        with self._lock, torch.cuda.device(self.device):
            current = torch.cuda.current_stream(self.device)
            self._stream.wait_stream(current)
            try:
                yield self.handle
            finally:
                current.wait_stream(self._stream)


def gpu_device(device: torch.device | None, user: str) -> torch.device:
    """``device``, or PyTorch's current GPU, with its number. KdxError, which names the ``user``, where there is no GPU."""
    check_gpu("cuda" if device is None else str(device), user)
    return torch.device("cuda", torch.cuda.current_device() if device is None or device.index is None else device.index)


def check_gpu(device: str, user: str) -> None:
    if not device.startswith("cuda"):
        raise KdxError(f"{user} runs on an NVIDIA GPU, not on {device}.", "Choose --device cuda, or another runtime.")
    if not torch.cuda.is_available():
        raise KdxError(
            f"{user} runs on an NVIDIA GPU, and PyTorch sees none.",
            "Choose --runtime onnx or eager on the CPU; kdx doctor lists what is missing.",
        )

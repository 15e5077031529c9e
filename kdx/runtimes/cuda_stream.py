"""A CUDA stream per runner."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kdx.errors import KdxError

CPU = torch.device("cpu")


class CudaStream:
    """A stream of a runner's own on the GPU, for one pass at a time.

    Its own, since ONNX Runtime takes one at the start and for good, and TensorRT synchronises at every pass on the default one.
    The pass waits for what PyTorch's current stream has still to do, and that stream then waits for the pass: memory that
    PyTorch reuses afterwards is free by then.
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
        with self._lock, torch.cuda.device(self.device):
            current = torch.cuda.current_stream(self.device)
            self._stream.wait_stream(current)
            try:
                yield self.handle
            finally:
                current.wait_stream(self._stream)


def gpu_device(device: torch.device | None, who: str) -> torch.device:
    """The GPU asked for, or PyTorch's current one, with its number; KdxError where there is none."""
    check_gpu("cuda" if device is None else str(device), who)
    return torch.device("cuda", torch.cuda.current_device() if device is None or device.index is None else device.index)


def check_gpu(device: str, who: str) -> None:
    if not device.startswith("cuda"):
        raise KdxError(f"{who} runs on an NVIDIA GPU, not on {device}.", "Choose --device cuda, or another runtime.")
    if not torch.cuda.is_available():
        raise KdxError(
            f"{who} runs on an NVIDIA GPU, and PyTorch sees none.",
            "Choose --runtime onnx or eager on the CPU; kdx doctor says what is missing.",
        )

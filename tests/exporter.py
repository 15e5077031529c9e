"""PyTorch's exporter reads its table of operators again for every file, which takes a fifth of an export of a small network.

The tests export about a hundred files, so they read the table once per process. Nothing changes the table: kdx adds no operators to it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch.onnx

_export = torch.onnx.export


@functools.cache
def _read_once() -> None:
    from torch.onnx._internal.exporter._registration import ONNXRegistry  # takes a second, which most processes of one test do not need

    ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))  # type: ignore[method-assign]


@functools.wraps(_export)
def _with_one_table(*arguments: Any, **options: Any) -> Any:
    _read_once()
    return _export(*arguments, **options)


def install() -> None:
    torch.onnx.export = _with_one_table

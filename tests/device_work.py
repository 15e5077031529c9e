"""Counts the launches of PyTorch's operators and of kdx's kernels, and the waits for results, that a computation would need on a GPU.

The computation runs on the CPU. kdx's kernels are counted but do not run, so the results are NaN. An operator counts as one launch
if it computes or copies; views, and the memory of new tensors, do not count. Operators that read a result (`item`, `nonzero`, ...) make
the processor wait. On a GPU, an operator may launch more than one kernel. Copies between devices are not counted, because there is only one
device.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests import host
from tests.host import HostLauncher

_ROOT = Path(__file__).parents[1]
_SOURCES = (str(_ROOT / "kdx"), str(_ROOT / "kernels"))

_MEMORY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "lift_fresh", "set_", "_unsafe_view"}
"""Operators without work on the device, besides views."""

_SILENT = {"promote_types", "_local_scalar_dense", "item", "is_nonzero"}
"""Operators that launch no work themselves."""

_WAITS = {"_local_scalar_dense", "item", "nonzero", "_unique2", "unique_dim", "unique_consecutive", "masked_select", "equal", "is_nonzero"}
"""Operators whose result, or the size of whose result, the processor reads."""


@dataclass
class Work:
    """launches, waits: the number of each by (file:line, operator)."""

    launches: Counter[tuple[str, str]] = field(default_factory=Counter)
    waits: Counter[tuple[str, str]] = field(default_factory=Counter)

    def by_line(self) -> str:
        """The launches and the waits, one line each, the most frequent first."""
        rows = [
            f"{count:4d} {kind:6s} {place} {name}"
            for kind, counts in (("wait", self.waits), ("launch", self.launches))
            for (place, name), count in sorted(counts.items())
        ]
        return "\n".join(rows)


class _Counter(TorchDispatchMode):
    def __init__(self, work: Work) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.work = work

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        key = _place(), name
        if name in _WAITS or (name in ("index", "index_put_", "index_put") and _has_mask(args[1])):
            self.work.waits[key] += 1
        if name not in _MEMORY | _SILENT and not _is_view(func):
            self.work.launches[key] += 1
        return func(*args, **(kwargs or {}))


class _CountingLauncher(HostLauncher):
    def __init__(self, work: Work) -> None:
        super().__init__()
        self._work = work

    def launch(self, source: str, kernel: str, *rest: Any, **options: Any) -> None:
        self._work.launches[_place(), kernel] += 1


@contextmanager
def counted() -> Iterator[Work]:
    """Count the work of a block, in which kdx calls its kernels for CPU tensors."""
    work = Work()
    with host.running(_CountingLauncher(work)), _Counter(work), pytest.MonkeyPatch.context() as patch:
        for name in ("tolist", "numpy", "cpu"):  # the counter does not see these
            patch.setattr(Tensor, name, _reading(work, name, getattr(Tensor, name)))
        yield work


def _reading(work: Work, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def read(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        work.waits[_place(), name] += 1
        return method(tensor, *arguments, **options)

    return read


def _is_view(func: Any) -> bool:
    """Whether an operator's results are views of its arguments."""
    returns = func._schema.returns
    return bool(returns) and all(value.alias_info is not None and not value.alias_info.is_write for value in returns)


def _has_mask(indices: Sequence[Tensor | None]) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _place() -> str:
    """The line of kdx that is being executed: the innermost one."""
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_SOURCES):
            return f"{Path(file).relative_to(_ROOT)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "?"

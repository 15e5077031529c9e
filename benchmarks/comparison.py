"""A comparison: the variants that compute one result, and the least work that the result needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from kdx.errors import KdxError

Run = Callable[[], Any]
Variant = Callable[[ExitStack], Run]
"""Prepares a run, which is timed. Resources that the run needs are closed with the stack."""


class Unavailable(Exception):
    """This variant cannot run here. The message is the reason."""


@dataclass(frozen=True)
class Work:
    """The least operations and bytes that a result needs.

    operations: multiplications and additions, each counted as one. bytes: those of weights, features and images, each counted once.
    """

    operations: float
    bytes: float


@dataclass(frozen=True)
class Comparison:
    """Variants by name, in the order of the table.

    check: takes what each variant returned, by name, and returns differences and other figures by name. It raises SystemExit if the
    variants disagree. work: counts the least work. It is a function because counting may run a network.
    """

    variants: Mapping[str, Variant]
    check: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda _: {}
    work: Callable[[], Work] | None = None

    def open(self, name: str, resources: ExitStack) -> tuple[Run | None, str]:
        """A variant that is ready to be timed, or None and the reason why it cannot run here."""
        try:
            return self.variants[name](resources), ""
        except Unavailable as error:
            return None, str(error)
        except KdxError as error:
            return None, error.problem


def gram_work(n: int, d: int, *, matrices: int = 2, batch: int | None = None, itemsize: int = 4) -> Work:
    """The work of the Gram products of ``matrices`` matrices [n, d]: of each whole matrix, or of its batches of ``batch`` rows.

    A Gram product is symmetric, so only half of its 2 n n d operations count. Each matrix is read once.
    """
    return Work(float(matrices * n * (batch or n) * d), float(matrices * itemsize * n * d))


def require_agreement(differences: Mapping[str, float], tolerance: float) -> None:
    """Raise SystemExit with the name of each difference that is not below ``tolerance``. NaN is not below it."""
    beyond = [f"{name} by {value:.1e}" for name, value in differences.items() if not value < tolerance]
    if beyond:
        raise SystemExit(f"The variants do not agree within {tolerance:g}: {', '.join(beyond)}.")


def free_bytes() -> float:
    """Memory that a process can still allocate. Infinite if the system does not report it."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return inf
    entries = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return 1024 * int(entries["MemAvailable"].split()[0])


def require_memory(needed: float, content: str) -> None:
    """Raise Unavailable if ``needed`` bytes are more than the free memory."""
    free = free_bytes()
    if needed > free:
        raise Unavailable(f"{content}: {needed / 2**30:.0f} GiB, and {free / 2**30:.0f} GiB are free")


def require_difference_tensors(n: int, d: int, *, tensors: float = 5, itemsize: int = 4, activations: float = 0) -> None:
    """Raise Unavailable if n x n x d differences do not fit into the free memory.

    tensors: how many of them exist at once; `benchmarks.eager.published` makes five. activations: bytes that the forward passes keep.
    """
    content = f"{tensors:g} tensors of {n} x {n} x {d:,} differences{', and the activations of both passes' if activations else ''}"
    require_memory(tensors * itemsize * n * n * d + activations, content)

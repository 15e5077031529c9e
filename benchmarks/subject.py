"""What a case times: several ways to one result, opened one by one, and the work that none of them can do without."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from kdx.errors import KdxError

Run = Callable[[], Any]
Way = Callable[[ExitStack], Run]
"""Makes ready what is timed; what it holds is closed with the stack."""


class Unavailable(Exception):
    """This way cannot run here, for the reason that is its message."""


@dataclass(frozen=True)
class Work:
    """Operations and bytes that a result needs, however it comes about: multiplications and additions both count; bytes are those of
    weights, features and images, once each."""

    operations: float
    bytes: float


@dataclass(frozen=True)
class Subject:
    """ways: by name, in the order of the table. check: what a run of each returned -> differences and other figures by name;
    SystemExit where the ways do not agree. work: counted when it is asked for, since counting may run a network."""

    ways: Mapping[str, Way]
    check: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda _: {}
    work: Callable[[], Work] | None = None

    def opened(self, name: str, held: ExitStack) -> Run:
        """One way, ready to be timed. Unavailable where it cannot run here."""
        try:
            return self.ways[name](held)
        except KdxError as error:
            raise Unavailable(error.problem) from error


def demand_agreement(differences: Mapping[str, float], within: float) -> None:
    """SystemExit that names every difference that is not below ``within``; one that is not a number is not."""
    beyond = [f"{name} by {value:.1e}" for name, value in differences.items() if not value < within]
    if beyond:
        raise SystemExit(f"The ways do not agree within {within:g}: {', '.join(beyond)}.")


def free_bytes() -> float:
    """Memory that a process could still take; infinite where the system does not say."""
    told = Path("/proc/meminfo")
    if not told.exists():
        return inf
    known = dict(line.split(":") for line in told.read_text().splitlines())
    return 1024 * int(known["MemAvailable"].split()[0])


def demand_differences(n: int, d: int, kept: float = 0) -> None:
    """`demand_memory` of the published path: five tensors n x n x d, and the bytes that its two forward passes keep."""
    what = f"five tensors of {n} x {n} x {d:,} differences{', and what both passes keep' if kept else ''}"
    demand_memory(5 * 4.0 * n * n * d + kept, what)


def demand_memory(needed: float, what: str) -> None:
    """Unavailable where ``needed`` bytes are more than is free."""
    free = free_bytes()
    if needed > free:
        raise Unavailable(f"{what}: {needed / 2**30:.0f} GiB, and {free / 2**30:.0f} GiB are free")

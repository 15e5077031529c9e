"""The one error that kdx raises for what a user can mend."""

from __future__ import annotations


class KdxError(Exception):
    """A mistake in what a user gave, or a limit of the machine: what is wrong, and how to mend it.

    Both are one sentence. The command line prints them without a traceback and exits with status 2;
    a programmer's mistake (a wrong type, a wrong keyword) stays ``TypeError`` or ``ValueError``.
    """

    def __init__(self, problem: str, mend: str) -> None:
        super().__init__(problem, mend)
        self.problem = problem
        self.mend = mend

    def __str__(self) -> str:
        return f"{self.problem}\n{self.mend}"


def missing_package(package: str, extra: str, purpose: str) -> KdxError:
    """The error for an optional package that is not installed, naming the extra that brings it."""
    return KdxError(f"{purpose} needs the package {package}, which is not installed.", f"Install it with: pip install 'kdx[{extra}]'")


def first_line(error: BaseException) -> str:
    """What another library's exception says in its first line, to stand in a sentence of ours."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__

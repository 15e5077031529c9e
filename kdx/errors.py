"""The one error that kdx raises for what a user can fix."""

from __future__ import annotations

import warnings


class KdxError(Exception):
    """A mistake in what a user gave, or a limit of the machine: what is wrong, and how to fix it.

    Both are one sentence. The command line prints them without a traceback and exits with status 2;
    a programmer's mistake (a wrong type, a wrong keyword) stays ``TypeError`` or ``ValueError``.
    """

    def __init__(self, problem: str, hint: str) -> None:
        super().__init__(problem, hint)
        self.problem = problem
        self.hint = hint

    @property
    def mend(self) -> str:
        """The old name of ``hint``."""
        warnings.warn("KdxError.mend is now KdxError.hint", DeprecationWarning, stacklevel=2)
        return self.hint

    def __str__(self) -> str:
        return f"{self.problem}\n{self.hint}"


def missing_package(package: str, extra: str, purpose: str) -> KdxError:
    """The error for an optional package that is not installed, naming the extra that brings it."""
    return KdxError(f"{purpose} needs the package {package}, which is not installed.", f"Install it with: pip install 'kdx[{extra}]'")


def first_line(error: BaseException) -> str:
    """What another library's exception says in its first line, to stand in a sentence of ours."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__

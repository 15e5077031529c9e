"""The one error that kdx raises for what a user can fix."""

from __future__ import annotations

import warnings


class KdxError(Exception):
    """A mistake in a user's input, or a limit of the machine.

    problem: what is wrong. hint: how to fix it. Each is one sentence. The command line prints them without a traceback and exits
    with status 2. A programmer's mistake (a wrong type, a wrong keyword) stays ``TypeError`` or ``ValueError``.
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
    """The error for an optional package that is not installed. It names the extra that installs it."""
    return KdxError(f"{purpose} needs the package {package}, which is not installed.", f"Install it with: pip install 'kdx[{extra}]'")


def first_line(error: BaseException) -> str:
    """The first line of another library's message, without its full stop, to quote in an error."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__

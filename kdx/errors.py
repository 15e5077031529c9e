"""The one error that kdx raises for what a user can fix."""

from __future__ import annotations

import difflib
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from itertools import islice
from typing import Any

_TERMINAL_ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[ -/]*[0-~])")
"""Commands to a terminal (ECMA-48): colours, moves of the cursor, window titles, changes of the character set."""

_DIRECTION = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that change the direction in which the text after them is shown."""


def printable(text: str) -> str:
    """``text`` without anything that a terminal or a page obeys instead of showing it. Everything else stays as it is.

    Terminal escapes are removed. Other control characters except line feeds and tabs, line and paragraph separators, lone surrogates and
    changes of the direction of writing become backslash escapes.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_shown(character) for character in _TERMINAL_ESCAPE.sub("", text))


def _shown(character: str) -> str:
    unsafe = unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in _DIRECTION
    return character.encode("unicode_escape").decode() if unsafe and character not in "\n\t" else character


class KdxError(Exception):
    """A mistake in a user's input, or a limit of the machine.

    problem: what is wrong. hint: how to fix it. Each is one sentence. The command line prints them without a traceback and exits
    with status 2. Both are `printable`, whatever file names or messages of other libraries they quote. A programmer's mistake (a wrong
    type, a wrong keyword) stays ``TypeError`` or ``ValueError``.
    """

    def __init__(self, problem: str, hint: str) -> None:
        self.problem = printable(problem)
        self.hint = printable(hint)
        super().__init__(self.problem, self.hint)

    @property
    def mend(self) -> str:
        """The old name of ``hint``."""
        warnings.warn("KdxError.mend is now KdxError.hint", DeprecationWarning, stacklevel=2)
        return self.hint

    def __str__(self) -> str:
        return f"{self.problem}\n{self.hint}"


def import_optional(package: str, extra: str, purpose: str) -> Any:
    """The imported optional package. Raises KdxError if it is missing, or if it is installed and its import fails, whatever that raises:
    a torchvision of another PyTorch raises RuntimeError."""
    try:
        return import_module(package)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == package.partition(".")[0]:
            raise missing_package(package.partition(".")[0], extra, purpose) from error
        raise KdxError(
            f"{purpose} needs the package {package}, whose import fails: {first_line(error)}.",
            "Install the versions of it, and of torchvision, that belong to this PyTorch.",
        ) from error


def near_names(name: str, names: Iterable[str], others: Iterable[str]) -> str:
    """Up to four of ``names`` that are spelled almost like ``name``; without any, six of ``others``."""
    return ", ".join(difflib.get_close_matches(name, list(names), n=4, cutoff=0.5) or islice(others, 6))


def missing_package(package: str, extra: str, purpose: str) -> KdxError:
    """The error for an optional package that is not installed. It names the extra that installs it."""
    return KdxError(f"{purpose} needs the package {package}, which is not installed.", f"Install it with: pip install 'kdx[{extra}]'")


def first_line(error: BaseException) -> str:
    """The first line of another library's message, `printable` and without its full stop, to quote in an error."""
    lines = printable(str(error)).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def about_file(error: OSError) -> KdxError:
    """The KdxError for an OSError about a file, which may have vanished with its disk."""
    return KdxError(
        f"{error.filename} cannot be used: {error.strerror or first_line(error)}.",
        "Check the folder and its disk, and run the same command again.",
    )


class Stopped(KeyboardInterrupt):
    """Ctrl-C after a part of the work was stored: the same command resumes it."""


@contextmanager
def about(name: str) -> Iterator[None]:
    """Put the name of a thing, such as a network, before the problem of a KdxError that the block raises."""
    try:
        yield
    except KdxError as error:
        error.problem = f"{name[:1].upper()}{name[1:]}: {error.problem}"
        raise


@contextmanager
def resumable(has_progress: Callable[[], bool]) -> Iterator[None]:
    """Turn Ctrl-C in the block into `Stopped` if there is something to resume."""
    try:
        yield
    except KeyboardInterrupt:
        if has_progress():
            raise Stopped from None
        raise

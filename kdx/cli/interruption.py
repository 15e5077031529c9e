"""Ctrl-C and SIGTERM: one line and exit status 130, also if they come twice."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_GRACE = 3.0
"""Seconds after the first signal in which others are ignored, so that they do not interrupt what it has set in motion."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside the block, SIGTERM, which cluster schedulers send, raises KeyboardInterrupt as Ctrl-C does.

    Further signals within three seconds are ignored. Only the main thread may set handlers; in others nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    first: list[float] = []

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        if first and time.monotonic() - first[0] < _GRACE:
            return
        first[:] = [time.monotonic()]
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if before[signal.SIGINT] is signal.SIG_IGN:  # a shell that starts a job in the background ignores Ctrl-C for it
        del before[signal.SIGINT]
    for number in before:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is interrupt:  # and not after `ignore`
                signal.signal(number, signal.SIG_DFL if handler is None else handler)


def ignore() -> None:
    """Ignore both signals until the process ends, which is about to."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

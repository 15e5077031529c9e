"""Ctrl-C and SIGTERM: one line and exit status 130, also if they come twice. Nothing here imports a large package."""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from kdx.errors import Stopped

_GRACE = 3.0
"""Seconds after the first signal in which others are ignored, so that they do not interrupt what it has set in motion."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside the block, SIGTERM, which cluster schedulers send, raises KeyboardInterrupt as Ctrl-C does.

    Further signals within three seconds are ignored, and all signals while the process ends. Only the main thread may set handlers; in
    others nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    first: list[tuple[float, int]] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        if first and time.monotonic() - first[0][0] < _GRACE:
            return
        while frame is not None:
            if frame.f_code is interrupt_again.__code__:  # Python ignores an exception here too
                send_soon(number)
                return
            frame = frame.f_back
        first[:] = [(time.monotonic(), number)]
        raise KeyboardInterrupt

    def send(number: int) -> None:
        if signal.getsignal(number) is not interrupt:  # the block has ended
            return
        if sys.platform == "win32":
            signal.raise_signal(number)
        else:
            signal.pthread_kill(threading.main_thread().ident or 0, number)  # ends a wait of the main thread, unlike raise_signal

    def send_soon(number: int) -> None:
        timer = threading.Timer(0.01, send, [number])
        timer.daemon = True
        timer.start()

    def interrupt_again(lost: sys.UnraisableHookArgs) -> None:
        """Python only prints an exception in a callback, for example of a weak reference during an import, and continues."""
        if first and lost.exc_type is KeyboardInterrupt:
            send_soon(first.pop()[1])
        else:
            hook(lost)

    hook, sys.unraisablehook = sys.unraisablehook, interrupt_again
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if before[signal.SIGINT] is signal.SIG_IGN:  # a shell that starts a job in the background ignores Ctrl-C for it
        del before[signal.SIGINT]
    for number in before:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        atexit.register(_ignore)  # a command that is complete has nothing to interrupt
        for number, handler in before.items():
            if signal.getsignal(number) is interrupt:  # and not after `_ignore`
                signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextmanager
def ended_with_one_line() -> Iterator[None]:
    """If KeyboardInterrupt leaves the block, print a line, which promises no more than the work keeps, and exit with status 130."""
    try:
        yield
    except KeyboardInterrupt as error:
        if is_first_process():
            with suppress(OSError):  # the terminal may be gone, or the program that reads the pipe
                # Without Rich, whose import may be what was interrupted.
                print("Stopped. Run the same command again to resume." if isinstance(error, Stopped) else "Stopped.", file=sys.stderr)
        _ignore()
        exec("")  # Ctrl-C in another exec, as in many imports, would end python -m by the signal and not with 130
        gc.freeze()  # Python would look for garbage in all imported packages, which takes a second or more
        sys.exit(130)


def is_first_process() -> bool:
    """Whether this is the only process of a command, or the first of those that ``accelerate launch`` or ``torchrun`` started."""
    return os.environ.get("RANK", "0") == "0"


def _ignore() -> None:
    """Ignore both signals until the process ends, which is about to."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

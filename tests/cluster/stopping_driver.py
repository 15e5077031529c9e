"""The command kdx in a process that stops itself, as by SIGSTOP, as soon as it has stored the first batch of a run."""

from __future__ import annotations

import functools
import os
import signal
from typing import Any

from kdx.cli import main
from kdx.runs.store import Store

_write = Store.write_batch


@functools.cache
def _stop_once() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _write_and_stop(*arguments: Any) -> None:
    _write(*arguments)
    _stop_once()


if __name__ == "__main__":
    Store.write_batch = _write_and_stop  # type: ignore[method-assign,assignment]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # kdx ignores Ctrl-C if the shell that started the tests ignores it
    main()

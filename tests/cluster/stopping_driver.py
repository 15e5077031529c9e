"""The command kdx in a process that stops itself, as by SIGSTOP, as soon as it has stored the first batch of a run."""

from __future__ import annotations

import os
import signal
from typing import Any

from kdx.cli import main
from kdx.runs.store import Store

_write = Store.write_batch


def write_and_stop(*arguments: Any) -> None:
    _write(*arguments)
    Store.write_batch = _write  # type: ignore[method-assign]
    os.kill(os.getpid(), signal.SIGSTOP)


if __name__ == "__main__":
    Store.write_batch = write_and_stop  # type: ignore[method-assign]
    main()

"""Processes that decode image files, for networks on a GPU.

The threads of one process share Python's interpreter lock. Pillow decodes and resizes without it, but opening a file, reading its headers
and returning the pixels need it. Every change of the lock's owner takes time, also for the thread that launches the work of the GPU. Each
process has a lock of its own.

The processes are forked, so they start immediately and already have the data set. They read and decode files and do not use CUDA.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from queue import SimpleQueue

import numpy as np
from numpy.typing import NDArray

from kdx.errors import KdxError

IMAGES = 8
"""Images per message to a process: messages are few, and the processes share a batch evenly."""

_SECONDS_TO_END = 5.0

_SIGNALS = signal.SIGINT, signal.SIGTERM

Decode = Callable[[NDArray[np.int64], NDArray[np.uint8]], list[str]]
"""decode(indices [k], levels [k, 3, H, W]) fills the levels of these images. It returns the reason for each that cannot be read, or ""."""


def available() -> bool:
    """Whether this process can fork others safely. The processes of a study cannot: they are daemons, which may have no children."""
    return sys.platform == "linux" and not multiprocessing.current_process().daemon


@contextmanager
def started(decode: Decode, size: tuple[int, int], count: int) -> Iterator[Decode]:
    """A function like ``decode`` for at most `IMAGES` images, which runs in one of ``count`` processes. As many threads may call it at a
    time.

    It raises KdxError if its process has ended, for example because memory ran out. All processes end with the block.
    """
    processes: list[_Process] = []
    idle: SimpleQueue[_Process] = SimpleQueue()

    def in_a_process(indices: NDArray[np.int64], levels: NDArray[np.uint8]) -> list[str]:
        process = idle.get()
        try:
            return process.decode(indices, levels)
        finally:
            idle.put(process)

    try:
        for _ in range(count):
            processes.append(_Process(decode, size, [process.connection for process in processes]))
            idle.put(processes[-1])
        yield in_a_process
    finally:
        for process in processes:
            process.connection.close()
        for process in processes:
            process.end()


class _Process:
    """A process with memory for the levels of `IMAGES` images, which it shares with this one. others: the connections that it must
    close."""

    def __init__(self, decode: Decode, size: tuple[int, int], others: Sequence[Connection]) -> None:
        shape = IMAGES, 3, *size
        # Anonymous memory does not need /dev/shm, which is small in containers.
        self._levels = np.frombuffer(mmap.mmap(-1, int(np.prod(shape))), np.uint8).reshape(shape)
        self.connection, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("fork")
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # until the process has its own handlers
        try:
            self._process = context.Process(
                target=_serve, args=(theirs, [*others, self.connection], decode, self._levels, before), name="kdx-decode", daemon=True
            )
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()

    def decode(self, indices: NDArray[np.int64], levels: NDArray[np.uint8]) -> list[str]:
        try:
            self.connection.send(indices)
            reasons: list[str] | KdxError = self.connection.recv()
        except (EOFError, OSError) as error:
            raise KdxError(
                "A process that decodes images has ended, perhaps because memory ran out.", "Decode with fewer processes: --workers 4."
            ) from error
        if isinstance(reasons, KdxError):
            raise reasons
        np.copyto(levels, self._levels[: len(indices)])
        return reasons

    def end(self) -> None:
        """Wait for the process, whose connection is closed, and kill it if it does not end."""
        self._process.join(_SECONDS_TO_END)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()


def _serve(connection: Connection, others: Sequence[Connection], decode: Decode, levels: NDArray[np.uint8], mask: Collection[int]) -> None:
    """Decode the requested images until the connection is closed, which also happens when the parent process is killed.

    mask: the signal mask to restore after the handlers are set.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes, and the parent ends this one
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the parent's handler, whose exception would be printed by every process
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    for other in others:  # as long as a copy of the parent's end is open, this end does not notice that the parent's is closed
        other.close()
    with suppress(EOFError, OSError):
        while True:
            indices = connection.recv()
            try:
                answer: list[str] | KdxError = decode(indices, levels[: len(indices)])
            except KdxError as error:
                answer = error
            connection.send(answer)
    os._exit(0)  # without the exit functions of libraries that the parent has started

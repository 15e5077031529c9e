"""Writes in a thread are in order, bounded in number, complete at the end, and stopped by the first failure."""

from __future__ import annotations

import sys
import threading
from functools import partial

import pytest

from kdx import threads
from kdx.runs.writer import DEPTH, writing

SECONDS = 20


def writers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("kdx-write")]


def test_writes_are_in_order_and_complete_after_the_block() -> None:
    done: list[int] = []
    with writing() as submit:
        for number in range(30):
            submit(partial(done.append, number))
    assert done == list(range(30)) and not writers()


def test_the_caller_continues_during_a_write_and_waits_when_there_are_too_many() -> None:
    release, submitted = threading.Event(), threading.Event()
    done: list[int] = []

    def slow(number: int) -> None:
        release.wait(SECONDS)
        done.append(number)

    with writing() as submit:
        for number in range(DEPTH):
            submit(partial(slow, number))
        assert not done  # the caller did not wait

        def one_more() -> None:
            submit(partial(slow, DEPTH))
            submitted.set()

        other = threading.Thread(target=one_more)
        other.start()
        assert not submitted.wait(0.05)
        release.set()
        assert submitted.wait(SECONDS)
        other.join()
    assert done == list(range(DEPTH + 1))


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_no_write_follows_one_that_failed(error: type[BaseException]) -> None:
    done: list[int] = []

    def fail() -> None:
        raise error("full")

    with pytest.raises(error, match="full"), writing() as submit:
        submit(partial(done.append, 0))
        submit(fail)
        for number in range(1, 10):
            submit(partial(done.append, number))
    assert done == [0] and not writers()


def test_writes_are_completed_when_the_caller_fails() -> None:
    done: list[int] = []
    with pytest.raises(ValueError, match="batch 2"), writing() as submit:
        submit(partial(done.append, 0))
        submit(partial(done.append, 1))
        raise ValueError("batch 2")
    assert done == [0, 1]


def test_threads_take_short_turns_in_a_block_only() -> None:
    before = sys.getswitchinterval()
    with pytest.raises(ValueError, match="stop"), threads.short_turns():
        assert sys.getswitchinterval() == pytest.approx(2e-4)
        raise ValueError("stop")
    assert sys.getswitchinterval() == before

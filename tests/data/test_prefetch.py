"""Prefetching: in order, bounded, and finished when its block ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pytest

from kdx.data.prefetch import PREFETCH_DEPTH, Job, prefetch

SECONDS = 20  # the longest wait for a thread, far more than it needs


def job(number: int, *tasks: Callable[[], None]) -> Job[int]:
    return Job(tasks, lambda: number)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("kdx-prefetch")]


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.parametrize("workers", [0, 1, 2, 5])
@pytest.mark.parametrize("depth", [1, 2, 7])
def test_results_are_in_order_and_complete_for_tasks_of_any_duration(workers: int, depth: int) -> None:
    waits = np.random.default_rng(workers).uniform(0, 0.003, (12, 4))

    def counting(number: int) -> Job[list[int]]:
        done: list[int] = []

        def task(index: int) -> None:
            time.sleep(waits[number, index])
            done.append(number * 10 + index)

        return Job([partial(task, index) for index in range(number % 5)], lambda: sorted(done))

    with prefetch((counting(number) for number in range(12)), workers, depth) as results:
        assert list(results) == [[number * 10 + index for index in range(number % 5)] for number in range(12)]


@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("depth", [1, PREFETCH_DEPTH, 5])
def test_at_most_depth_jobs_are_started_beyond_those_taken(workers: int, depth: int) -> None:
    taken = most = 0
    done: list[int] = []

    def jobs() -> Iterator[Job[int]]:
        nonlocal most
        for number in range(20):
            most = max(most, number + 1 - taken)
            yield job(number, partial(done.append, number))

    with prefetch(jobs(), workers, depth) as results:
        for result in results:
            taken += 1
            expected = min(20, taken + depth) if workers else taken  # threads continue to the limit by themselves
            wait_until(lambda expected=expected: len(done) >= expected)  # type: ignore[misc]
            assert result == taken - 1 and len(done) == expected
    # A job is drawn before the result of the previous one is yielded.
    assert most == (depth + 1 if workers else 1)


def test_the_next_jobs_are_done_while_one_is_in_use() -> None:
    started = threading.Event()
    with prefetch(iter([job(0), job(1, started.set), job(2)]), workers=1) as results:
        assert next(results) == 0
        assert started.wait(SECONDS)  # before the result of job 1 is taken
        assert list(results) == [1, 2]


def test_tasks_of_one_job_run_in_parallel() -> None:
    meeting = threading.Barrier(3)

    def meet() -> None:
        meeting.wait(SECONDS)

    with prefetch([job(0, meet, meet, meet)], workers=3) as results:
        assert list(results) == [0]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_an_error_is_raised_where_its_result_is_taken(workers: int) -> None:
    def fail() -> None:
        raise OSError("the disk was removed")

    with prefetch([job(0), job(1, fail), job(2)], workers) as results:
        assert next(results) == 0
        with pytest.raises(OSError, match="was removed"):
            next(results)
    assert not threads()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_drawing_a_job_reaches_the_caller(workers: int) -> None:
    def jobs() -> Iterator[Job[int]]:
        yield job(0)
        raise OSError("no such batch")

    with pytest.raises(OSError, match="no such batch"), prefetch(jobs(), workers) as results:
        list(results)
    assert not threads()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_leaving_early_drops_tasks_that_have_not_started_and_leaves_no_thread(error: type[BaseException]) -> None:
    started: list[int] = []
    released = threading.Event()

    def task(number: int) -> None:
        started.append(number)
        released.wait(SECONDS)

    tasks = [partial(task, number) for number in range(50)]
    with pytest.raises(error), prefetch([job(0), job(1, *tasks), job(2, *tasks)], workers=2) as results:
        assert next(results) == 0
        wait_until(lambda: len(started) == 2)
        threading.Timer(0.1, released.set).start()  # the two running tasks are waited for
        raise error
    assert not threads() and released.is_set()
    assert len(started) < 100


def test_without_workers_the_caller_runs_the_tasks() -> None:
    runners: list[threading.Thread] = []
    with prefetch([job(number, lambda: runners.append(threading.current_thread())) for number in range(3)], workers=0) as results:
        assert not runners and not threads()
        assert next(results) == 0 and runners == [threading.current_thread()]


@pytest.mark.parametrize(("workers", "depth"), [(-1, 1), (2, 0)])
def test_invalid_numbers_are_refused(workers: int, depth: int) -> None:
    with pytest.raises(ValueError, match="must be"), prefetch([], workers, depth):
        pass

"""Work ahead: in order, bounded, and gone when its block is left."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pytest

from kdx.data.prefetch import AHEAD, Job, ahead, cores

SECONDS = 20  # that a thread is waited for, far more than it needs


def job(number: int, *parts: Callable[[], None]) -> Job[int]:
    return Job(parts, lambda: number)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("kdx-prefetch")]


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.parametrize("workers", [0, 1, 2, 5])
@pytest.mark.parametrize("depth", [1, 2, 7])
def test_results_come_in_order_and_whole_whatever_a_part_takes(workers: int, depth: int) -> None:
    waits = np.random.default_rng(workers).uniform(0, 0.003, (12, 4))

    def counting(number: int) -> Job[list[int]]:
        done: list[int] = []

        def part(place: int) -> None:
            time.sleep(waits[number, place])
            done.append(number * 10 + place)

        return Job([partial(part, place) for place in range(number % 5)], lambda: sorted(done))

    with ahead((counting(number) for number in range(12)), workers, depth) as results:
        assert list(results) == [[number * 10 + place for place in range(number % 5)] for number in range(12)]


@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("depth", [1, AHEAD, 5])
def test_no_more_than_depth_jobs_are_begun_beyond_those_taken(workers: int, depth: int) -> None:
    taken = most = 0
    done: list[int] = []

    def jobs() -> Iterator[Job[int]]:
        nonlocal most
        for number in range(20):
            most = max(most, number + 1 - taken)
            yield job(number, partial(done.append, number))

    with ahead(jobs(), workers, depth) as results:
        for result in results:
            taken += 1
            expected = min(20, taken + depth) if workers else taken  # threads come as far as they may without being asked
            until(lambda expected=expected: len(done) >= expected)  # type: ignore[misc]
            assert result == taken - 1 and len(done) == expected
    # One is being taken as the next is drawn.
    assert most == (depth + 1 if workers else 1)


def test_the_next_jobs_are_done_while_one_is_in_use() -> None:
    began = threading.Event()
    with ahead(iter([job(0), job(1, began.set), job(2)]), workers=1) as results:
        assert next(results) == 0
        assert began.wait(SECONDS)  # job 1 was not asked for yet
        assert list(results) == [1, 2]


def test_parts_of_one_job_are_done_side_by_side() -> None:
    meeting = threading.Barrier(3)

    def meet() -> None:
        meeting.wait(SECONDS)

    with ahead([job(0, meet, meet, meet)], workers=3) as results:
        assert list(results) == [0]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_an_error_is_raised_where_its_result_is_asked_for(workers: int) -> None:
    def fail() -> None:
        raise OSError("a disk was pulled out")

    with ahead([job(0), job(1, fail), job(2)], workers) as results:
        assert next(results) == 0
        with pytest.raises(OSError, match="pulled out"):
            next(results)
    assert not threads()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_drawing_a_job_reaches_the_caller(workers: int) -> None:
    def jobs() -> Iterator[Job[int]]:
        yield job(0)
        raise OSError("no such batch")

    with pytest.raises(OSError, match="no such batch"), ahead(jobs(), workers) as results:
        list(results)
    assert not threads()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_leaving_early_drops_what_has_not_begun_and_leaves_no_thread(error: type[BaseException]) -> None:
    begun: list[int] = []
    released = threading.Event()

    def part(number: int) -> None:
        begun.append(number)
        released.wait(SECONDS)

    parts = [partial(part, number) for number in range(50)]
    with pytest.raises(error), ahead([job(0), job(1, *parts), job(2, *parts)], workers=2) as results:
        assert next(results) == 0
        until(lambda: len(begun) == 2)
        threading.Timer(0.1, released.set).start()  # the two that are under way are waited for
        raise error
    assert not threads() and released.is_set()
    assert len(begun) < 100


def test_without_workers_who_asks_does_the_work_then() -> None:
    who: list[threading.Thread] = []
    with ahead([job(number, lambda: who.append(threading.current_thread())) for number in range(3)], workers=0) as results:
        assert not who and not threads()
        assert next(results) == 0 and who == [threading.current_thread()]


@pytest.mark.parametrize(("workers", "depth"), [(-1, 1), (2, 0)])
def test_numbers_that_are_none(workers: int, depth: int) -> None:
    with pytest.raises(ValueError, match="must be"), ahead([], workers, depth):
        pass


def test_there_is_a_core() -> None:
    assert cores() >= 1

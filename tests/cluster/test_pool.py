"""The distribution of tasks, with workers that are objects of this process: replies in any order, and workers that end at any point."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from kdx.cluster.pool import CHUNK, DEPTH, MOST_DEATHS, Pool, WorkerEnded
from kdx.cluster.service import Facts, Surroundings, Worker
from kdx.errors import KdxError


class Squares:
    """A service that squares numbers and fails at the tasks in ``broken``."""

    def __init__(self, broken: dict[int, Exception] | None = None) -> None:
        self.facts: Facts = {"runtime": "python"}
        self._broken = broken or {}

    def results(self, tasks: Sequence[int]) -> Iterator[tuple[int, int]]:
        for task in tasks:
            if task in self._broken:
                raise self._broken[task]
            yield task, task * task

    def close(self) -> None: ...


class Here:
    """A worker in this process. Its calls run when their replies are read, in order."""

    def __init__(self, crew: Crew) -> None:
        self.crew = crew
        self.stopped = self.closed = False
        self.results: Iterator[Any] = iter(())
        self.taken: list[int] = []

    def prepare(self) -> Any:
        return self.crew.reply(self, None)

    def step(self, tasks: Sequence[int]) -> Any:
        self.taken += tasks
        return self.crew.reply(self, list(tasks))

    def close(self) -> Any:
        self.closed = True

    def stop(self) -> None:
        self.stopped = True


class Crew:
    """Workers of this process whose replies arrive in a random order. ends(worker, call): whether the worker ends at this call.

    slow: workers whose results arrive only when nothing else does.
    """

    def __init__(self, count: int, service: Squares, ends: Any = lambda place, call: False, slow: frozenset[int] = frozenset()) -> None:
        self.count = count
        self.members: list[Here] = []
        self.most = 0
        self._random = random.Random(0)
        self._service, self._ends, self._slow = service, ends, slow
        self._calls: deque[tuple[Any, Here, list[int] | None]] = deque()
        self._dead: set[int] = set()

    def start(self) -> Here:
        self.members.append(Here(self))
        return self.members[-1]

    def reply(self, member: Here, tasks: list[int] | None) -> Any:
        token = object()
        self._calls.append((token, member, tasks))
        return token

    def wait(self, replies: Sequence[Any]) -> list[Any]:
        slow = {token for token, member, tasks in self._calls if tasks is not None and self.members.index(member) in self._slow}
        fast = [reply for reply in replies if reply not in slow]
        return self._random.sample(fast or list(replies), 1)

    def result(self, reply: Any) -> Any:
        place = next(place for place, call in enumerate(self._calls) if call[0] is reply)
        waiting = [call for call in self._calls if call[2] is not None]
        self.most = max(self.most, len(waiting))
        _, member, tasks = self._calls[place]
        del self._calls[place]
        number = self.members.index(member)
        if number in self._dead or self._ends(number, tasks):
            self._dead.add(number)
            raise WorkerEnded("killed")
        if tasks is None:
            return {"host": "here", "same": {}}
        if tasks:
            member.results = self._service.results(tasks)
        return next(member.results)

    def close(self, members: Sequence[Any]) -> None:
        for member in members:
            member.close()


def squares(crew: Crew, count: int, **settings: Any) -> dict[int, int]:
    results = list(Pool(crew, "task {}".format, **settings).results(range(count)))
    assert len(results) == count, "a task was computed for the caller twice"
    return dict(results)


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 7, 60])
def test_every_task_is_computed_once(workers: int, count: int) -> None:
    crew = Crew(workers, Squares())
    assert squares(crew, count) == {task: task * task for task in range(count)}
    assert all(member.stopped for member in crew.members)
    assert len(crew.members) == min(workers, count)
    assert crew.most <= DEPTH * workers


@pytest.mark.parametrize("seed", range(5))
def test_tasks_of_workers_that_end_are_computed_by_others(seed: int) -> None:
    chance = random.Random(seed)
    ended: list[int] = []

    def ends(place: int, _: Any) -> bool:
        if chance.random() < 0.08:
            ended.append(place)
            return True
        return False

    crew = Crew(3, Squares(), ends)
    assert squares(crew, 60) == {task: task * task for task in range(60)}
    assert ended and len(crew.members) == 3 + len(ended)
    assert all(member.stopped for member in crew.members)


def test_three_ends_at_one_task_stop_the_work_and_name_it() -> None:
    crew = Crew(2, Squares({5: WorkerEnded("memory ran out")}))
    with pytest.raises(KdxError, match=r"3 workers ended at task 5: memory ran out") as error:
        squares(crew, 20)
    assert "--chunk" in error.value.hint
    assert all(member.stopped for member in crew.members)


def test_workers_that_never_get_ready_stop_the_work() -> None:
    crew = Crew(2, Squares(), lambda place, tasks: tasks is None)
    with pytest.raises(KdxError, match="before they were ready"):
        squares(crew, 20)
    assert len(crew.members) == 2 + MOST_DEATHS - 1


def test_an_error_of_a_worker_is_raised_as_it_is() -> None:
    problem = KdxError("An image is odd.", "Remove it.")
    crew = Crew(2, Squares({3: problem}))
    with pytest.raises(KdxError) as error:
        squares(crew, 20)
    assert error.value is problem
    assert all(member.stopped for member in crew.members)


def test_a_slow_worker_holds_up_no_other() -> None:
    """The first worker is slow once it has tasks. All others are computed before them."""
    crew = Crew(3, Squares(), slow=frozenset({0}))
    order = [task for task, _ in Pool(crew, str).results(range(40))]
    taken = crew.members[0].taken
    assert 1 <= len(taken) <= CHUNK
    assert order[-len(taken) :] == taken and sorted(order) == list(range(40))


def test_closing_the_results_stops_the_workers() -> None:
    crew = Crew(2, Squares())
    results = Pool(crew, str).results(range(20))
    next(results)
    results.close()
    assert all(member.stopped for member in crew.members)
    assert not any(member.closed for member in crew.members)


def test_each_worker_is_reported_and_may_be_refused() -> None:
    seen: list[Facts] = []
    squares(Crew(2, Squares()), 20, on_ready=seen.append)
    assert seen and all(facts["host"] == "here" for facts in seen)

    def refuse(facts: Facts) -> None:
        raise KdxError("It differs.", "Install the same.")

    with pytest.raises(KdxError, match="It differs"):
        squares(Crew(2, Squares()), 20, on_ready=refuse)


def test_a_worker_returns_one_result_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    monkeypatch.setattr(Surroundings, "enter", lambda self: None)
    worker = Worker(pickle.dumps(Squares), Surroundings.here(1))
    assert worker.prepare()["same"]["runtime"] == "python"
    assert [worker.step([3, 4]), worker.step([]), worker.step([5])] == [(3, 9), (4, 16), (5, 25)]

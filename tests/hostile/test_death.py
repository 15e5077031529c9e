"""A process that dies at any call that changes the disk loses nothing: the same command completes with the same files.

The tests visit some of the calls; KDX_EVERY_CALL=1 in the environment visits all of them.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import pytest

from tests.hostile.cases import COMMANDS, Subject, contents, differences
from tests.hostile.forked import Fault

pytestmark = pytest.mark.slow

CALLS = {"explain, batch": 6, "explain, reference": 2, "explain, whole": 4, "distill": 5, "study": 1, "export": 1}
"""The number of calls of each command that a test visits."""


def points(count: int, visited: int) -> list[int]:
    """Numbers from 1 to ``count``: ``visited`` of them at random, or all with KDX_EVERY_CALL."""
    every = os.environ.get("KDX_EVERY_CALL") == "1"
    return list(range(1, count + 1)) if every else sorted(random.Random(count).sample(range(1, count + 1), min(visited, count)))


@pytest.mark.parametrize("case", COMMANDS)
def test_death_at_a_call(subject: Callable[[str], Subject], case: str) -> None:
    """The process dies before the call, which is after the previous one, and in the middle of a write."""
    run = subject(case)
    ending = run.run()
    assert ending.status == 0, ending.output
    expected, problems = contents(run.folder / "run"), []
    for fault, count in ((Fault.DEATH, ending.calls), (Fault.DEATH_IN_WRITE, ending.writes)):
        for point in points(count, CALLS[case]):
            run.clear()
            assert run.run(fault, point).status == -9
            again = run.run()
            different = differences(contents(run.folder / "run"), expected)
            if again.status or different:
                problems.append((fault.name, point, again.status, again.output[-1000:], different))
    assert not problems


@pytest.mark.parametrize("case", ["explain, batch", "explain, whole", "distill"])
def test_death_again_and_again(subject: Callable[[str], Subject], case: str) -> None:
    """A command whose process dies again and again makes progress each time, until it is complete."""
    run = subject(case)
    calls = run.run().calls
    expected = contents(run.folder / "run")
    run.clear()
    steps, deaths = random.Random(0), 0
    while run.run(Fault.DEATH, steps.randrange(calls // 3, calls)).status == -9:
        deaths += 1
        assert deaths < 20
    assert deaths > 0 and differences(contents(run.folder / "run"), expected) == []


@pytest.mark.exhaustive
def test_a_kill_at_any_moment(subject: Callable[[str], Subject]) -> None:
    """`kill -9` at 100 random moments; after each, the same command resumes, and every fifth run starts in an empty folder."""
    run = subject("explain, batch")
    expected = run.complete()
    run.clear()
    seconds = run.run().seconds
    moments, kills = random.Random(0), 0
    for number in range(100):
        if number % 5 == 0:
            run.clear()
        ending = run.run(kill_after=moments.uniform(0.02, 0.8) * seconds)
        kills += ending.status == -9
        assert ending.status in (0, -9), ending.output
        if number % 5 == 4:
            assert differences(run.complete(), expected) == []
    assert kills >= 20  # a busy machine may finish earlier runs before their moment

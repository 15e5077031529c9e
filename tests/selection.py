"""Which tests need a GPU, and which tests `make check` leaves out: those that tests/medium.txt names get the marker medium.

The file names test functions and their files without folders, so a test file may move. ``make test ARGS=--record-medium`` measures every
test and writes the file again: what remains takes FAST_SECONDS of processor time at most.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch

MEDIUM = Path(__file__).with_name("medium.txt")
FAST_SECONDS = 45.0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-medium", action="store_true", help="measure the tests and write tests/medium.txt")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    medium = set(MEDIUM.read_text("utf-8").split())
    for item in items:
        if function_name(item) in medium:
            item.add_marker(pytest.mark.medium)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--record-medium"):
        config.pluginmanager.register(Measurement())


def function_name(item: pytest.Item) -> str:
    """The file and the function of a test, without its parameters and without its folder."""
    return f"{item.path.name}::{getattr(item, 'originalname', None) or item.name}"


def medium_functions(tests: dict[str, float], fixtures: dict[str, set[tuple[str, float]]], limit: float = FAST_SECONDS) -> list[str]:
    """The functions to leave out, so that the others and the fixtures that they share take ``limit`` seconds at most.

    tests: seconds of each function over all its parameters. fixtures: for each function the shared fixtures that it uses, with
    the seconds of each. The functions that take longest with their fixtures are left out first.
    """
    total, kept, made = 0.0, set(), set[tuple[str, float]]()
    for name in sorted(tests, key=lambda name: (tests[name] + sum(seconds for _, seconds in fixtures.get(name, ())), name)):
        added = fixtures.get(name, set()) - made
        total += tests[name] + sum(seconds for _, seconds in added)
        if total > limit:
            break
        kept.add(name)
        made |= added
    return sorted(tests.keys() - kept)


class Measurement:
    """Measures tests, and fixtures that several tests share, in this process or in pytest-xdist's workers."""

    def __init__(self) -> None:
        self._fixtures: dict[str, float] = {}
        self._tests: dict[str, float] = defaultdict(float)
        self._used: dict[str, set[tuple[str, float]]] = defaultdict(set)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Generator[None, object, object]:
        start = time.perf_counter()
        result = yield
        if fixturedef.scope != "function":
            self._fixtures[f"{fixturedef.baseid}::{fixturedef.argname}"] = time.perf_counter() - start
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        shared = [name for name in self._fixtures if name.rsplit("::", 1)[1] in getattr(item, "fixturenames", ())]
        shared = [name for name in shared if item.nodeid.startswith(name.rsplit("::", 1)[0])]
        item.user_properties.append(("shared", {name: self._fixtures[name] for name in shared}))
        item.user_properties.append(("function", function_name(item)))
        return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        properties = dict(report.user_properties)
        if report.when == "call" and "function" in properties:
            self._tests[str(properties["function"])] += report.duration
            self._used[str(properties["function"])] |= set(dict(properties["shared"]).items())  # type: ignore[call-overload]

    def pytest_sessionfinish(self) -> None:
        if "PYTEST_XDIST_WORKER" not in os.environ and self._tests:
            MEDIUM.write_text("\n".join(medium_functions(self._tests, self._used)) + "\n", "utf-8")

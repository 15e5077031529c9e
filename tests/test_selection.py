"""The choice of the tests for `make check`."""

from __future__ import annotations

from tests.selection import MEDIUM, medium_functions


def test_the_longest_functions_are_left_out_first() -> None:
    tests = {"a": 1.0, "b": 2.0, "c": 5.0, "d": 0.5}
    assert medium_functions(tests, {}, limit=4.0) == ["c"]
    assert medium_functions(tests, {}, limit=3.0) == ["b", "c"]
    assert medium_functions(tests, {}, limit=100.0) == []


def test_a_shared_fixture_counts_once_and_with_every_user() -> None:
    tests = {"a": 0.1, "b": 0.1, "c": 1.0}
    fixtures = {name: {("file::network", 3.0)} for name in "ab"}
    assert medium_functions(tests, fixtures, limit=2.0) == ["a", "b"]
    assert medium_functions(tests, fixtures, limit=4.3) == []


def test_the_list_is_sorted_and_has_names_of_tests() -> None:
    names = MEDIUM.read_text("utf-8").split()
    assert names == sorted(set(names))
    assert all(name.startswith("test_") for name in names)

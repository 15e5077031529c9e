"""The names of numbered images are those of a tuple of strings."""

from __future__ import annotations

import sys

import pytest

from kdx.data.numbered_names import NumberedNames

COUNTS = [("train", 3), ("validation", 0), ("test", 1_000_001)]


def test_the_names_are_those_of_a_tuple() -> None:
    names = NumberedNames([*COUNTS[:2], ("test", 12)], digits=4)
    expected = (*(f"train/{row:04d}" for row in range(3)), *(f"test/{row:04d}" for row in range(12)))
    assert tuple(names) == expected and len(names) == 15
    assert [names[place] for place in range(-15, 15)] == [expected[place] for place in range(-15, 15)]
    assert names[2:9:3] == expected[2:9:3] and names == expected and expected == names and names != expected[1:]
    assert names == NumberedNames([*COUNTS[:2], ("test", 12)], digits=4) and names != [*expected[:-1], "test/0012"]
    assert [names.place(index) for index in (0, 2, 3, 14)] == [(0, 0), (0, 2), (2, 0), (2, 11)]
    assert "test/0011" in names and "test/0012" not in names
    for place in (15, -16):
        with pytest.raises(IndexError, match="among 15"):
            names[place]


def test_a_million_names_take_no_memory() -> None:
    names = NumberedNames(COUNTS)
    assert names[-1] == "test/1000000" and len(names) == 1_000_004
    assert sum(sys.getsizeof(value) for value in vars(names).values()) < 500

"""The names of numbered images, made only when they are needed, because a million strings would take 70 MB."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import overload


class NumberedNames(Sequence[str]):
    """The names ``PART/000000``, ``PART/000001`` ... of the images of each part, one part after the other.

    counts: (part, number of its images) per part. digits: the least number of digits.
    """

    def __init__(self, counts: Sequence[tuple[str, int]], digits: int = 6) -> None:
        self._counts, self._digits = tuple(counts), digits
        self._starts = (0, *accumulate(count for _, count in self._counts))

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        if isinstance(index, slice):
            return tuple(self[place] for place in range(*index.indices(len(self))))
        place = int(index) + (len(self) if index < 0 else 0)
        if not 0 <= place < len(self):
            raise IndexError(f"no image {index} among {len(self)}")
        part, row = self.place(place)
        return self._name(self._counts[part][0], row)

    def __iter__(self) -> Iterator[str]:
        return (self._name(part, row) for part, count in self._counts for row in range(count))

    def place(self, index: int) -> tuple[int, int]:
        """The number of the part of image ``index``, and its row in that part."""
        part = bisect_right(self._starts, index) - 1
        return part, index - self._starts[part]

    def _name(self, part: str, row: int) -> str:
        return f"{part}/{row:0{self._digits}d}"

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Sequence) and not isinstance(other, str):
            return len(self) == len(other) and all(own == name for own, name in zip(self, other, strict=True))
        return NotImplemented

    def __hash__(self) -> int:
        return hash((self._counts, self._digits))

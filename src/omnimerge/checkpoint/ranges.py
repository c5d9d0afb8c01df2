"""Which bytes of a file are written: disjoint ranges, joined where they touch."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator


class Ranges:
    """A set of integers, held as half-open ranges.

    Adding a range costs the logarithm of their number, and a shift of what comes after it; writers
    that go forward through a file keep only a few ranges open.
    """

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []

    def add(self, start: int, stop: int) -> None:
        """Add ``start <= i < stop``.

        Args:
            start: the first.
            stop: one past the last.
        """
        if start >= stop:
            return
        first = bisect_left(self._stops, start)
        last = bisect_right(self._starts, stop)
        if first < last:
            start = min(start, self._starts[first])
            stop = max(stop, self._stops[last - 1])
        self._starts[first:last] = [start]
        self._stops[first:last] = [stop]

    def covers(self, start: int, stop: int) -> bool:
        """Tell whether all of ``start <= i < stop`` are in.

        Args:
            start: the first.
            stop: one past the last.

        Returns:
            True for an empty range too.
        """
        if start >= stop:
            return True
        number = bisect_right(self._starts, start) - 1
        return number >= 0 and self._stops[number] >= stop

    def stop_after(self, start: int) -> int:
        """Return where the range that holds `start` ends.

        Args:
            start: an integer.

        Returns:
            One past the last; `start` itself if it is not in.
        """
        number = bisect_right(self._starts, start) - 1
        return max(start, self._stops[number]) if number >= 0 else start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(zip(self._starts, self._stops, strict=True))

    @property
    def total(self) -> int:
        """How many integers are in; as `__len__`, a list of the ranges would reserve so many."""
        return sum(self._stops) - sum(self._starts)

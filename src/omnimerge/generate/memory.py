"""What is kept between the points of a search, within a number of bytes."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CACHE_BYTES = 4 << 30
"""Default: the inputs and features of about 150 images of 1000 tokens for a model of 7 B."""

_IDLE = 2


@dataclass
class _Entry:
    value: Any
    size: int
    used: int


class ByteStore:
    """Values by key, within a number of bytes. What comes when it is full is not kept.

    Nothing is thrown out to make room: a search reads all its batches in the same order at every
    point, and there a cache that lets go of the oldest never has what is asked for. What was not
    read for two points goes.

    Args:
        capacity: the most bytes of tensors; 0 keeps nothing.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        self._now = 0
        self._entries: dict[Hashable, _Entry] = {}

    def get(self, key: Hashable) -> Any | None:
        """Return a value, or None.

        Args:
            key: its key.

        Returns:
            What was kept under this key.
        """
        entry = self._entries.get(key)
        if entry is None:
            return None
        entry.used = self._now
        return entry.value

    def put(self, key: Hashable, value: Any) -> bool:
        """Keep a value, if there is room.

        Args:
            key: its key; what was there goes.
            value: tensors, in lists, tuples and dictionaries.

        Returns:
            Whether it is kept.
        """
        self.drop(key)
        size = nbytes(value)
        if self.used + size > self.capacity:
            return False
        self._entries[key] = _Entry(value, size, self._now)
        self.used += size
        return True

    def drop(self, key: Hashable) -> None:
        """Let go of a value.

        Args:
            key: its key; it need not be there.
        """
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.used -= entry.size

    def drop_where(self, unwanted: Callable[[Hashable], bool]) -> None:
        """Let go of several values.

        Args:
            unwanted: key -> whether to drop it.
        """
        for key in [key for key in self._entries if unwanted(key)]:
            self.drop(key)

    def next_point(self) -> None:
        """Let go of what nobody asked for at the last two points."""
        self._now += 1
        for key, entry in list(self._entries.items()):
            if self._now - entry.used > _IDLE:
                self.drop(key)


def nbytes(value: Any) -> int:
    """Return the bytes of all tensors in a value.

    Args:
        value: tensors, in lists, tuples and dictionaries.

    Returns:
        Their sizes together.
    """
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(nbytes(part) for part in value.values())
    if isinstance(value, (list, tuple)):
        return sum(nbytes(part) for part in value)
    return 0


def bits(tensor: Tensor) -> Tensor:
    """Return a tensor's bit patterns as integers, so that equal bits, and only they, compare equal.

    Args:
        tensor: of any dtype whose elements are 1, 2, 4 or 8 bytes.

    Returns:
        A view of the same shape.
    """
    return tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()])


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

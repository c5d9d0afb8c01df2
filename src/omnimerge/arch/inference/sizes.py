"""What shapes tell: which slots a matrix or vector of a layer can be."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import permutations

from omnimerge.arch.family import Entry

QUERY, KEY, VALUE, OUT = (f"attn.{each}" for each in ("q", "k", "v", "o"))
GATE, UP, DOWN = (f"mlp.{each}" for each in ("gate", "up", "down"))
NEEDED = (QUERY, KEY, VALUE, OUT, UP, DOWN)  # by every layer that attends and is not sparse
NORMS = ("input_norm", "post_attention_norm", "pre_feedforward_norm", "post_feedforward_norm")
HEAD_NORMS = ("attn.q_norm", "attn.k_norm")


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of a layer; None where nothing tells, which fits all.

    Attributes:
        width: of the residual stream.
        head: of one attention head.
        query: rows of all queries.
        key: rows of all keys.
        inner: width of the MLP.
    """

    width: int
    head: int | None
    query: int | None
    key: int | None
    inner: int | None

    def shape(self, slot: str) -> tuple[int | None, int | None]:
        """Return the shape that a matrix's slot has.

        Args:
            slot: for example ``attn.k``.

        Returns:
            Rows and columns.
        """
        rows = {QUERY: self.query, KEY: self.key, VALUE: self.key, GATE: self.inner, UP: self.inner}
        columns = {OUT: self.query, DOWN: self.inner}
        if slot in columns:
            return self.width, columns[slot]
        return rows[slot], self.width

    def fits(self, entry: Entry, shape: tuple[int, ...]) -> bool:
        """Return whether a tensor can be what an entry says.

        Args:
            entry: what the tensor may be.
            shape: its shape.

        Returns:
            True where the sizes agree, or nothing tells.
        """
        first = entry.slots[0]
        if first in HEAD_NORMS:  # per head, over all heads, or with a vector for each head
            whole = self.query if first == HEAD_NORMS[0] else self.key
            return None in (self.head, whole) or (
                shape in ((self.head,), (whole,))
                or (len(shape) == 2 and shape[1] == self.head and shape[0] * shape[1] == whole)
            )
        if first in NORMS:
            return shape == (self.width,)
        shapes = [self.shape(slot) for slot in entry.slots]
        rows = _sum(rows for rows, _ in shapes)
        return len(shape) == 2 and _same(rows, shape[0]) and _same(shapes[0][1], shape[1])

    def matrices(self, shape: tuple[int, ...]) -> tuple[Entry, ...]:
        """Return all that a matrix of a layer can be, fused ones in every order.

        Args:
            shape: its shape.

        Returns:
            The entries; none for other tensors.
        """
        known = self.query is not None and self.inner is not None
        found = [each for each in (_ENTRIES if known else _SINGLE) if self.fits(each, shape)]
        if self.key == self.head:  # of one group, the same as one after the other
            found = [each for each in found if each.op != "grouped"]
        return tuple(found)

    def vectors(self, shape: tuple[int, ...]) -> tuple[Entry, ...]:
        """Return all that a vector of a layer can be.

        Args:
            shape: its shape.

        Returns:
            The entries; none for other tensors.
        """
        if len(shape) != 1:
            return ()
        return tuple(e for e in map(_entry, (*NORMS, *HEAD_NORMS)) if self.fits(e, shape))


def _entry(slot: str) -> Entry:
    return Entry((slot,))


def _sum(sizes: Iterable[int | None]) -> int | None:
    total = 0
    for size in sizes:
        if size is None:
            return None
        total += size
    return total


def _same(expected: int | None, size: int) -> bool:
    return expected is None or expected == size


_SINGLE = tuple(map(_entry, (QUERY, KEY, VALUE, OUT, GATE, UP, DOWN)))
_ENTRIES = (
    *_SINGLE,
    *(Entry(order, "concat") for order in permutations((QUERY, KEY, VALUE))),
    Entry((QUERY, KEY, VALUE), "grouped"),
    *(Entry(order, "concat") for order in permutations((GATE, UP))),
    *(Entry(order, "concat") for order in permutations((KEY, VALUE))),
)

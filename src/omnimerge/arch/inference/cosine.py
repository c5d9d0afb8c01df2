"""What the cosine with a sibling tells: which slot a tensor resembles, and by what margin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, TypeVar

from omnimerge.arch.ancestor import cosine
from omnimerge.arch.family import Entry, split_branch
from omnimerge.arch.geometry import Geometry, geometry
from omnimerge.arch.inference.stack import Part
from omnimerge.arch.layout import SlotMap
from omnimerge.arch.rows import SlotRows
from omnimerge.checkpoint import Checkpoint
from omnimerge.checkpoint.dtypes import is_floating, is_known
from omnimerge.errors import LayoutError

if TYPE_CHECKING:
    from torch import Tensor

_T = TypeVar("_T")
_LAYERS = 4
_ROWS = 32
_COLUMNS = 1024


class Slots:
    """Samples of a checkpoint's matrices, by slot.

    Args:
        checkpoint: the checkpoint.
        slots: the slots that its tensors hold.
        sizes: the sizes that fused tensors are cut by.
    """

    def __init__(self, checkpoint: Checkpoint, slots: SlotMap, sizes: Geometry) -> None:
        self.checkpoint = checkpoint
        self.slots = slots
        self.sizes = sizes
        self._rows = SlotRows(checkpoint, slots, sizes)
        self.names = tuple(self._rows.by_slot)
        self._samples: dict[tuple[str, int], Tensor | None] = {}

    def shape(self, slot: str) -> tuple[int, ...]:
        """Return the shape of a slot.

        Args:
            slot: a slot, with its branch.

        Returns:
            The shape; empty where there is none.
        """
        return self._rows.shape(slot) or ()

    def sample(self, slot: str, rows: int) -> Tensor | None:
        """Read a sample of a matrix: the middle of some rows, evenly spread.

        Args:
            slot: a slot, with its branch.
            rows: of how many rows, from the first on.

        Returns:
            The elements in float32; None where they are no numbers.
        """
        if (slot, rows) not in self._samples:
            self._samples[slot, rows] = self._read(slot, rows)
        return self._samples[slot, rows]

    def _read(self, slot: str, rows: int) -> Tensor | None:
        import torch

        pieces = self._rows.by_slot[slot]
        dtype = self.checkpoint.meta(pieces[0].name).dtype
        if not is_known(dtype) or not is_floating(dtype):
            return None
        width = self.shape(slot)[1]
        count = min(width, _COLUMNS)
        found = []
        for row in _spread(range(rows), _ROWS):
            piece = next(p for p in pieces if 0 <= row * width - p.slot_start < p.count)
            start = piece.start + row * width - piece.slot_start + (width - count) // 2
            found.append(self.checkpoint.read(piece.name, start, start + count).float())
        return torch.cat(found)


class Likeness:
    """Cosines between the tensors of a checkpoint and the slots of a sibling.

    Args:
        checkpoint: the checkpoint whose layout is inferred.
        other: the sibling.
        slots: the sibling's slots.
    """

    def __init__(self, checkpoint: Checkpoint, other: Checkpoint, slots: SlotMap) -> None:
        self.other = Slots(other, slots, geometry(other, slots))
        self._checkpoint = checkpoint
        inside = [name.split(".", 3)[3] for name in self.other.names if ".layers." in name]
        self._slots = {split_branch(each)[0] for each in inside}

    def has(self, entry: Entry) -> bool:
        """Return whether the sibling has all slots of an entry, in some layer and any branch.

        Args:
            entry: slots inside a layer.

        Returns:
            True if it does.
        """
        return all(f"{slot}.weight" in self._slots for slot in entry.slots)

    def of_end(self, stem: str, end: str) -> float | None:
        """Return the cosine of a matrix outside of the layers with embedding or head.

        Args:
            stem: the matrix's name, without its leaf.
            end: `embed` or `head`.

        Returns:
            The cosine over the rows that both have; None where the sibling has no such matrix.
        """
        slot, name = f"llm.{end}.weight", f"{stem}.weight"
        slots = SlotMap(self.other.slots.layout, {slot: name}, {name: slot}, {})
        return self._slot(Slots(self._checkpoint, slots, self.other.sizes), slot)

    def of_part(self, part: Part, entry: Entry, slots: SlotMap, sizes: Geometry) -> float | None:
        """Return the cosine of a tensor inside the layers with what an entry says it is.

        Args:
            part: a name inside the layers.
            entry: what it may be.
            slots: where the layers are; the block of its layout is not read.
            sizes: the sizes that a fused tensor is cut by.

        Returns:
            The mean over some layers and over all slots of the entry, so that a small slot of a
            fused tensor counts as much as a large one; None where the sibling has no such slot.
        """
        numbers = slots.layer_numbers
        layout = replace(slots.layout, block={part.name: entry})
        theirs = range(self.other.slots.layer_count)
        common = [layer for layer in sorted(part.weights) if numbers[layer] in theirs]
        found: list[float | None] = []
        for layer in _spread(common, _LAYERS):
            by_name = layout.slots([part.weights[layer]], numbers)
            try:
                ours = Slots(self._checkpoint, SlotMap(layout, {}, by_name, numbers), sizes)
            except LayoutError:
                return None
            found += [self._slot(ours, slot) for slot in ours.names]
        known = [value for value in found if value is not None]
        return sum(known) / len(known) if known and len(known) == len(found) else None

    def _slot(self, ours: Slots, slot: str) -> float | None:
        bare = split_branch(slot)[0]
        names = (each for each in (slot, bare, f"{bare}@text") if self.other.shape(each))
        counterpart = next(names, None)
        if counterpart is None:
            return None
        shapes = ours.shape(slot), self.other.shape(counterpart)
        if {len(shape) for shape in shapes} != {2} or shapes[0][1] != shapes[1][1]:
            return None
        rows = min(shape[0] for shape in shapes)
        if rows != max(shape[0] for shape in shapes) and ".layers." in slot:
            return None  # vocabularies may differ in size, nothing else
        a, b = ours.sample(slot, rows), self.other.sample(counterpart, rows)
        return None if a is None or b is None else cosine(a, b)


def assign(scores: Sequence[Mapping[Entry, float]]) -> list[tuple[Entry | None, float]]:
    """Give each tensor one of its entries or none, no slot twice, so that the sum is highest.

    Args:
        scores: for each tensor, the cosine of everything that it may be.

    Returns:
        For each tensor its entry, and the margin: how much is lost where it gets another one (or
        none), shared among the tensors that change then. None counts as a cosine of zero.
    """
    total, chosen = _best(scores, None)
    found = []
    for i, entry in enumerate(chosen):
        second, others = _best(scores, (i, entry))
        differing = sum(a != b for a, b in zip(chosen, others, strict=True))
        found.append((entry, (total - second) / max(differing, 1)))
    return found


def _best(
    scores: Sequence[Mapping[Entry, float]], banned: tuple[int, Entry | None] | None
) -> tuple[float, tuple[Entry | None, ...]]:
    @cache
    def best(i: int, used: frozenset[str]) -> tuple[float, tuple[Entry | None, ...]]:
        if i == len(scores):
            return 0.0, ()
        found = []
        for entry, score in [*scores[i].items(), (None, 0.0)]:
            slots = places(entry)
            if not slots & used and banned != (i, entry):
                total, rest = best(i + 1, used | slots)
                found.append((total + score, (entry, *rest)))
        if not found:  # a tensor that can be nothing but what is banned
            return float("-inf"), (None,) * (len(scores) - i)
        return max(found, key=lambda each: each[0])

    return best(0, frozenset())


def places(entry: Entry | None) -> frozenset[str]:
    """Return the places in a layer that an entry takes.

    Args:
        entry: the entry, or None.

    Returns:
        Slots with their branch.
    """
    if entry is None:
        return frozenset()
    branch = f"@{entry.branch}" if entry.branch else ""
    return frozenset(f"{slot}{branch}" for slot in entry.slots)


def _spread(items: Sequence[_T], count: int) -> list[_T]:
    """At most `count` items, evenly spread, first and last among them."""
    if len(items) <= count:
        return list(items)
    return [items[i * (len(items) - 1) // (count - 1)] for i in range(count)]

"""Which elements of a tensor belong to which slot, and from slot to slot between two checkpoints.

Every difference between layouts that is more than a name (fused, interleaved, duplicated,
vocabularies in another order) is a rearrangement of rows. So a mapped tensor is a list of runs of
elements, each read from where the donor has it; nothing is computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from omnimerge.arch.family import Entry, split_branch
from omnimerge.arch.geometry import Geometry
from omnimerge.arch.layout import SlotMap
from omnimerge.checkpoint import Checkpoint, Segment, TensorMeta
from omnimerge.checkpoint.dtypes import is_floating, is_known
from omnimerge.errors import LayoutError


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of elements of a tensor that belongs to one slot.

    Attributes:
        name: the tensor.
        slot: the slot, with its branch.
        start: first element in the tensor.
        slot_start: first element in the slot.
        count: number of elements.
    """

    name: str
    slot: str
    start: int
    slot_start: int
    count: int


@dataclass(frozen=True, slots=True)
class Run:
    """A run of elements of one slot on both sides.

    Attributes:
        start: first element in the target's slot.
        source: first element in the donor's slot.
        count: number of elements.
    """

    start: int
    source: int
    count: int


class SlotRows:
    """Where the slots of a checkpoint lie, element by element.

    Args:
        checkpoint: the checkpoint.
        slots: its slots.
        geometry: the sizes that fused tensors are cut by.

    Raises:
        LayoutError: if a fused tensor cannot be cut by these sizes; with the sizes.
    """

    def __init__(self, checkpoint: Checkpoint, slots: SlotMap, geometry: Geometry) -> None:
        self.by_name: dict[str, tuple[Piece, ...]] = {}
        self.by_slot: dict[str, list[Piece]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name, label in slots.by_name.items():
            meta = checkpoint.tensors[name]
            shape = meta.shape
            fused = "+" in label and label.startswith("llm.layers.")
            entry = slots.layout.entry(name) if fused else None
            if entry is None or entry.op == "rename" or not _can_be_cut(meta):
                pieces: tuple[Piece, ...] = (Piece(name, label, 0, 0, math.prod(shape)),)
                self._shapes[label] = shape
            else:
                pieces = self._cut(checkpoint, name, label, entry, geometry)
            self.by_name[name] = pieces
            for piece in pieces:
                held = self.by_slot.setdefault(piece.slot, [])
                if held and held[0].name != name:
                    raise LayoutError(
                        f"{checkpoint.folder}: {held[0].name!r} and {name!r} are both "
                        f"{piece.slot!r}; remove one, or give a layout with --layout"
                    )
                held.append(piece)

    def shape(self, slot: str) -> tuple[int, ...] | None:
        """Return the shape that a slot would have as a tensor of its own.

        Args:
            slot: a slot, with its branch.

        Returns:
            The shape, or None if the checkpoint does not have the slot.
        """
        return self._shapes.get(slot)

    def whole(self, name: str) -> bool:
        """Return whether a tensor is one slot, and nothing else.

        Args:
            name: a tensor name of the checkpoint.

        Returns:
            False for fused tensors.
        """
        return len(self.by_name[name]) == 1

    def _cut(
        self, checkpoint: Checkpoint, name: str, label: str, entry: Entry, sizes: Geometry
    ) -> tuple[Piece, ...]:
        shape = checkpoint.tensors[name].shape
        rows, width = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
        parts = _part_rows(checkpoint, name, rows, entry, sizes)
        slots = [_slot_of(label, entry, slot) for slot in entry.slots]
        for slot, count in zip(slots, parts, strict=True):
            self._shapes[slot] = (count, *shape[1:])
        groups = parts[1] // (sizes.head_dim or 1) if entry.op == "grouped" else 1
        pieces, row = [], 0
        for group in range(groups):
            for slot, count in zip(slots, parts, strict=True):
                each = count // groups
                pieces.append(Piece(name, slot, row * width, group * each * width, each * width))
                row += each
        return tuple(pieces)


def compose(
    target: Sequence[Piece], donor: Mapping[str, Sequence[Piece]], runs: Mapping[str, Sequence[Run]]
) -> list[tuple[str, Segment]]:
    """Find, for every element of a target tensor, where the donor has it.

    Args:
        target: the target tensor's pieces, which cover it.
        donor: target slot -> the donor's pieces of the slot that feeds it.
        runs: target slot -> which elements correspond, where not all do in order; increasing.

    Returns:
        (slot, segment) in order, covering the tensor without gaps; a segment without a name is the
        target's own.

    Raises:
        LayoutError: if the result does not cover the tensor, which would be a fault of ours.
    """
    found: list[tuple[str, Segment]] = []
    for piece in target:
        whole = [Run(piece.slot_start, piece.slot_start, piece.count)]
        for low, high, source in _spans(piece, runs.get(piece.slot, whole)):
            start = piece.start + low - piece.slot_start
            if source is None:
                found.append((piece.slot, Segment(start, high - low, None, start)))
                continue
            for part in donor[piece.slot]:
                begin = max(source, part.slot_start)
                end = min(source + high - low, part.slot_start + part.count)
                if begin < end:
                    offset = part.start + begin - part.slot_start
                    place = start + begin - source
                    found.append((piece.slot, Segment(place, end - begin, part.name, offset)))
    found.sort(key=lambda each: each[1].start)
    covered = 0
    for _, segment in found:
        if segment.start != covered:
            break
        covered += segment.count
    if covered != sum(piece.count for piece in target):
        raise LayoutError(f"the rows of {target[0].name!r} are not covered by those of the donor")
    return found


def _spans(piece: Piece, runs: Sequence[Run]) -> Iterator[tuple[int, int, int | None]]:
    """(Low, high, donor's element or None) of the slot, over the whole piece."""
    position, stop = piece.slot_start, piece.slot_start + piece.count
    for run in runs:
        low, high = max(run.start, position), min(run.start + run.count, stop)
        if low < high:
            if low > position:
                yield position, low, None
            yield low, high, run.source + low - run.start
            position = high
    if position < stop:
        yield position, stop, None


def _can_be_cut(meta: TensorMeta) -> bool:
    """Packed weights, their scales and their zero points are no rows of anything."""
    leaf = meta.name.rpartition(".")[2]
    return leaf in ("weight", "bias") and is_known(meta.dtype) and is_floating(meta.dtype)


def _slot_of(label: str, entry: Entry, slot: str) -> str:
    base, branch = split_branch(label)
    base = base.replace(entry.label, slot)
    return f"{base}@{branch}" if branch else base


def _part_rows(
    checkpoint: Checkpoint, name: str, rows: int, entry: Entry, sizes: Geometry
) -> list[int]:
    """Rows of each slot in a fused tensor."""
    where = f"{checkpoint.folder}: tensor {name!r} of {rows:,} rows"
    parts = len(entry.slots)
    if "attn.q" not in entry.slots:
        if rows % parts:
            raise LayoutError(f"{where} cannot be cut into {parts} equal parts")
        return [rows // parts] * parts
    if not sizes.heads or not sizes.head_dim:
        raise LayoutError(f"{where} cannot be cut: its config.json tells no num_attention_heads")
    query = sizes.heads * sizes.head_dim
    rest = (rows - query) // (parts - 1)
    grouped = entry.op == "grouped" and rest and (query % rest or rest % sizes.head_dim)
    if rest <= 0 or query + rest * (parts - 1) != rows or rest % sizes.head_dim or grouped:
        raise LayoutError(
            f"{where} cannot be cut into {entry.label} with {sizes.heads} heads of "
            f"{sizes.head_dim}; check num_attention_heads and head_dim in its config.json"
        )
    return [query if slot == "attn.q" else rest for slot in entry.slots]

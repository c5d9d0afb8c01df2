"""What of a donor goes where in a target: the result of `align`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from omnimerge.arch.ancestor import Ancestor
from omnimerge.arch.geometry import Geometry
from omnimerge.arch.layout import SlotMap
from omnimerge.checkpoint import Checkpoint, MappedCheckpoint, Segment
from omnimerge.errors import LayoutError


class Lost(str):
    """A reason that means: there is no counterpart, which nobody asked for."""


GATES = ("accounting", "geometry", "quantization", "ancestor", "finite")


@dataclass(frozen=True, slots=True)
class Merged:
    """A target tensor that gets a contribution.

    Attributes:
        target: the target's tensor.
        sources: the donor's tensors that it is read from.
        op: `rename` (one tensor, whole), `tied` (the donor's embedding for a head), `split`,
            `concat`, `regroup` (rows of fused tensors), or `overlap` (rows of common tokens).
        slot: its slot.
        rule: which rule on branches or on the vocabulary applied; empty for the plain case.
        parts: (slot, first element, count) of what a fused target tensor holds.
        segments: where the elements lie, unless `sources` is one tensor taken whole.
    """

    target: str
    sources: tuple[str, ...]
    op: str
    slot: str
    rule: str = ""
    parts: tuple[tuple[str, int, int], ...] = ()
    segments: tuple[Segment, ...] = ()

    @property
    def own(self) -> tuple[tuple[int, int], ...]:
        """(First, one past the last) element of runs that stay the target's."""
        return tuple((s.start, s.start + s.count) for s in self.segments if s.name is None)


@dataclass
class Alignment:
    """What of a donor goes where in a target, and what does not, each with its reason.

    Attributes:
        target: the target checkpoint.
        donor: the donor checkpoint.
        target_slots: slots of the target.
        donor_slots: slots of the donor.
        target_geometry: geometry of the target's language model.
        donor_geometry: geometry of the donor's language model.
        merged: target tensors with a counterpart, in the target's order.
        kept: target tensors without one -> reason.
        unused: donor tensors that go nowhere -> reason.
        unused_parts: slots of fused donor tensors that go nowhere, while others of them are used
            -> reason.
        refusals: (gate, reason) for everything that speaks against the merge.
        notes: what is worth knowing and no obstacle.
        ancestor: cosine of the mapped matrices.
        heterogeneity: (kind, detail) of every difference between the two layouts.
    """

    target: Checkpoint
    donor: Checkpoint
    target_slots: SlotMap
    donor_slots: SlotMap
    target_geometry: Geometry
    donor_geometry: Geometry
    merged: list[Merged] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)
    unused_parts: dict[str, str] = field(default_factory=dict)
    refusals: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    ancestor: Ancestor | None = None
    heterogeneity: list[tuple[str, str]] = field(default_factory=list)

    def refuse(self, gate: str, reason: str) -> None:
        """Add a reason against the merge.

        Args:
            gate: one of `GATES`.
            reason: why the pair does not fit, with the values and what to do.
        """
        if f"--force {gate}" not in reason:
            reason = f"{reason}; go on all the same with --force {gate}"
        self.refusals.append((gate, reason))

    def reasons(self, force: Collection[str] = ()) -> list[str]:
        """Return why the pair must not be merged, gates in `force` left out.

        Args:
            force: names of gates to waive.

        Returns:
            One line per reason; empty if the pair can be merged.
        """
        return [reason for gate, reason in self.refusals if gate not in force]

    def source(self, merged: Merged) -> tuple[Checkpoint, str]:
        """Return where a merged tensor's contribution is read from, in the target's shape.

        Args:
            merged: an entry of `merged`.

        Returns:
            (checkpoint, tensor name): the donor itself, or a view of it.
        """
        if merged.segments:
            return self._view, merged.target
        return self.donor, merged.sources[0]

    @cached_property
    def _view(self) -> MappedCheckpoint:
        pieces = {m.target: m.segments for m in self.merged if m.segments}
        return MappedCheckpoint(self.donor, self.target, pieces)

    def to_dict(self, force: Collection[str] = ()) -> dict[str, Any]:
        """Return the alignment for JSON.

        Args:
            force: names of gates to waive.

        Returns:
            `mergeable`, `reasons`, `gates`, `notes`, `target`, `donor`, `heterogeneity`, `merged`,
            `kept`, `unused`, `unused_parts`, `ancestor`.
        """
        reasons = self.reasons(force)
        ours, theirs = self.target_slots, self.donor_slots
        return {
            "mergeable": not reasons,
            "reasons": reasons,
            "gates": sorted({gate for gate, _ in self.refusals}),
            "notes": self.notes,
            "target": _described(self.target, ours, self.target_geometry),
            "donor": _described(self.donor, theirs, self.donor_geometry),
            "heterogeneity": [
                {"kind": kind, "detail": detail} for kind, detail in self.heterogeneity
            ],
            "merged": [
                {
                    "target": m.target,
                    "sources": list(m.sources),
                    "source_slots": [theirs.by_name[name] for name in m.sources],
                    "slot": m.slot,
                    "op": m.op,
                    "rule": m.rule,
                }
                for m in self.merged
            ],
            "kept": [
                {"target": name, "slot": ours.by_name[name], "reason": why}
                for name, why in self.kept.items()
            ],
            "unused": [
                {"source": name, "slot": theirs.by_name[name], "reason": why}
                for name, why in self.unused.items()
            ],
            "unused_parts": [
                {"slot": slot, "reason": why} for slot, why in self.unused_parts.items()
            ],
            "ancestor": self.ancestor.to_dict() if self.ancestor else None,
        }

    def check_accounting(self) -> None:
        """Prove that no tensor of either side is lost.

        Raises:
            LayoutError: if a tensor is missing from the account, or counted twice.
        """
        targets = sorted([m.target for m in self.merged] + list(self.kept))
        used = {source for m in self.merged for source in m.sources}
        if targets != sorted(self.target.tensors):
            raise LayoutError(f"the account of {self.target.folder} does not add up")
        if used & set(self.unused) or used | set(self.unused) != set(self.donor.tensors):
            raise LayoutError(f"the account of {self.donor.folder} does not add up")


def _described(checkpoint: Checkpoint, slots: SlotMap, found: Geometry) -> dict[str, Any]:
    return {
        "path": checkpoint.location,
        "layout": slots.layout.name,
        "model_type": checkpoint.config.get("model_type"),
        "tensors": len(checkpoint.tensors),
        "llm": found.to_dict(),
    }

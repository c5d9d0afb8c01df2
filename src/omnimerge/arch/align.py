"""Align a donor with a target: every tensor of both is accounted for, or the pair is refused."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from omnimerge.arch.ancestor import ANCESTOR_GATE, Ancestor, measure_ancestor, same_slice
from omnimerge.arch.geometry import Geometry, geometry
from omnimerge.arch.layout import (
    COMPONENTS,
    SlotMap,
    component,
    is_buffer,
    layer_index,
    slot_map,
)
from omnimerge.arch.vocabulary import comparable, vocabulary_difference
from omnimerge.checkpoint import Checkpoint
from omnimerge.checkpoint.dtypes import is_floating, is_known
from omnimerge.errors import LayoutError, RecipeError, suggestion

SELECTIONS = ("all", "language_model", "linear")
VOCABULARIES = ("auto", "target")
GATES = ("geometry", "ancestor", "finite")

_VOCABULARY_SLOTS = ("llm.embed.weight", "llm.head.weight")


@dataclass(frozen=True, slots=True)
class Merged:
    """A target tensor that gets a contribution: from which donor tensors, by which operation."""

    target: str
    sources: tuple[str, ...]
    op: str
    slot: str


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
        refusals: (gate, reason) for everything that speaks against the merge.
        notes: what is worth knowing and no obstacle.
        ancestor: cosine of the mapped matrices.
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
    refusals: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    ancestor: Ancestor | None = None

    def refuse(self, reason: str) -> None:
        """Add a reason of the geometry gate.

        Args:
            reason: why the pair does not fit.
        """
        self.refusals.append(("geometry", reason))

    def reasons(self, force: Collection[str] = ()) -> list[str]:
        """Return why the pair must not be merged, gates in `force` left out.

        Args:
            force: names of gates to waive.

        Returns:
            One line per reason; empty if the pair can be merged.
        """
        return [reason for gate, reason in self.refusals if gate not in force]

    def to_dict(self, force: Collection[str] = ()) -> dict[str, Any]:
        """Return the alignment for JSON.

        Args:
            force: names of gates to waive.

        Returns:
            `mergeable`, `reasons`, `notes`, `merged`, `kept`, `unused`, `ancestor`.
        """
        reasons = self.reasons(force)
        return {
            "mergeable": not reasons,
            "reasons": reasons,
            "notes": self.notes,
            "merged": [
                {"target": m.target, "sources": list(m.sources), "op": m.op} for m in self.merged
            ],
            "kept": [{"target": name, "reason": why} for name, why in self.kept.items()],
            "unused": [{"source": name, "reason": why} for name, why in self.unused.items()],
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


def align(
    target: Checkpoint,
    donor: Checkpoint,
    *,
    select: str = "language_model",
    vocabulary: str = "auto",
    ancestor: bool = True,
) -> Alignment:
    """Map a donor's tensors onto a target's.

    The language models are matched slot by slot. Any other component is matched only if both have
    the same slots and shapes in it. The ancestor test reads a sample of the mapped matrices;
    everything else reads headers only.

    Args:
        target: the checkpoint whose architecture the output has.
        donor: the checkpoint that is mapped onto it.
        select: which target tensors may be merged: `all`, `language_model` or `linear`.
        vocabulary: `auto` merges embedding and head where both vocabularies are equal; `target`
            keeps the target's.
        ancestor: whether to run the ancestor test.

    Returns:
        The alignment; ask `reasons` whether it may be used.

    Raises:
        LayoutError: if either checkpoint fits no known layout.
        RecipeError: if `select` or `vocabulary` is none of the words above.
    """
    for key, value, known in (
        ("select", select, SELECTIONS),
        ("vocabulary", vocabulary, VOCABULARIES),
    ):
        if value not in known:
            hint = suggestion(value, known)
            raise RecipeError([f"{key}: {value!r} is none of {', '.join(known)}{hint}"], "the call")
    ours = slot_map(target.tensors, str(target.folder))
    theirs = slot_map(donor.tensors, str(donor.folder))
    result = Alignment(target, donor, ours, theirs, geometry(target, ours), geometry(donor, theirs))
    _check_geometry(result)
    head_slot = _head_slot(result, may_read=ancestor)
    _match(result, select, _vocabulary_reason(result, vocabulary), head_slot)
    if ancestor:
        _check_ancestor(result)
    _account_for_donor(result)
    _check_completeness(result)
    result.check_accounting()
    return result


def _check_geometry(result: Alignment) -> None:
    ours, theirs = result.target_geometry, result.donor_geometry
    for name, words in _GEOMETRY_WORDS.items():
        a, b = getattr(ours, name), getattr(theirs, name)
        if a is not None and b is not None and a != b:
            result.refuse(f"{words} differs: target {a}, donor {b}")
        elif name == "heads" and (a is None or b is None):
            result.notes.append("the number of heads could not be compared: no config tells it")
    if ours.rope_scaling != theirs.rope_scaling:
        a, b = (scaling or "none" for scaling in (ours.rope_scaling, theirs.rope_scaling))
        result.refuse(f"RoPE scaling differs: target {a}, donor {b}")
    _refuse_quantized(result, "target", result.target, ours)
    _refuse_quantized(result, "donor", result.donor, theirs)


def _refuse_quantized(
    result: Alignment, role: str, checkpoint: Checkpoint, found: Geometry
) -> None:
    packed = next((name for name in checkpoint.tensors if name.endswith(_QUANTIZED)), None)
    if found.quantized or packed:
        why = f"tensor {packed!r}" if packed else "quantization_config in its config.json"
        result.refuse(f"the {role}'s weights are quantised ({why}); merge the original weights")


# What packed and scaled formats store beside or instead of a weight.
_QUANTIZED = (
    ".qweight",
    ".qzeros",
    ".scales",
    ".g_idx",
    ".weight_scale",
    ".weight_scale_inv",
    ".weight_packed",
    ".absmax",
    ".quant_map",
)

_GEOMETRY_WORDS = {
    "hidden_size": "hidden size",
    "layers": "layer count",
    "heads": "number of heads",
    "kv_heads": "number of key/value heads",
    "head_dim": "head size",
    "intermediate_size": "MLP size",
    "rope_theta": "RoPE base",
    "activation": "activation",
}


def _vocabulary_reason(result: Alignment, policy: str) -> str | None:
    """Why embedding and head stay the target's, or None if they are merged."""
    ours, theirs = result.target_geometry.vocab_size, result.donor_geometry.vocab_size
    if policy == "target":
        return "vocabulary: target"
    if ours != theirs:
        return f"vocabularies differ: target {ours:,} rows, donor {theirs:,}"
    folders = result.target.folder, result.donor.folder
    difference = vocabulary_difference(*folders)
    if not difference and not comparable(*folders):
        result.notes.append(
            "the tokenizers could not be compared; the sizes of the vocabularies are equal"
        )
    return f"vocabularies differ: {difference}" if difference else None


def _head_slot(result: Alignment, *, may_read: bool) -> str:
    """The donor's slot for the target's head: its embedding, where the target's head is that.

    Some checkpoints store a tied head as a copy. Merged apart from the embedding, it would differ.
    """
    embed, head = (result.target_slots.by_slot.get(slot) for slot in _VOCABULARY_SLOTS)
    if not (embed and head and result.target_geometry.tied):
        return _VOCABULARY_SLOTS[1]
    if result.target.meta(embed).shape != result.target.meta(head).shape:
        return _VOCABULARY_SLOTS[1]
    if may_read and not same_slice(result.target, embed, head):
        result.notes.append("the target's config ties its head, but its files hold another one")
        return _VOCABULARY_SLOTS[1]
    return _VOCABULARY_SLOTS[0]


def _match(result: Alignment, select: str, vocabulary_reason: str | None, head_slot: str) -> None:
    component_reason = {name: _component_reason(result, name) for name in COMPONENTS}
    for name, slot in result.target_slots.by_name.items():
        source = _source(result, head_slot if slot == _VOCABULARY_SLOTS[1] else slot)
        reason = (
            _unselected(slot, len(result.target.tensors[name].shape), select)
            or (vocabulary_reason if slot in _VOCABULARY_SLOTS else None)
            or component_reason[component(slot)]
            or _unmatched(result, name, source)
        )
        if reason or source is None:
            result.kept[name] = reason or "the donor has no such tensor"
        else:
            op = "rename" if slot == result.donor_slots.by_name[source] else "tied"
            result.merged.append(Merged(name, (source,), op, slot))


def _source(result: Alignment, slot: str) -> str | None:
    found = result.donor_slots.by_slot.get(slot)
    if found is None and slot == _VOCABULARY_SLOTS[1]:  # tied: the embedding is the head
        return result.donor_slots.by_slot.get(_VOCABULARY_SLOTS[0])
    return found


def _unselected(slot: str, dimensions: int, select: str) -> str | None:
    if select == "all":
        return None
    if component(slot) != "llm":
        return f"{component(slot)} is the target's own"
    if select == "linear" and (dimensions != 2 or slot in _VOCABULARY_SLOTS):
        return "select: linear takes the 2-D matrices of the layers only"
    return None


def _component_reason(result: Alignment, name: str) -> str | None:
    """Why a component other than the language model cannot be merged, or None."""
    if name == "llm":
        return None
    ours = _shapes(result.target, result.target_slots, name)
    theirs = _shapes(result.donor, result.donor_slots, name)
    if ours == theirs:
        return None
    return f"the donor has no {name} part" if not theirs else f"{name} parts have other structures"


def _shapes(checkpoint: Checkpoint, slots: SlotMap, name: str) -> dict[str, tuple[int, ...]]:
    return {
        slot: checkpoint.tensors[tensor].shape
        for slot, tensor in slots.by_slot.items()
        if component(slot) == name
    }


def _unmatched(result: Alignment, name: str, source: str | None) -> str | None:
    meta = result.target.tensors[name]
    if is_buffer(name):
        return "a buffer, not a parameter"
    if not _mergeable(meta.dtype):
        return f"{meta.dtype} is not merged"
    if source is None:
        return "the donor has no such tensor"
    other = result.donor.tensors[source]
    if meta.shape != other.shape:
        if component(result.target_slots.by_name[name]) == "llm":
            result.refuse(f"{name} has shape {meta.shape}, the donor's {source} {other.shape}")
        return "shapes differ"
    if not _mergeable(other.dtype):
        return f"the donor's is stored as {other.dtype}"
    return None


def _mergeable(dtype: str) -> bool:
    """Floating point, and not wider than the float32 that merges are computed in."""
    return is_known(dtype) and is_floating(dtype) and dtype != "F64"


def _account_for_donor(result: Alignment) -> None:
    used = {source for m in result.merged for source in m.sources}
    for name, slot in result.donor_slots.by_name.items():
        if name in used:
            continue
        counterpart = result.target_slots.by_slot.get(slot)
        if counterpart in result.kept:
            result.unused[name] = result.kept[counterpart]
        elif slot == _VOCABULARY_SLOTS[1]:
            result.unused[name] = "the target ties its head to the embedding"
        elif component(slot) != "llm":
            result.unused[name] = f"{component(slot)} is the target's own"
        else:
            result.unused[name] = "the target has no such tensor"


def _check_completeness(result: Alignment) -> None:
    """A language model that matches in part is another model, or in a form that is not known."""
    lost = [
        name
        for name, why in result.unused.items()
        if why == "the target has no such tensor" and not is_buffer(name)
    ]
    lacking = [name for name, why in result.kept.items() if why == "the donor has no such tensor"]
    for names, checkpoint, slots, words in (
        (lost, result.donor, result.donor_slots, "of the donor have no place in the target"),
        (lacking, result.target, result.target_slots, "of the target have none in the donor"),
    ):
        inner = [n for n in names if layer_index(slots.by_name[n]) is not None]
        matrices = [n for n in inner if len(checkpoint.tensors[n].shape) == 2]
        if matrices:
            result.refuse(f"{len(matrices)} matrices {words}, such as {matrices[0]!r}")
        elif inner:
            result.notes.append(f"{len(inner)} tensors {words}, such as {inner[0]!r}")
    if not any(component(m.slot) == "llm" for m in result.merged):
        result.refuse("no tensor of the language models matches")


def _check_ancestor(result: Alignment) -> None:
    """Test every component that is merged; one that is not the language model is kept instead."""
    for name in COMPONENTS:
        merged = [m for m in result.merged if component(m.slot) == name]
        pairs = [(m.target, m.sources[0]) for m in merged if m.slot not in _VOCABULARY_SLOTS]
        found = measure_ancestor(result.target, result.donor, pairs)
        reason = found.refusal()
        if name == "llm":
            result.ancestor = found
            if reason:
                result.refusals.append((ANCESTOR_GATE, reason))
        elif reason:
            result.kept.update({m.target: f"{name} parts share no ancestor" for m in merged})
            result.merged = [m for m in result.merged if component(m.slot) != name]

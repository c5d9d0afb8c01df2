"""Why tensors of a pair are left as they are."""

from __future__ import annotations

from omnimerge.arch.alignment import Alignment, Lost
from omnimerge.arch.ancestor import same_slice
from omnimerge.arch.family import EMBED, HEAD, VOCABULARY_SLOTS
from omnimerge.arch.layout import SlotMap, component, is_buffer
from omnimerge.arch.vocabulary import comparable, vocabulary_difference
from omnimerge.checkpoint import Checkpoint
from omnimerge.checkpoint.dtypes import is_floating, is_known

BUFFER = "a buffer, not a parameter"


def vocabulary_reason(result: Alignment, policy: str) -> str | None:
    """Return why embedding and head stay the target's, or None if they are merged.

    Args:
        result: the alignment, with its geometries; it is told what could not be compared.
        policy: one of `VOCABULARIES`.

    Returns:
        A sentence, or None if both are merged.
    """
    ours, theirs = result.target_geometry.vocab_size, result.donor_geometry.vocab_size
    if policy == "target":
        return "vocabulary: target"
    if policy == "overlap":
        return None
    if ours != theirs:
        return f"vocabularies differ: target {ours:,} rows, donor {theirs:,}"
    folders = result.target.folder, result.donor.folder
    difference = vocabulary_difference(*folders)
    if not difference and not comparable(*folders):
        result.notes.append(
            "the tokenizers could not be compared; the sizes of the vocabularies are equal"
        )
    return f"vocabularies differ: {difference}" if difference else None


def head_slot(result: Alignment, *, may_read: bool) -> str:
    """Return the donor's slot for the target's head: its embedding, where that is the target's.

    Some checkpoints store a tied head as a copy. Merged apart from the embedding, it would differ.

    Args:
        result: the alignment; it is told what the target's files hold.
        may_read: whether weights may be read.

    Returns:
        `HEAD` or `EMBED`.
    """
    embed, head = (result.target_slots.by_slot.get(slot) for slot in VOCABULARY_SLOTS)
    if not (embed and head and result.target_geometry.tied):
        return HEAD
    if result.target.meta(embed).shape != result.target.meta(head).shape:
        return HEAD
    if may_read and not same_slice(result.target, embed, head):
        result.notes.append("the target's config ties its head, but its files hold another one")
        return HEAD
    return EMBED


def unselected(slot: str, dimensions: int, select: str) -> str | None:
    """Return why `select` leaves a tensor out.

    Args:
        slot: the tensor's.
        dimensions: of the tensor.
        select: one of `SELECTIONS`.

    Returns:
        A sentence, or None if it is selected.
    """
    if select == "all":
        return None
    if component(slot) != "llm":
        return f"{component(slot)} is the target's own"
    if select == "linear" and (dimensions != 2 or slot in VOCABULARY_SLOTS):
        return "select: linear takes the 2-D matrices of the layers only"
    return None


def component_reason(result: Alignment, name: str) -> str | None:
    """Return why a component other than the language model cannot be merged, or None.

    Args:
        result: the alignment.
        name: of the component.

    Returns:
        A sentence, or None.
    """
    if name == "llm":
        return None
    ours = _shapes(result.target, result.target_slots, name)
    theirs = _shapes(result.donor, result.donor_slots, name)
    if ours == theirs:
        return None
    return f"the donor has no {name} part" if not theirs else f"{name} parts have other structures"


def _shapes(checkpoint: Checkpoint, slots: SlotMap, name: str) -> dict[str, tuple[int, ...]]:
    return {
        slot: checkpoint.tensors[slots.by_slot[slot]].shape
        for slot in slots.by_component.get(name, ())
    }


def unmergeable(result: Alignment, name: str) -> str | None:
    """Return why a tensor of the target is never merged.

    Args:
        result: the alignment.
        name: of the target's tensor.

    Returns:
        A sentence, or None.
    """
    dtype = result.target.tensors[name].dtype
    if is_buffer(name):
        return BUFFER
    return None if mergeable(dtype) else Lost(f"{dtype} is not merged")


def mergeable(dtype: str) -> bool:
    """Return whether a type is floating point, and not wider than the float32 of merges.

    Args:
        dtype: as safetensors writes it.

    Returns:
        Whether tensors of it are merged.
    """
    return is_known(dtype) and is_floating(dtype) and dtype != "F64"

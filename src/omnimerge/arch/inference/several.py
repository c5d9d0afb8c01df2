"""The slots of several checkpoints over one LLM, which can tell each other's layouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from omnimerge.arch.detect import slots_of
from omnimerge.arch.family import Layout
from omnimerge.arch.inference.infer import infer_layout, require_sure
from omnimerge.arch.layout import SlotMap, slots_in
from omnimerge.checkpoint import Checkpoint
from omnimerge.errors import UnknownLayoutError


def slots_of_all(
    checkpoints: Sequence[Checkpoint], extra: Sequence[Layout] = ()
) -> tuple[Mapping[Checkpoint, SlotMap], list[str]]:
    """Give every tensor of several checkpoints its slot, inferring layouts that nobody knows.

    A layout is inferred from names and shapes, and, where they leave a choice, from the cosine with
    a checkpoint whose layout is known or has been inferred. It is used only if no choice is open.

    Args:
        checkpoints: checkpoints over one LLM.
        extra: layouts that the user gave.

    Returns:
        The slots of each, and a note for each layout that was inferred.

    Raises:
        LayoutError: if a layout cannot be inferred for certain; with what is open.
    """
    known: dict[Checkpoint, SlotMap] = {}
    unknown: list[Checkpoint] = []
    for checkpoint in dict.fromkeys(checkpoints):
        try:
            known[checkpoint] = slots_of(checkpoint, extra)
        except UnknownLayoutError:
            if extra:  # the user's file was to tell it
                raise
            unknown.append(checkpoint)
    notes: list[str] = []
    while unknown:
        before = len(unknown)
        for checkpoint in list(unknown):
            if found := _inferred(checkpoint, known, notes, demand=False):
                known[checkpoint] = found
                unknown.remove(checkpoint)
        if len(unknown) == before:  # nothing more can be told: say what is open
            _inferred(unknown[0], known, notes, demand=True)
    return known, notes


def _inferred(
    checkpoint: Checkpoint,
    known: Mapping[Checkpoint, SlotMap],
    notes: list[str],
    *,
    demand: bool,
) -> SlotMap | None:
    where = str(checkpoint.folder)
    like = next(iter(known), None)
    inferred = infer_layout(checkpoint, like, slots=known[like] if like else None)
    if demand:
        require_sure(inferred, where)
    if inferred.open_choices():
        return None
    shown = f" --like {like.folder}" if like else ""
    notes.append(f"the layout of {where} was inferred: see `omnimerge layout {where}{shown}`")
    return slots_in(inferred.layout, checkpoint.tensors, where)

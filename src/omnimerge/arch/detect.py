"""Which layout a checkpoint has: a table that fits, or what transformers knows of its class."""

from __future__ import annotations

from collections.abc import Sequence

from omnimerge.arch.layout import Layout, SlotMap, find_layout, layouts, slots_in
from omnimerge.checkpoint import Checkpoint
from omnimerge.errors import UnknownLayoutError

# Whose words the layers of a model that only transformers knows are read with.
_WORDS = "plain"


def slots_of(checkpoint: Checkpoint, extra: Sequence[Layout] = ()) -> SlotMap:
    """Give every tensor of a checkpoint its slot.

    Tables come first: those of the user, then the built-in ones. Where none fits, transformers is
    asked where the language model of this architecture lies; names inside its layers that no table
    knows keep their own words, so that such a model can be merged with its like.

    Args:
        checkpoint: the opened checkpoint.
        extra: layouts that the user gave.

    Returns:
        The slots of all tensors, with the layout.

    Raises:
        LayoutError: if neither knows the checkpoint, or two tensors claim one slot.
    """
    return _slots(checkpoint, list(checkpoint.tensors), str(checkpoint.folder), extra)


def slots_of_pair(
    target: Checkpoint, donor: Checkpoint, extra: Sequence[Layout] = ()
) -> tuple[SlotMap, SlotMap, list[str]]:
    """Give every tensor of two checkpoints its slot, inferring a layout that nobody knows.

    A layout is inferred from names and shapes, and, where they leave a choice, from the cosine with
    the other checkpoint. It is used only if no choice is open.

    Args:
        target: one checkpoint.
        donor: the other.
        extra: layouts that the user gave.

    Returns:
        The slots of both, and a note for each layout that was inferred.

    Raises:
        LayoutError: if a layout cannot be inferred for certain; with what is open.
    """
    known: dict[int, SlotMap] = {}
    unknown: list[Checkpoint] = []
    for checkpoint in (target, donor):
        try:
            known[id(checkpoint)] = slots_of(checkpoint, extra)
        except UnknownLayoutError:
            unknown.append(checkpoint)
    notes = []
    for checkpoint in dict.fromkeys(unknown):
        from omnimerge.arch.inference import infer_layout, require_sure

        other = donor if checkpoint is target else target
        found = known.get(id(other))
        inferred = infer_layout(
            checkpoint,
            other if found else None,
            layouts=[found.layout, *extra] if found else extra,
        )
        require_sure(inferred, str(checkpoint.folder))
        names, where = list(checkpoint.tensors), str(checkpoint.folder)
        known[id(checkpoint)] = slots_in(inferred.layout, names, where)
        like = f" --like {other.folder}" if found else ""
        notes.append(f"the layout of {where} was inferred: see `omnimerge layout {where}{like}`")
    return known[id(target)], known[id(donor)], notes


def memory_names(checkpoint: Checkpoint, memory: Sequence[str]) -> dict[str, str]:
    """Map a checkpoint's tensor names to those of the same model in memory.

    Both sides are brought to slots. What has no slot in common is left out: buffers, a tied head,
    and tensors that transformers joins or cuts when it loads them.

    Args:
        checkpoint: the checkpoint.
        memory: keys of the model's ``state_dict()``.

    Returns:
        Disk name -> memory name.

    Raises:
        LayoutError: if the names of either side fit no layout.
    """
    disk = slots_of(checkpoint)
    loaded = _slots(checkpoint, list(memory), "the model in memory")
    return {
        name: loaded.by_slot[slot] for name, slot in disk.by_name.items() if slot in loaded.by_slot
    }


def _slots(
    checkpoint: Checkpoint, names: Sequence[str], where: str, extra: Sequence[Layout] = ()
) -> SlotMap:
    try:
        layout = find_layout(names, where, extra)
    except UnknownLayoutError:
        found = _from_transformers(checkpoint, names)
        if found is None:
            raise
        layout = found
    return slots_in(layout, names, where)


def _from_transformers(checkpoint: Checkpoint, names: Sequence[str]) -> Layout | None:
    if not isinstance(checkpoint.config.get("architectures"), list):
        return None
    from omnimerge.arch.hf_tables import language_model_names

    found = language_model_names(checkpoint.folder, names)
    if found is None:
        return None
    block = next(layout.block for layout in layouts() if layout.name == _WORDS)
    model_type = str(checkpoint.config.get("model_type"))
    about = f"{model_type}, by the tables of transformers"
    layout = Layout(
        name=model_type,
        about=about,
        layers=found["layers"],
        embed=found["embed"],
        norm=found["norm"],
        head=found["head"],
        block=block,
    )
    return layout if layout.fit(names) else None

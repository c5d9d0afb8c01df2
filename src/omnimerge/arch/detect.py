"""Which layout a checkpoint has: a table that fits, or what transformers knows of its class."""

from __future__ import annotations

from collections.abc import Sequence

from omnimerge.arch.family import Layout
from omnimerge.arch.layout import SlotMap, layouts, slot_map, slots_in
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
        return slot_map(names, where, extra)
    except UnknownLayoutError:
        layout = _from_transformers(checkpoint, names)
        if layout is None:
            raise
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

"""Which layout a list of tensor names has, and the slots of its tensors.

A layout is data: the files in ``layouts/``, and those that a user gives. It turns a tensor name
into a slot, a layout-free name ``component.rest``: ``llm.layers.3.attn.q.weight``,
``llm.layers.3.attn.q.weight@vision`` for the second copy that some MLLMs keep for images,
``llm.embed.weight``, ``vision.encoder.layers.0.mlp.fc1.bias``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path

from omnimerge.arch.family import Layout, general_tables, layer_pattern
from omnimerge.arch.layout_file import read_layouts
from omnimerge.errors import LayoutError, UnknownLayoutError

LAYOUTS = Path(__file__).parent / "layouts"


@dataclass(frozen=True)
class SlotMap:
    """The tensors of one checkpoint by slot.

    Attributes:
        layout: the layout that fits.
        by_slot: slot -> tensor name.
        by_name: tensor name -> slot, in the order of the checkpoint.
        layer_numbers: layer on disk -> layer in the slot.
    """

    layout: Layout
    by_slot: Mapping[str, str]
    by_name: Mapping[str, str]
    layer_numbers: Mapping[int, int]

    @property
    def layer_count(self) -> int:
        """Number of layers of the language model."""
        return len(self.layer_numbers)

    @cached_property
    def by_component(self) -> Mapping[str, tuple[str, ...]]:
        """Component -> its slots, in order."""
        found: dict[str, list[str]] = {}
        for slot in self.by_slot:
            found.setdefault(component(slot), []).append(slot)
        return {name: tuple(slots) for name, slots in found.items()}


def component(slot: str) -> str:
    """Return the component a slot belongs to: llm, vision, audio, projector or other.

    Args:
        slot: for example ``llm.layers.3.attn.q.weight``.

    Returns:
        For example ``llm``.
    """
    return slot.partition(".")[0]


def layer_index(slot: str) -> int | None:
    """Return the layer number of a language-model slot, or None where it has none.

    Args:
        slot: for example ``llm.layers.3.attn.q.weight``.

    Returns:
        For example 3.
    """
    match = re.match(r"llm\.layers\.([0-9]{1,9})\.", slot)
    return int(match.group(1)) if match else None


def find_layout(names: Sequence[str], where: str, extra: Sequence[Layout] = ()) -> Layout:
    """Find the layout that fits a list of tensor names.

    One of `extra` that fits wins if all the names of its block are there. Of the others that fit,
    the one that knows most of the names inside layers, then one of `extra`, then the one with the
    longest marker.

    Args:
        names: tensor names, as on disk or as in memory.
        where: the checkpoint's name, for messages.
        extra: layouts that the user gave.

    Returns:
        The layout.

    Raises:
        UnknownLayoutError: if no layout fits.
        LayoutError: if one would, but for missing layers.
    """
    for layout in extra:
        if layout.fit(names) == 1 + len(layout.block):
            return layout
    scores = [
        (score, first, len(layout.marker), layout)
        for first, table in ((True, extra), (False, layouts()))
        for layout in table
        if (score := layout.fit(names))
    ]
    if scores:
        return max(scores, key=lambda found: found[:3])[3]
    if gap := _gap(names):
        raise LayoutError(f"{where} lacks layers of its language model: {gap}")
    if extra:
        why = "; ".join(f"{layout.name}: {layout.misfit(names)}" for layout in extra)
        raise UnknownLayoutError(
            f"the tensor names of {where} fit no layout, neither a known one nor {why}"
        )
    known = ", ".join(layout.name for layout in layouts())
    raise UnknownLayoutError(
        f"the tensor names of {where} fit no known layout (first: {names[:1]}); known: {known}; "
        f"`omnimerge layout {where}` infers one, to be checked and given with --layout"
    )


def slot_map(names: Iterable[str], where: str, extra: Sequence[Layout] = ()) -> SlotMap:
    """Find the layout of a list of tensor names and give every tensor its slot.

    Args:
        names: tensor names, as on disk or as in memory.
        where: the checkpoint's name, for messages.
        extra: layouts that the user gave; see `find_layout`.

    Returns:
        The slots of all tensors, with the layout.

    Raises:
        LayoutError: if no layout fits, or two tensors claim one slot.
    """
    names = list(names)
    return slots_in(find_layout(names, where, extra), names, where)


def slots_in(layout: Layout, names: Iterable[str], where: str) -> SlotMap:
    """Give every tensor its slot in a given layout.

    Args:
        layout: the layout.
        names: tensor names.
        where: the checkpoint's name, for messages.

    Returns:
        The slots of all tensors.

    Raises:
        LayoutError: if two tensors claim one slot.
    """
    names = list(names)
    by_name = layout.slots(names)
    by_slot: dict[str, str] = {}
    for name, slot in by_name.items():
        if slot in by_slot:
            raise LayoutError(f"{where}: {by_slot[slot]!r} and {name!r} are both {slot!r}")
        by_slot[slot] = name
    return SlotMap(layout, by_slot, by_name, layout.layer_numbers(names))


def find_names(names: Iterable[str], slots: SlotMap) -> dict[str, str]:
    """Map single tensor names, in whatever layout, to those of a checkpoint.

    Args:
        names: tensor names, such as the parameters that an adapter changes, as they are called in
            memory or were in an earlier version.
        slots: the checkpoint's slots.

    Returns:
        Name -> the checkpoint's name, for every name that has one. A name that the checkpoint has
        as it is stands for itself.
    """
    names = list(names)
    found = {name: name for name in names if name in slots.by_name}
    for layout in (slots.layout, *layouts()):
        for name, slot in layout.slots(names, slots.layer_numbers).items():
            if name not in found and slot in slots.by_slot:
                found[name] = slots.by_slot[slot]
    return found


def is_buffer(name: str) -> bool:
    """Return whether a tensor on disk is no parameter (recomputed from the config).

    Args:
        name: tensor name on disk.

    Returns:
        True for rotary frequencies and position ids.
    """
    return any(name.endswith(suffix) for suffix in general_tables()["buffers"])


@lru_cache(maxsize=1)
def layouts() -> tuple[Layout, ...]:
    """Return every built-in layout.

    Returns:
        The layouts, by file in alphabetical order.
    """
    files = sorted(LAYOUTS.glob("*.yaml"))
    return tuple(layout for file in files for layout in read_layouts(file))


def read_all_layouts(files: Iterable[str | Path]) -> tuple[Layout, ...]:
    """Read the layouts of several files.

    Args:
        files: YAML files.

    Returns:
        All their layouts, in order.

    Raises:
        LayoutError: if a file cannot be read, or does not describe a layout.
    """
    return tuple(layout for file in files for layout in read_layouts(Path(file)))


def check_used(extra: Sequence[Layout], found: Iterable[SlotMap]) -> None:
    """Refuse a layout of the user's that no checkpoint has.

    Args:
        extra: layouts that the user gave.
        found: the slots of all checkpoints.

    Raises:
        LayoutError: naming the layout, and what it misses in each checkpoint.
    """
    maps = list(found)
    for layout in extra:
        if not any(slots.layout is layout for slots in maps):
            why = [
                f"{slots.layout.name} fits better"
                if layout.fit(list(slots.by_name))
                else layout.misfit(list(slots.by_name))
                for slots in maps
            ]
            raise LayoutError(
                f"layout {layout.name} fits no checkpoint ({'; '.join(dict.fromkeys(why))}); "
                "correct the file, or leave it out"
            )


def _gap(names: Sequence[str]) -> str:
    """Which layers are missing, if a layout would fit but for them."""
    stems = {name.rpartition(".")[0] for name in names}
    for layout in layouts():
        pattern = layer_pattern(layout.layers)
        found = {int(match.group(1)) for name in names if (match := pattern.match(name))}
        if found and {layout.embed, layout.norm} <= stems and not layout.marker:
            missing = islice((i for i in range(max(found)) if i not in found), 3)
            return ", ".join(layout.layers.replace("{i}", str(i)) + "*" for i in missing)
    return ""

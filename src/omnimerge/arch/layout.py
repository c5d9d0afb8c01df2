"""Layouts: from the tensor names of a checkpoint to slots that every checkpoint shares.

A slot is a layout-free tensor name, ``component.rest``: ``llm.layers.3.attn.q.weight``,
``llm.embed.weight``, ``vision.encoder.layers.0.mlp.fc1.bias``. The tables are in ``layouts.yaml``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from omnimerge.errors import LayoutError

COMPONENTS = ("llm", "vision", "audio", "projector", "other")


@dataclass(frozen=True, slots=True)
class Layout:
    """How one family of checkpoints names its language model.

    Attributes:
        name: key in ``layouts.yaml``.
        about: which checkpoints use it.
        marker: a prefix that some tensor must have, or an empty string.
        layers: prefix of a layer's tensors, with ``{i}`` for its number.
        embed: name of the token embedding, without its leaf.
        norm: name of the final norm, without its leaf.
        head: name of the output head, without its leaf.
        block: leaf names inside a layer -> slots.
    """

    name: str
    about: str
    marker: str
    layers: str
    embed: str
    norm: str
    head: str
    block: Mapping[str, str]

    def llm_slot(self, name: str) -> str | None:
        """Return the slot of a language-model tensor, or None if `name` is another component's.

        Args:
            name: tensor name on disk.

        Returns:
            The slot; a name inside a layer that no table knows keeps its own words.
        """
        stem, _, leaf = name.rpartition(".")
        whole = {self.embed: "embed", self.norm: "norm", self.head: "head"}
        if stem in whole:
            return f"llm.{whole[stem]}.{leaf}"
        match = _layer_pattern(self.layers).match(name)
        if not match:
            return None
        index, rest = match.group(1), name[match.end() :]
        inner, _, leaf = rest.rpartition(".")
        return f"llm.layers.{index}.{self.block.get(inner, inner)}.{leaf}"


@dataclass(frozen=True)
class SlotMap:
    """The tensors of one checkpoint by slot.

    Attributes:
        layout: the layout that fits.
        by_slot: slot -> tensor name.
        by_name: tensor name -> slot, in the order of the checkpoint.
        layer_count: number of layers of the language model.
    """

    layout: Layout
    by_slot: Mapping[str, str]
    by_name: Mapping[str, str]
    layer_count: int


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
    match = re.match(r"llm\.layers\.(\d+)\.", slot)
    return int(match.group(1)) if match else None


def slot_map(names: Iterable[str], where: str) -> SlotMap:
    """Find the layout of a list of tensor names and give every tensor its slot.

    A layout fits if its embedding, its final norm and a gap-free run of layers from 0 are there;
    among those that fit, the one with the longest marker wins.

    Args:
        names: tensor names, as on disk or as in memory.
        where: the checkpoint's name, for messages.

    Returns:
        The slots of all tensors, with the layout.

    Raises:
        LayoutError: if no layout fits, or two tensors claim one slot.
    """
    names = list(names)
    fitting = [(layout, count) for layout in layouts() if (count := _fit(layout, names))]
    if not fitting and (gap := _gap(names)):
        raise LayoutError(f"{where} lacks layers of its language model: {gap}")
    if not fitting:
        known = "; ".join(f"{layout.name} ({layout.about})" for layout in layouts())
        raise LayoutError(
            f"the tensor names of {where} fit no known layout (first: {names[:1]}); known: {known}"
        )
    layout, count = max(fitting, key=lambda found: len(found[0].marker))
    by_name = {name: layout.llm_slot(name) or _component_slot(name) for name in names}
    by_slot: dict[str, str] = {}
    for name, slot in by_name.items():
        if slot in by_slot:
            raise LayoutError(f"{where}: {by_slot[slot]!r} and {name!r} are both {slot!r}")
        by_slot[slot] = name
    return SlotMap(layout, by_slot, by_name, count)


def memory_names(disk_names: Sequence[str], memory_names: Sequence[str]) -> dict[str, str]:
    """Map the tensor names of a checkpoint on disk to those of the same model in memory.

    Both sides are brought to slots. A head that is tied, and so absent on one side, is left out.

    Args:
        disk_names: names in the checkpoint.
        memory_names: keys of the model's ``state_dict()``.

    Returns:
        Disk name -> memory name, for every disk name that is a parameter.

    Raises:
        LayoutError: if a disk name has no counterpart in memory.
    """
    disk = slot_map(disk_names, "the checkpoint")
    memory = slot_map(memory_names, "the model in memory")
    found = {}
    for name, slot in disk.by_name.items():
        if slot in memory.by_slot:
            found[name] = memory.by_slot[slot]
        elif not is_buffer(name):
            raise LayoutError(f"tensor {name!r} ({slot}) has no counterpart in the loaded model")
    return found


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
    found = {}
    for name in names:
        candidates = [name] if name in slots.by_name else []
        for layout in layouts():
            slot = layout.llm_slot(name) or _component_slot(name)
            candidates += [slots.by_slot[slot]] if slot in slots.by_slot else []
        if candidates:
            found[name] = candidates[0]
    return found


def is_buffer(name: str) -> bool:
    """Return whether a tensor on disk is no parameter (recomputed from the config).

    Args:
        name: tensor name on disk.

    Returns:
        True for rotary frequencies and position ids.
    """
    return any(name.endswith(suffix) for suffix in _tables()["buffers"])


@lru_cache(maxsize=1)
def layouts() -> tuple[Layout, ...]:
    """Return every layout of ``layouts.yaml``.

    Returns:
        The layouts, in the file's order.
    """
    tables = _tables()
    return tuple(
        Layout(
            name=name,
            about=entry["about"],
            marker=entry.get("marker", ""),
            layers=entry["layers"],
            embed=entry["embed"],
            norm=entry["norm"],
            head=entry["head"],
            block=tables["blocks"][entry["block"]],
        )
        for name, entry in tables["layouts"].items()
    )


@lru_cache(maxsize=1)
def _tables() -> dict[str, Any]:
    text = (Path(__file__).parent / "layouts.yaml").read_text(encoding="utf-8")
    tables: dict[str, Any] = yaml.safe_load(text)
    return tables


@lru_cache(maxsize=64)
def _layer_pattern(prefix: str) -> re.Pattern[str]:
    before, _, after = prefix.partition("{i}")
    return re.compile(re.escape(before) + r"(\d+)" + re.escape(after))


def _gap(names: Sequence[str]) -> str:
    """Which layers are missing, if a layout would fit but for them."""
    stems = {name.rpartition(".")[0] for name in names}
    for layout in layouts():
        pattern = _layer_pattern(layout.layers)
        found = {int(match.group(1)) for name in names if (match := pattern.match(name))}
        if found and {layout.embed, layout.norm} <= stems and not layout.marker:
            missing = sorted(set(range(max(found) + 1)) - found)
            return ", ".join(layout.layers.replace("{i}", str(i)) + "*" for i in missing[:3])
    return ""


def _fit(layout: Layout, names: Sequence[str]) -> int:
    """Number of layers if the layout fits, else 0."""
    if layout.marker and not any(name.startswith(layout.marker) for name in names):
        return 0
    stems = {name.rpartition(".")[0] for name in names}
    if not {layout.embed, layout.norm} <= stems:
        return 0
    pattern = _layer_pattern(layout.layers)
    indices = {int(match.group(1)) for name in names if (match := pattern.match(name))}
    return len(indices) if indices == set(range(len(indices))) else 0


@lru_cache(maxsize=1)
def _prefixes() -> list[tuple[str, str]]:
    return sorted(_tables()["components"].items(), key=lambda pair: -len(pair[0]))


def _component_slot(name: str) -> str:
    for prefix, slot in _prefixes():
        if name.startswith(prefix):
            return str(slot) + name[len(prefix) :]
    return f"other.{name}"

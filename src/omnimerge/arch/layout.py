"""Layouts: how a family of checkpoints names, fuses and duplicates the tensors of its LLM.

A layout is data: the files in ``layouts/``, and those that a user gives. It turns a tensor name
into a slot, a layout-free name ``component.rest``: ``llm.layers.3.attn.q.weight``,
``llm.layers.3.attn.q.weight@vision`` for the second copy that some MLLMs keep for images,
``llm.embed.weight``, ``vision.encoder.layers.0.mlp.fc1.bias``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from omnimerge.checkpoint.yaml_file import read_mapping
from omnimerge.errors import LayoutError, UnknownLayoutError, suggestion

COMPONENTS = ("llm", "vision", "audio", "projector", "other")
BRANCHES = ("text", "vision")
EMBED, HEAD = VOCABULARY_SLOTS = ("llm.embed.weight", "llm.head.weight")
LAYOUTS = Path(__file__).parent / "layouts"

Op = Literal["rename", "concat", "grouped"]


@dataclass(frozen=True, slots=True)
class Entry:
    """What one name inside a layer stands for.

    Attributes:
        slots: the slots that the tensor holds, stacked along its rows.
        op: `rename` (one slot), `concat` (one after the other), or `grouped` (queries, keys and
            values interleaved by key/value head).
        branch: `text` or `vision` where the checkpoint holds the slot twice, else empty.
    """

    slots: tuple[str, ...]
    op: Op = "rename"
    branch: str = ""

    @property
    def label(self) -> str:
        """The slots in one word, without the branch."""
        return "+".join(self.slots)


@dataclass(frozen=True)
class Layout:
    """How one family of checkpoints names its language model.

    Attributes:
        name: key, for people and for JSON.
        about: which checkpoints use it.
        marker: a prefix that some tensor must have, or an empty string.
        layers: prefix of a layer's tensors, with ``{i}`` for its number.
        embed: name of the token embedding, without its leaf.
        norm: name of the final norm, without its leaf.
        head: name of the output head, without its leaf.
        block: name inside a layer, without its leaf -> what it stands for.
        inserted: a layer in which a name starts with this is none of the language model's own.
        own: a name inside a layer that holds one of these is the checkpoint's own addition.
        components: prefix on disk -> prefix of the slot, before the general table.
    """

    name: str
    about: str
    layers: str
    embed: str
    norm: str
    head: str
    block: Mapping[str, Entry]
    marker: str = ""
    inserted: str = ""
    own: tuple[str, ...] = ()
    components: Mapping[str, str] = field(default_factory=dict)

    def slots(
        self, names: Iterable[str], numbers: Mapping[int, int] | None = None
    ) -> dict[str, str]:
        """Give every tensor its slot.

        Args:
            names: all tensor names of a checkpoint, or some of them with `numbers`.
            numbers: layer on disk -> layer in the slot; default: what `names` tell.

        Returns:
            Name -> slot, in order. A fused tensor's slot joins those that it holds with ``+``. A
            name inside a layer that the layout does not know keeps its own words.
        """
        names = list(names)
        whole = {self.embed: "embed", self.norm: "norm", self.head: "head"}
        numbers = self.layer_numbers(names) if numbers is None else numbers
        pattern = _layer_pattern(self.layers)
        found = {}
        for name in names:
            stem, _, leaf = name.rpartition(".")
            match = pattern.match(name)
            if stem in whole:
                found[name] = f"llm.{whole[stem]}.{leaf}"
            elif not match or any(word in name[match.end() :] for word in self.own):
                found[name] = self.component_slot(name)
            elif (number := numbers.get(int(match.group(1)))) is None:
                found[name] = f"projector.inserted.{match.group(1)}.{name[match.end() :]}"
            else:
                found[name] = self._layer_slot(number, name[match.end() :])
        return found

    def layer_numbers(self, names: Iterable[str]) -> dict[int, int]:
        """Number the language model's own layers, from 0, inserted ones left out.

        Args:
            names: all tensor names of a checkpoint.

        Returns:
            Number on disk -> number in the slot.
        """
        pattern = _layer_pattern(self.layers)
        seen, inserted = set(), set()
        for name in names:
            if match := pattern.match(name):
                seen.add(int(match.group(1)))
                if self.inserted and name.startswith(self.inserted, match.end()):
                    inserted.add(int(match.group(1)))
        return {index: number for number, index in enumerate(sorted(seen - inserted))}

    def entry(self, name: str) -> Entry | None:
        """Return what a tensor name inside a layer stands for.

        Args:
            name: a tensor name on disk.

        Returns:
            The entry; None outside of the layers, or where the layout does not know the name.
        """
        match = _layer_pattern(self.layers).match(name)
        return self.block.get(name[match.end() :].rpartition(".")[0]) if match else None

    def component_slot(self, name: str) -> str:
        """Return the slot of a tensor outside of the language model.

        Args:
            name: a tensor name on disk.

        Returns:
            For example ``vision.encoder.layers.0.mlp.fc1.bias``.
        """
        for table in (self.components, _tables()["components"]):
            fitting = [prefix for prefix in table if name.startswith(prefix)]
            if fitting:
                prefix = max(fitting, key=len)
                return f"{table[prefix]}{name[len(prefix) :]}"
        for word, words in _tables()["words"].items():
            if any(each in name.lower() for each in words):
                return f"{word}.{name}"
        stem = self.layers.partition("layers.{i}")[0]
        if stem not in ("", "model.") and name.startswith(stem):  # such as learned positions
            return f"llm.{name[len(stem) :]}"
        return f"other.{name}"

    def fit(self, names: Sequence[str]) -> int:
        """Return how well the layout fits: 0 for not at all, else 1 + the names that it knows.

        Args:
            names: all tensor names of a checkpoint.

        Returns:
            The number of different names inside layers that the layout knows, plus one. It does
            not fit unless embedding, final norm and a gap-free run of layers from 0 are there.
        """
        if self.marker and not any(name.startswith(self.marker) for name in names):
            return 0
        stems = {name.rpartition(".")[0] for name in names}
        if not {self.embed, self.norm} <= stems:
            return 0
        indices, inner = set(), set()
        for name in names:
            if match := _layer_pattern(self.layers).match(name):
                indices.add(int(match.group(1)))
                inner.add(name[match.end() :].rpartition(".")[0])
        if not indices or indices != set(range(len(indices))):
            return 0
        return 1 + len(inner & set(self.block))

    def misfit(self, names: Sequence[str]) -> str:
        """Return why the layout does not fit.

        Args:
            names: all tensor names of a checkpoint.

        Returns:
            What is missing, in words.
        """
        stems = {name.rpartition(".")[0] for name in names}
        for stem in (self.embed, self.norm):
            if stem not in stems:
                return f"there is no tensor {stem}.*"
        if self.marker and not any(name.startswith(self.marker) for name in names):
            return f"no tensor begins with its marker {self.marker}"
        return f"there is no gap-free run of layers {self.layers}*"

    def _layer_slot(self, number: int, rest: str) -> str:
        inner, _, leaf = rest.rpartition(".")
        entry = self.block.get(inner, Entry((inner,)))
        branch = f"@{entry.branch}" if entry.branch else ""
        return f"llm.layers.{number}.{entry.label}.{leaf}{branch}"


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


def split_branch(slot: str) -> tuple[str, str]:
    """Split a slot into the slot itself and its branch.

    Args:
        slot: for example ``llm.layers.3.attn.q.weight@vision``.

    Returns:
        For example ``("llm.layers.3.attn.q.weight", "vision")``; the branch may be empty.
    """
    base, _, branch = slot.partition("@")
    return base, branch


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
    return any(name.endswith(suffix) for suffix in _tables()["buffers"])


@lru_cache(maxsize=1)
def layouts() -> tuple[Layout, ...]:
    """Return every built-in layout.

    Returns:
        The layouts, by file in alphabetical order.
    """
    files = sorted(LAYOUTS.glob("*.yaml"))
    return tuple(layout for file in files for layout in read_layouts(file))


def read_layouts(file: Path) -> tuple[Layout, ...]:
    """Read the layouts of a file.

    Args:
        file: a YAML file; see ``docs/layouts.md`` for its keys.

    Returns:
        One layout, or one per entry of `stacks`.

    Raises:
        LayoutError: if the file cannot be read, or does not describe a layout.
    """
    try:
        content = read_mapping(file)
    except ValueError as error:
        raise LayoutError(f"cannot read layout {file}: {error}") from error
    return parse_layouts(content, str(file), file.stem)


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


def parse_layouts(content: Any, where: str, name: str) -> tuple[Layout, ...]:
    """Make layouts of a file's content.

    Args:
        content: what the YAML file holds.
        where: the file, for messages.
        name: the name of the layout, where the file describes one.

    Returns:
        One layout, or one per entry of `stacks`.

    Raises:
        LayoutError: if the content does not describe a layout; with the key.
    """
    if not isinstance(content, Mapping):
        raise LayoutError(f"layout {where} is no mapping of keys")
    _check_keys(content, (*_STACK_KEYS, *_FILE_KEYS), where)
    stacks = content.get("stacks")
    if stacks is None:
        return (_parse_layout(content, where, str(content.get("name", name))),)
    if not isinstance(stacks, Mapping) or not stacks:
        raise LayoutError(f"layout {where}: stacks must name at least one stack")
    shared = {key: value for key, value in content.items() if key != "stacks"}
    found = []
    for key, stack in stacks.items():
        if not isinstance(stack, Mapping):
            raise LayoutError(f"layout {where}: stacks.{key} is no mapping of keys")
        _check_keys(stack, _STACK_KEYS, f"{where}, stacks.{key}")
        found.append(_parse_layout({**shared, **stack}, where, str(key)))
    return tuple(found)


_STACK_KEYS = ("about", "prefix", "head", "marker")
_FILE_KEYS = (
    "name",
    "block",
    "embed",
    "norm",
    "layers",
    "inserted",
    "own",
    "components",
    "stacks",
)


def _check_keys(content: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in content:
        if key not in known:
            raise LayoutError(
                f"layout {where}: {key!r} is no key{suggestion(str(key), known)}; "
                f"keys: {', '.join(known)}"
            )


def _parse_layout(content: Mapping[str, Any], where: str, name: str) -> Layout:
    for key in ("prefix", "head", "block"):
        if key not in content:
            raise LayoutError(f"layout {where}: {key!r} is missing")
    block = _mapping(content, "block", where)
    prefix = _text(content, "prefix", where)
    layers = _text(content, "layers", where, "layers.{i}.")
    if layers.count("{i}") != 1:
        raise LayoutError(f"layout {where}: layers: {layers!r} must hold {{i}} once")
    own = content.get("own", [])
    if not isinstance(own, list):
        raise LayoutError(f"layout {where}: own must be a list of words")
    return Layout(
        name=name,
        about=_text(content, "about", where, name),
        layers=prefix + layers,
        embed=prefix + _text(content, "embed", where, "embed_tokens"),
        norm=prefix + _text(content, "norm", where, "norm"),
        head=_text(content, "head", where),
        block={str(key): _parse_entry(value, f"{where}, block.{key}") for key, value in block},
        marker=_text(content, "marker", where, ""),
        inserted=_text(content, "inserted", where, ""),
        own=tuple(str(word) for word in own),
        components=_components(content, where),
    )


def _components(content: Mapping[str, Any], where: str) -> dict[str, str]:
    found = {}
    for key, value in _mapping(content, "components", where):
        name, dot, _ = str(value).partition(".")
        if name not in COMPONENTS[1:] or not dot:
            known = ", ".join(f"{each}." for each in COMPONENTS[1:])
            raise LayoutError(
                f"layout {where}: components.{key}: {value!r} does not begin with one of {known}"
            )
        found[str(key)] = str(value)
    return found


def _mapping(content: Mapping[str, Any], key: str, where: str) -> list[tuple[Any, Any]]:
    value = content.get(key) or {}
    if not isinstance(value, Mapping):
        raise LayoutError(f"layout {where}: {key} is no mapping of keys")
    return list(value.items())


def _text(content: Mapping[str, Any], key: str, where: str, default: str | None = None) -> str:
    value = content.get(key, default)
    if not isinstance(value, str):
        raise LayoutError(f"layout {where}: {key}: {value!r} is no text")
    return value


def _parse_entry(value: Any, where: str) -> Entry:
    if isinstance(value, str):
        slot, branch = split_branch(value)
        return _checked(Entry((slot,), "rename", branch), where)
    if isinstance(value, Mapping):
        op = next((op for op in ("concat", "grouped") if op in value), None)
        slots = value.get(op) if op else None
        known = {"concat", "grouped", "branch"} >= set(value)
        if isinstance(slots, list) and len(slots) > 1 and known:
            entry = Entry(tuple(map(str, slots)), op, str(value.get("branch", "")))  # type: ignore[arg-type]
            return _checked(entry, where)
    raise LayoutError(
        f"layout {where}: {value!r} is neither a slot nor {{concat: [...]}} or {{grouped: [...]}}"
    )


def _checked(entry: Entry, where: str) -> Entry:
    if entry.branch and entry.branch not in BRANCHES:
        raise LayoutError(f"layout {where}: branch {entry.branch!r} is none of {BRANCHES}")
    if entry.op == "grouped" and entry.slots != ("attn.q", "attn.k", "attn.v"):
        raise LayoutError(f"layout {where}: grouped takes [attn.q, attn.k, attn.v]")
    if not all(entry.slots) or len(set(entry.slots)) < len(entry.slots):
        raise LayoutError(f"layout {where}: an empty slot, or one that is given twice")
    return entry


@lru_cache(maxsize=1)
def _tables() -> dict[str, Any]:
    return read_mapping(Path(__file__).parent / "components.yaml")


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

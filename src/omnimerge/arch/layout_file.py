"""Layouts as YAML files: read, checked, and refused with the key that is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omnimerge.arch.family import BRANCHES, COMPONENTS, Entry, Layout, split_branch
from omnimerge.checkpoint.yaml_file import read_mapping
from omnimerge.errors import LayoutError, suggestion


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

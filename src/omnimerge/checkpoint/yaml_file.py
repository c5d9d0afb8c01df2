"""YAML files that hold keys, none of them twice."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

# Far more than what people write; the parser takes some seconds for it.
_MOST_BYTES = 200_000
_MOST_NODES = 100_000
_LONGEST_NUMBER = 100
_DEEPEST = 50  # brackets


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds keys.

    Args:
        path: the file.

    Returns:
        The mapping.

    Raises:
        ValueError: if it cannot be read, holds a key twice, repeats itself endlessly by aliases, or
            holds something else; the message says why, without the path.
    """
    try:
        raw = _load(_read(path))
    except OSError as error:
        raise ValueError(str(error.strerror)) from error
    except _NOT_YAML as error:
        raise ValueError(" ".join(str(error).split())) from error
    if not isinstance(raw, dict):
        raise ValueError("it holds no keys")
    return raw


# PyYAML lets errors of its converters through, such as a date with a thirteenth month.
_NOT_YAML = (
    yaml.YAMLError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    RecursionError,
    OverflowError,
)


def _read(path: Path) -> str:
    """The text, of a sane size; a recipe may come through a pipe."""
    with path.open("rb") as stream:
        large = os.fstat(stream.fileno()).st_size > _MOST_BYTES  # nothing to a sparse file
        raw = b"" if large else stream.read(_MOST_BYTES + 1)
    if large or len(raw) > _MOST_BYTES:
        raise ValueError(f"it has more than {_MOST_BYTES:,} bytes")
    return raw.decode("utf-8")


def _load(text: str) -> Any:
    loader = _StrictLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _written_out(node, {})
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _written_out(node: yaml.Node, seen: dict[int, int | None]) -> int:
    """How many nodes a document has where every alias is replaced by what it stands for."""
    known = seen.get(id(node), 0)
    if known is None:
        raise ValueError(f"line {node.start_mark.line + 1} is an alias of what it is in")
    if known:
        return known
    seen[id(node)] = None
    count = 1
    for child in node.value if isinstance(node, yaml.CollectionNode) else ():
        for each in child if isinstance(child, tuple) else (child,):
            count += _written_out(each, seen)
    if count > _MOST_NODES:
        raise ValueError(f"it has more than {_MOST_NODES:,} values where aliases are written out")
    seen[id(node)] = count
    return count


class _StrictLoader(yaml.SafeLoader):
    """A SafeLoader that refuses a key that is given twice, and numbers that nobody writes."""

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:  # noqa: N803 - its name there
        if self.flow_level >= _DEEPEST:  # the scanner takes seconds for some thousand brackets
            raise yaml.YAMLError(f"line {self.line + 1} nests too deeply")
        super().fetch_flow_collection_start(TokenClass)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                line = node.start_mark.line + 1
                raise yaml.YAMLError(f"the key {key!r} is given twice in the block at line {line}")
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        number = node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
        if number and len(node.value) > _LONGEST_NUMBER:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1} holds a number that is too long")
        if not isinstance(node.value, str) or node.value.isascii() or _is_whole(node.value):
            return super().construct_scalar(node)
        raise yaml.YAMLError(f"line {node.start_mark.line + 1} holds half a character")


def _is_whole(text: str) -> bool:
    """Whether a text can be written as UTF-8; an escape can spell half a character."""
    return not re.search("[\ud800-\udfff]", text)

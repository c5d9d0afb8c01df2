"""YAML files that hold keys, none of them twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds keys.

    Args:
        path: the file.

    Returns:
        The mapping.

    Raises:
        ValueError: if it cannot be read, holds a key twice, or holds something else; the message
            says why, without the path.
    """
    try:
        text = path.read_text(encoding="utf-8")
        raw = yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506 - a SafeLoader
    except OSError as error:
        raise ValueError(str(error.strerror)) from error
    except _NOT_YAML as error:
        raise ValueError(" ".join(str(error).split())) from error
    if not isinstance(raw, dict):
        raise ValueError("it holds no keys")
    return raw


# PyYAML lets errors of its converters through, such as a date with a thirteenth month.
_NOT_YAML = (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError, RecursionError)


class _UniqueKeyLoader(yaml.SafeLoader):
    """A SafeLoader that refuses a key that is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                line = node.start_mark.line + 1
                raise yaml.YAMLError(f"the key {key!r} is given twice in the block at line {line}")
        return super().construct_mapping(node, deep)

"""The lines of the benchmark, by name; each is imported when it is asked for."""

from __future__ import annotations

from importlib import import_module

from omnimerge.bench.line import BenchError, Line
from omnimerge.errors import suggestion

_HOMES = {
    "internvl": ("omnimerge.bench.capabilities.line", "INTERNVL"),
    "qwen2vl": ("omnimerge.bench.capabilities.line", "QWEN2VL"),
    "modality": ("omnimerge.bench.modalities.line", "LINE"),
}


def names() -> list[str]:
    """List the lines.

    Returns:
        What `get` takes.
    """
    return list(_HOMES)


def get(name: str) -> Line:
    """Return a line.

    Args:
        name: one of `names`.

    Returns:
        The line.

    Raises:
        BenchError: if there is none of that name.
    """
    if name not in _HOMES:
        known = ", ".join(_HOMES)
        raise BenchError(f"unknown line {name!r}{suggestion(name, _HOMES)}; known: {known}")
    module, attribute = _HOMES[name]
    line: Line = getattr(import_module(module), attribute)
    return line

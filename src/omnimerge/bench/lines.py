"""The lines of the benchmark, by name; each is imported when it is asked for."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from omnimerge.bench import results
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


def built(folder: Path) -> Line:
    """Return the line that a folder was built for.

    Args:
        folder: of one seed.

    Returns:
        The line.

    Raises:
        BenchError: if there is no complete build.
    """
    file = folder / results.BUILD_NAME
    if not file.is_file():
        raise BenchError(
            f"{folder} is no built seed of a line (it has no {results.BUILD_NAME}); "
            "`omnimerge bench build` makes one"
        )
    return get(results.read(results.Build, file).line)

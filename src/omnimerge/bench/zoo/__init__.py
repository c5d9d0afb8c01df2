"""The shipped miniatures: names, folders, and how to train them again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from omnimerge.errors import CheckpointError, suggestion

_WEIGHTS = Path(__file__).parent / "weights"

_ABOUT = {
    "mini-llm": "Qwen2; answers seven kinds of question about scenes told in words",
    "mini-qwen2-vl": "Qwen2-VL over mini-llm; sees scenes; knows three kinds more (target)",
    "mini-llava-onevision": "LLaVA-OneVision over mini-llm; sees scenes; three other ones (donor)",
}


def names() -> list[str]:
    """List the miniatures.

    Returns:
        The names that `path` and `describe` take.
    """
    return list(_ABOUT)


def path(name: str) -> Path:
    """Return the folder of a shipped checkpoint.

    Args:
        name: One of `names`.

    Returns:
        A folder in the layout of published checkpoints.
    """
    return _WEIGHTS / _known(name)


def describe(name: str) -> str:
    """Say in one line what a miniature is.

    Args:
        name: One of `names`.

    Returns:
        One line, without the name.
    """
    return _ABOUT[_known(name)]


def build(
    folder: Path, *, seed: int = 0, on_progress: Callable[[str], None] | None = None
) -> list[Path]:
    """Train the miniatures again; see `omnimerge.bench.zoo.training.build`.

    Args:
        folder: Where the checkpoints go, one folder each.
        seed: The shipped ones have seed 0.
        on_progress: Told how far it is.

    Returns:
        The folders written.
    """
    from omnimerge.bench.zoo import training  # torch and transformers, only where they are needed

    return training.build(folder, seed=seed, on_progress=on_progress)


def _known(name: str) -> str:
    if name not in _ABOUT:
        raise CheckpointError(
            f"unknown miniature {name!r}{suggestion(name, _ABOUT)}; known: {', '.join(_ABOUT)}"
        )
    return name

"""Weights of miniatures on disk, under the names that their families publish."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Patterns = Sequence[tuple[str, str]]
"""Regular expressions on names in memory, and what takes their place; the first to fit counts."""


def published_name(key: str, patterns: Patterns) -> str:
    """Translate a tensor's name in memory to its name in the published layout.

    Args:
        key: the name in ``state_dict()``.
        patterns: of the layout.

    Returns:
        The name on disk.
    """
    for pattern, replacement in patterns:
        key, changed = re.subn(pattern, replacement, key)
        if changed:
            break
    return key


def save_weights(model: Any, folder: Path, patterns: Patterns, dtype: torch.dtype) -> None:
    """Write ``model.safetensors``.

    Args:
        model: a model of transformers.
        folder: where to.
        patterns: of the published layout.
        dtype: of the tensors on disk.
    """
    tensors = {
        published_name(key, patterns): value.detach().to(dtype).contiguous()
        for key, value in model.state_dict().items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

"""Model and prompts to responses.

Names are imported when they are used: importing this package loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omnimerge.generate.generator import Generator
    from omnimerge.generate.prompts import Prompt, read_prompts, sample, without_answers
    from omnimerge.generate.response import Response

__all__ = ["Generator", "Prompt", "Response", "read_prompts", "sample", "without_answers"]

_HOME = {
    "Generator": "omnimerge.generate.generator",
    "Prompt": "omnimerge.generate.prompts",
    "Response": "omnimerge.generate.response",
    "read_prompts": "omnimerge.generate.prompts",
    "sample": "omnimerge.generate.prompts",
    "without_answers": "omnimerge.generate.prompts",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])

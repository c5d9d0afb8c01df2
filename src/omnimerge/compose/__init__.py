"""Several multimodal LLMs over one LLM become one model that sees, hears and reads.

`compose(recipe, out)` writes it; `OmniConfig`, `OmniForConditionalGeneration` and `OmniProcessor`
are what transformers loads it with, under its auto classes, once `omnimerge` is imported.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omnimerge.compose.plan import ComposePlan

__all__ = [
    "ComposePlan",
    "ComposeRecipe",
    "OmniConfig",
    "OmniForConditionalGeneration",
    "OmniModel",
    "OmniProcessor",
    "build_plan",
    "compose",
    "load_recipe",
]

_HOME = {
    "ComposePlan": "plan",
    "ComposeRecipe": "recipe",
    "OmniConfig": "configuration",
    "OmniForConditionalGeneration": "modeling",
    "OmniModel": "modeling",
    "OmniProcessor": "processing",
    "build_plan": "plan",
    "compose": "write",
    "load_recipe": "recipe",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])


class _CallableRoom(ModuleType):
    """Makes the room callable: the public API has a function of the same name."""

    def __call__(self, *args: Any, **keywords: Any) -> ComposePlan:
        """Run `omnimerge.compose.compose`."""
        plan: ComposePlan = self.compose(*args, **keywords)
        return plan


sys.modules[__name__].__class__ = _CallableRoom

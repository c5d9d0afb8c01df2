"""Recipe to plan to streamed execution."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from omnimerge.engine.loading import load_recipe
from omnimerge.engine.plan import MergePlan, TensorJob
from omnimerge.engine.planning import build_plan, with_parameters
from omnimerge.engine.recipe import Recipe

if TYPE_CHECKING:
    from omnimerge.engine.execute import executor_named, merged_tensors, run_plan
    from omnimerge.engine.parents import Parents

__all__ = [
    "MergePlan",
    "Parents",
    "Recipe",
    "TensorJob",
    "build_plan",
    "executor_named",
    "load_recipe",
    "merged_tensors",
    "run_plan",
    "with_parameters",
]


def __getattr__(name: str) -> Any:
    """Import what needs torch only when it is asked for."""
    if name in ("executor_named", "merged_tensors", "run_plan"):
        from omnimerge.engine import execute

        return getattr(execute, name)
    if name == "Parents":
        from omnimerge.engine.parents import Parents

        return Parents
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

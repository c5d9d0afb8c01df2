"""The findings of the OptMerge paper, repeated on the miniature lines: one file per finding."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from omnimerge.bench.line import BenchError
from omnimerge.errors import suggestion

_HOMES = {
    "norm-growth": "norm_growth",
    "ablation": "ablation",
    "rank-ratio": "rank_ratio",
    "distributions": "distributions",
    "overtraining": "overtraining",
}
RECIPE_ONLY = ("norm-growth", "distributions")
"""Experiments that look at weights alone: any recipe with a base does."""


def names() -> list[str]:
    """List the experiments.

    Returns:
        What `get` takes.
    """
    return list(_HOMES)


def get(name: str) -> ModuleType:
    """Return the module of an experiment: its `NAME`, `ABOUT`, `run` and `outcome`.

    Args:
        name: one of `names`.

    Returns:
        The module.

    Raises:
        BenchError: if there is none of that name.
    """
    if name not in _HOMES:
        known = ", ".join(_HOMES)
        raise BenchError(f"unknown experiment {name!r}{suggestion(name, _HOMES)}; known: {known}")
    return import_module(f"omnimerge.bench.experiments.{_HOMES[name]}")

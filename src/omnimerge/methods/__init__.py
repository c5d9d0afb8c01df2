"""Merge methods: one pure function on tensors per file, one file per paper.

To add one, copy `linear.py`, register it with `@merge_method`, import it below, and give it a
hand-worked example in ``tests/methods/test_<name>.py``. The contract tests, the recipe schema, the
command line and the docs pick it up by themselves. The package can be called:
``omnimerge.methods()`` is ``omnimerge.methods.all_methods()``.
"""

import sys
from collections.abc import Mapping
from types import ModuleType

from omnimerge.methods._registry import (
    MergeMethod,
    Param,
    Range,
    all_methods,
    get_method,
    merge_tensors,
)
from omnimerge.methods.adamms import adamms
from omnimerge.methods.average import average
from omnimerge.methods.iso import iso_c, iso_cts
from omnimerge.methods.linear import linear
from omnimerge.methods.optmerge import optmerge
from omnimerge.methods.task_arithmetic import task_arithmetic
from omnimerge.methods.tsv import tsv
from omnimerge.methods.wudi import wudi

__all__ = [
    "MergeMethod",
    "Param",
    "Range",
    "adamms",
    "all_methods",
    "average",
    "get_method",
    "iso_c",
    "iso_cts",
    "linear",
    "merge_tensors",
    "optmerge",
    "task_arithmetic",
    "tsv",
    "wudi",
]


class _CallableRoom(ModuleType):
    """Makes the room callable: the public API has a function of the same name."""

    def __call__(self) -> Mapping[str, MergeMethod]:
        """Return every registered method by name."""
        return all_methods()


sys.modules[__name__].__class__ = _CallableRoom

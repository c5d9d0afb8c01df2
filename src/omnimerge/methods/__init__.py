"""Merge methods: one pure function on tensors per file, one file per paper.

To add one, copy `linear.py`, register it with `@merge_method`, import it below, and give it a
hand-worked example in ``tests/methods/test_<name>.py``. The contract tests, the recipe schema, the
command line and the docs pick it up by themselves. The package can be called:
``omnimerge.methods()`` is ``omnimerge.methods.all_methods()``.
"""

import sys
from collections.abc import Mapping
from types import ModuleType

from omnimerge.methods._in_memory import merge_state_dicts, merge_tensors
from omnimerge.methods._low_rank import LowRank, added, truncate
from omnimerge.methods._ops import depth_factor, scaled_by_depth
from omnimerge.methods._params import Param, Range
from omnimerge.methods._registry import MergeMethod, Place, all_methods, get_method
from omnimerge.methods._statistics import Statistics, gather
from omnimerge.methods.adamms import adamms
from omnimerge.methods.arcee_fusion import arcee_fusion
from omnimerge.methods.average import average
from omnimerge.methods.breadcrumbs import breadcrumbs, breadcrumbs_ties
from omnimerge.methods.consensus import consensus_ta, consensus_ties
from omnimerge.methods.dare import dare_linear, dare_ties, drop_linear
from omnimerge.methods.della import della, della_linear
from omnimerge.methods.iso import iso_c, iso_cts
from omnimerge.methods.karcher import karcher, multislerp
from omnimerge.methods.knots import knots
from omnimerge.methods.linear import linear
from omnimerge.methods.lines import lines
from omnimerge.methods.metagpt import metagpt
from omnimerge.methods.model_stock import model_stock
from omnimerge.methods.nearswap import nearswap
from omnimerge.methods.optmerge import optmerge
from omnimerge.methods.passthrough import passthrough
from omnimerge.methods.pcb import pcb
from omnimerge.methods.robustmerge import robustmerge
from omnimerge.methods.sce import sce
from omnimerge.methods.slerp import nuslerp, slerp
from omnimerge.methods.swudi import aswudi, swudi
from omnimerge.methods.task_arithmetic import task_arithmetic
from omnimerge.methods.ties import ties
from omnimerge.methods.tsv import tsv
from omnimerge.methods.wudi import wudi

__all__ = [
    "LowRank",
    "MergeMethod",
    "Param",
    "Place",
    "Range",
    "Statistics",
    "adamms",
    "added",
    "all_methods",
    "arcee_fusion",
    "aswudi",
    "average",
    "breadcrumbs",
    "breadcrumbs_ties",
    "consensus_ta",
    "consensus_ties",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "depth_factor",
    "drop_linear",
    "gather",
    "get_method",
    "iso_c",
    "iso_cts",
    "karcher",
    "knots",
    "linear",
    "lines",
    "merge_state_dicts",
    "merge_tensors",
    "metagpt",
    "model_stock",
    "multislerp",
    "nearswap",
    "nuslerp",
    "optmerge",
    "passthrough",
    "pcb",
    "robustmerge",
    "scaled_by_depth",
    "sce",
    "slerp",
    "swudi",
    "task_arithmetic",
    "ties",
    "truncate",
    "tsv",
    "wudi",
]


class _CallableRoom(ModuleType):
    """Makes the room callable: the public API has a function of the same name."""

    def __call__(self) -> Mapping[str, MergeMethod]:
        """Return every registered method by name."""
        return all_methods()


sys.modules[__name__].__class__ = _CallableRoom

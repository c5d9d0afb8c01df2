"""Tensor names to slots, and slots to an alignment between two checkpoints."""

from omnimerge.arch.align import SELECTIONS, VOCABULARIES, align
from omnimerge.arch.alignment import GATES, Alignment, Merged
from omnimerge.arch.ancestor import Ancestor
from omnimerge.arch.detect import memory_names, slots_of
from omnimerge.arch.family import COMPONENTS, Layout
from omnimerge.arch.geometry import Geometry, geometry
from omnimerge.arch.inference import Inferred, infer_layout, layout_text, slots_of_all
from omnimerge.arch.layout import (
    SlotMap,
    check_used,
    component,
    find_names,
    layer_index,
    layouts,
    read_all_layouts,
    slot_map,
)
from omnimerge.arch.layout_file import read_layouts
from omnimerge.arch.summary import summarize

__all__ = [
    "COMPONENTS",
    "GATES",
    "SELECTIONS",
    "VOCABULARIES",
    "Alignment",
    "Ancestor",
    "Geometry",
    "Inferred",
    "Layout",
    "Merged",
    "SlotMap",
    "align",
    "check_used",
    "component",
    "find_names",
    "geometry",
    "infer_layout",
    "layer_index",
    "layout_text",
    "layouts",
    "memory_names",
    "read_all_layouts",
    "read_layouts",
    "slot_map",
    "slots_of",
    "slots_of_all",
    "summarize",
]

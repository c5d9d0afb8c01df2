"""What a checkpoint is, from its headers alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omnimerge.arch.detect import slots_of
from omnimerge.arch.family import COMPONENTS, Layout
from omnimerge.arch.geometry import geometry
from omnimerge.arch.layout import component
from omnimerge.checkpoint import Checkpoint
from omnimerge.errors import LayoutError


def summarize(checkpoint: Checkpoint, extra: Sequence[Layout] = ()) -> dict[str, Any]:
    """Describe a checkpoint. Reads no tensor data.

    Args:
        checkpoint: the opened checkpoint.
        extra: layouts that the user gave.

    Returns:
        A JSON-ready mapping: `path`, `model_type`, `architectures`, `layout`, `note`, `components`
        (tensors, parameters and bytes of each), `llm` (its geometry), `dtypes` (tensors of each),
        `tensors`, `parameters`, `bytes`, `files`. `layout` and `llm` are None, and `note` says
        why, where no layout fits.
    """
    note, layout, llm = "", None, None
    by_name = {name: f"other.{name}" for name in checkpoint.tensors}
    try:
        slots = slots_of(checkpoint, extra)
    except LayoutError as error:
        note = str(error)
    else:
        by_name, layout = dict(slots.by_name), slots.layout.name
        llm = geometry(checkpoint, slots).to_dict()
    components = {name: {"tensors": 0, "parameters": 0, "bytes": 0} for name in COMPONENTS}
    dtypes: dict[str, int] = {}
    for name, meta in checkpoint.tensors.items():
        entry = components[component(by_name[name])]
        entry["tensors"] += 1
        entry["parameters"] += meta.numel
        entry["bytes"] += meta.nbytes
        dtypes[meta.dtype] = dtypes.get(meta.dtype, 0) + 1
    return {
        "path": checkpoint.location,
        "model_type": checkpoint.config.get("model_type"),
        "architectures": checkpoint.config.get("architectures"),
        "layout": layout,
        "note": note,
        "components": {name: entry for name, entry in components.items() if entry["tensors"]},
        "llm": llm,
        "dtypes": dtypes,
        "tensors": len(checkpoint.tensors),
        "parameters": sum(meta.numel for meta in checkpoint.tensors.values()),
        "bytes": checkpoint.total_bytes(),
        "files": [file.name for file in checkpoint.files],
    }

"""The layout of a checkpoint that no table knows, inferred for its user to review."""

from omnimerge.arch.inference.infer import Inferred, infer_layout, require_sure
from omnimerge.arch.inference.several import slots_of_all
from omnimerge.arch.inference.text import Choice, layout_text

__all__ = ["Choice", "Inferred", "infer_layout", "layout_text", "require_sure", "slots_of_all"]

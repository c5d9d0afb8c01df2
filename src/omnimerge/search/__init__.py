"""Coefficients to responses to a choice, without labels.

Names are imported when they are used: importing this package loads no torch. The package can be
called: ``omnimerge.search(recipe, prompts, out)`` is ``omnimerge.search.search(...)``.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omnimerge.search.criteria import CRITERIA, TIE_RULE, Selection, select
    from omnimerge.search.grid import parse_grid
    from omnimerge.search.labels import accuracy
    from omnimerge.search.result import SearchResult, read_result
    from omnimerge.search.run import search
    from omnimerge.search.study import Study

__all__ = [
    "CRITERIA",
    "TIE_RULE",
    "SearchResult",
    "Selection",
    "Study",
    "accuracy",
    "parse_grid",
    "read_result",
    "search",
    "select",
]

_HOME = {
    "CRITERIA": "criteria",
    "TIE_RULE": "criteria",
    "SearchResult": "result",
    "Selection": "criteria",
    "Study": "study",
    "accuracy": "labels",
    "parse_grid": "grid",
    "read_result": "result",
    "search": "run",
    "select": "criteria",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])


class _CallableRoom(ModuleType):
    """Makes the room callable: the public API has a function of the same name."""

    def __call__(self, *args: Any, **keywords: Any) -> SearchResult:
        """Run `omnimerge.search.search`."""
        result: SearchResult = self.search(*args, **keywords)
        return result


sys.modules[__name__].__class__ = _CallableRoom

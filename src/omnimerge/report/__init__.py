"""Result files to HTML pages and model cards. Reads what other rooms wrote, nothing else.

Names are imported when they are used: a merge needs the card, and nothing that plots.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omnimerge.report.card import render_card, write_card
    from omnimerge.report.search import write_search_report

__all__ = ["render_card", "write_card", "write_search_report"]

_HOME = {"render_card": "card", "write_card": "card", "write_search_report": "search"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)

"""Result files to HTML pages and model cards. Reads what other rooms wrote, nothing else.

Names are imported when they are used: a merge needs the card, and nothing that plots.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omnimerge.report.card import render_card, write_card
    from omnimerge.report.dashboard import write_dashboard
    from omnimerge.report.mapping import component_rows, slot_rows, write_mapping_report
    from omnimerge.report.search import write_search_report

__all__ = [
    "component_rows",
    "render_card",
    "slot_rows",
    "write_card",
    "write_dashboard",
    "write_mapping_report",
    "write_search_report",
]

_HOME = {
    "component_rows": "mapping",
    "render_card": "card",
    "slot_rows": "mapping",
    "write_card": "card",
    "write_dashboard": "dashboard",
    "write_mapping_report": "mapping",
    "write_search_report": "search",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)

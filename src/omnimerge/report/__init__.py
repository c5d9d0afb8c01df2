"""Result files to HTML pages and model cards. Reads what other rooms wrote, nothing else."""

from omnimerge.report.card import render_card, write_card
from omnimerge.report.search import write_search_report

__all__ = ["render_card", "write_card", "write_search_report"]

"""Result files to Markdown, HTML and model cards. Reads what other rooms wrote, nothing else."""

from omnimerge.report.card import render_card, write_card

__all__ = ["render_card", "write_card"]

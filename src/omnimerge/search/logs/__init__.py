"""Answers that a harness logged: lmms-eval, VLMEvalKit, or JSON lines; labels are never looked at.

Nothing but files is read, and nothing but the standard library is loaded (openpyxl for ``.xlsx``).
Answers are joined on their ids, never on the order of lines.
"""

from __future__ import annotations

from pathlib import Path

from omnimerge.search.logs.find import find_logs, parse_alpha
from omnimerge.search.logs.folder import open_log
from omnimerge.search.logs.join import Joined, join
from omnimerge.search.logs.log import Log

__all__ = ["Joined", "Log", "find_logs", "join", "open_log", "parse_alpha", "read_log"]


def read_log(path: str | Path) -> dict[str, str]:
    """Read the answers that a harness logged.

    Args:
        path: a file, or a folder that holds one run of lmms-eval.

    Returns:
        Id -> answer, in the order of the file.

    Raises:
        SearchError: if it cannot be read, or is no log of answers.
    """
    return dict(open_log(path).answers)

"""The long campaigns: `make soak`, or a test of the marker `soak` with OMNIMERGE_SOAK=1.

How long they are is in OMNIMERGE_KILLS, OMNIMERGE_FAULTS and OMNIMERGE_MINUTES (of fuzzing), and
where their results go in OMNIMERGE_RESULTS.
"""

import os
from pathlib import Path

import pytest

_MARKS = (
    pytest.mark.soak,
    pytest.mark.skipif(
        os.environ.get("OMNIMERGE_SOAK") != "1", reason="takes hours: set OMNIMERGE_SOAK=1"
    ),
)
_RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def campaign(test):
    """Mark a test as one."""
    for mark in _MARKS:
        test = mark(test)
    return test


def short_and_long(quick: int, name: str):
    """Parameters of a test: a number of cases, and whether it is the campaign."""
    many = int(os.environ.get(name, "2000"))
    return [
        pytest.param(quick, False, id="quick"),
        pytest.param(many, True, id="soak", marks=_MARKS),
    ]


def results(name: str) -> Path:
    """Where a campaign writes what it found."""
    folder = Path(os.environ.get("OMNIMERGE_RESULTS", _RESULTS))
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name

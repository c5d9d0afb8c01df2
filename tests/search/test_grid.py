"""Grids, in decimals."""

import pytest

from omnimerge.errors import SearchError
from omnimerge.search import parse_grid
from omnimerge.search.grid import point_name


def test_ranges_include_both_ends_and_are_exact():
    assert parse_grid("0:0.6:0.1") == (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    assert parse_grid("0:0.2:0.05") == (0.0, 0.05, 0.1, 0.15, 0.2)
    assert parse_grid(" 0.5 : 1 : 0.25 ") == (0.5, 0.75, 1.0)


def test_lists():
    assert parse_grid("0, 0.05,0.1") == (0.0, 0.05, 0.1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0:0.5:0.2", "write 0:0.4:0.2 or 0:0.6:0.2"),
        ("0:0.6", "is not start:stop:step"),
        ("0:1:0.1:2", "is not start:stop:step"),
        ("0.6:0:0.1", "does not run upwards"),
        ("0:0.6:-0.1", "does not run upwards"),
        ("0:0.6:0", "does not run upwards"),
        ("0:1:0.0001", "more than 1000 points"),
        ("0,0.2,0.1", "not strictly increasing"),
        ("0,0.1,0.10", "not strictly increasing"),
        ("0.1,0.10000000000000000001,0.2", "not strictly increasing"),
        ("0.3", "has one point"),
        ("0,a", "'a' is no number"),
        ("0:inf:0.1", "'inf' is no number"),
        ("", "'' is no number"),
    ],
)
def test_mistakes(text, message):
    with pytest.raises(SearchError) as error:
        parse_grid(text)
    assert message in str(error.value)
    assert repr(text) in str(error.value)


def test_names_tell_points_apart():
    assert [point_name(p) for p in (0.0, 0.3, 0.05, 0.125, 1.0)] == [
        "0.00", "0.30", "0.05", "0.125", "1.00",
    ]  # fmt: skip

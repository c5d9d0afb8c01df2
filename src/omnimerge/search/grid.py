"""Grids of coefficients, in decimal arithmetic: the third point of 0:0.6:0.1 is 0.2, exactly."""

from __future__ import annotations

import itertools
from decimal import Decimal, DecimalException, InvalidOperation

from omnimerge.errors import SearchError

_MOST = 1000


def parse_grid(text: str) -> tuple[float, ...]:
    """Return the points of a grid.

    Args:
        text: ``start:stop:step`` with both ends included, such as ``0:0.6:0.1``, or a list of
            increasing numbers, such as ``0,0.05,0.1``.

    Returns:
        The points, strictly increasing; each is the float nearest to its decimal.

    Raises:
        SearchError: if the text is no grid, a range does not end at its stop, or there are no two
            points or more than 1000.
    """
    try:
        points = _range(text) if ":" in text else [_number(part, text) for part in text.split(",")]
    except DecimalException:
        raise SearchError(f"grid {text!r} is out of range; write for example 0:0.6:0.1") from None
    found = tuple(float(point) for point in points)
    if any(a >= b for a, b in itertools.pairwise(found)):
        raise SearchError(f"grid {text!r} is not strictly increasing; sort it, without doubles")
    if len(found) < 2:
        raise SearchError(f"grid {text!r} has one point; a search compares several")
    return found


def point_name(point: float) -> str:
    """Return a point as text, with at least two decimals: 0.3 -> ``0.30``, 0.125 -> ``0.125``.

    Args:
        point: a grid point.

    Returns:
        Text that tells any two points apart.
    """
    short = f"{point:.2f}"
    return short if float(short) == point else repr(float(point))


def _range(text: str) -> list[Decimal]:
    parts = [_number(part, text) for part in text.split(":")]
    if len(parts) != 3:
        raise SearchError(f"grid {text!r} is not start:stop:step; write for example 0:0.6:0.1")
    start, stop, step = parts
    if step <= 0 or stop <= start:
        raise SearchError(f"grid {text!r} does not run upwards; write for example 0:0.6:0.1")
    if (stop - start) / step > _MOST:
        raise SearchError(f"grid {text!r} has more than {_MOST} points; use a larger step")
    steps = int((stop - start) / step)
    if start + steps * step != stop:
        below = start + steps * step
        raise SearchError(
            f"grid {text!r} does not reach {stop} in steps of {step}; write {start}:{below}:{step} "
            f"or {start}:{below + step}:{step}"
        )
    return [start + i * step for i in range(steps + 1)]


def _number(part: str, text: str) -> Decimal:
    try:
        number = Decimal(part.strip())
    except InvalidOperation:
        number = Decimal("nan")
    if not number.is_finite():
        raise SearchError(
            f"grid {text!r}: {part.strip()!r} is no number; write start:stop:step or a comma list"
        )
    return number

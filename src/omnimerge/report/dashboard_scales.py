"""Numbers as text, and as places on an axis."""

from __future__ import annotations

import math
from collections.abc import Callable

MINUS = "\N{MINUS SIGN}"
_TICK_ROOM = 36.0


def fixed(value: float | None, digits: int, unit: str = "") -> str:
    """Write a number with a fixed number of decimals.

    Args:
        value: the number, or None.
        digits: behind the decimal point.
        unit: to put behind it.

    Returns:
        Text, such as ``1,234.5`` or ``−0.25``; a dash for None.
    """
    if value is None:
        return "–"
    text = f"{value:,.{digits}f}"
    text = text if text.strip("-0.,") else text.lstrip("-")  # no minus before a zero
    return text.replace("-", MINUS) + (f"\N{NO-BREAK SPACE}{unit}" if unit else "")


def significant(value: float | None, digits: int = 4) -> str:
    """Write a number with a number of significant digits.

    Args:
        value: the number, or None.
        digits: significant ones.

    Returns:
        Text; a dash for None.
    """
    if value is None:
        return "–"
    if 1e4 <= abs(value) < 1e7:
        return f"{value:,.0f}".replace("-", MINUS)
    return f"{value:.{digits}g}".replace("e-0", "e-").replace("e+0", "e").replace("-", MINUS)


def with_deviation(
    value: float | None, deviation: float | None, digits: int, unit: str = ""
) -> str:
    """Write a number with its deviation.

    Args:
        value: the number, or None.
        deviation: ± of it, or None.
        digits: behind the decimal point.
        unit: to put behind both.

    Returns:
        Text, such as ``61.2 ± 0.4``.
    """
    if value is None or deviation is None:
        return fixed(value, digits, unit)
    return f"{fixed(value, digits)}\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}" + fixed(
        deviation, digits, unit
    )


Scale = Callable[[float], float]


def linear(low: float, high: float, start: float, stop: float) -> Scale:
    """Return a linear axis.

    Args:
        low: value at its start.
        high: value at its end.
        start: place of its start.
        stop: place of its end.

    Returns:
        Value -> place.
    """
    return lambda value: start + (value - low) / (high - low) * (stop - start)


def logarithmic(low: float, high: float, start: float, stop: float) -> Scale:
    """Return a logarithmic axis.

    Args:
        low: value at its start, above 0.
        high: value at its end.
        start: place of its start.
        stop: place of its end.

    Returns:
        Value -> place.
    """
    scale = linear(math.log10(low), math.log10(high), start, stop)
    return lambda value: scale(math.log10(value))


def with_zero(above: Scale, zero: float) -> Scale:
    """Return an axis that has a place for zero.

    Args:
        above: the axis for what is above zero.
        zero: place of the rest.

    Returns:
        Value -> place.
    """
    return lambda value: above(value) if value > 0 else zero


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """Return round numbers for a logarithmic axis.

    Args:
        low: the smallest value, above 0.
        high: the largest value.
        most: how many at most.

    Returns:
        Powers of ten, with 2 and 5 times them where there are few.
    """
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    powers = range(first, last + 1)
    if len(powers) > 3:
        step = math.ceil(len(powers) / most)
        return [float(f"1e{p}") for p in powers if (p - first) % step == 0]
    ticks = [float(f"{factor}e{p}") for p in powers for factor in (1, 2, 5)]
    below = [tick for tick in ticks if tick <= low * (1 + 1e-9)]
    above = [tick for tick in ticks if tick >= high * (1 - 1e-9)]
    return [t for t in ticks if below[-1] <= t <= above[0]]


def thinned(ticks: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """Leave out ticks whose texts run into the one before.

    Args:
        ticks: (place, text), increasing.

    Returns:
        The others.
    """
    kept: list[tuple[float, str]] = []
    for x, text in ticks:
        if not kept or x - kept[-1][0] >= max(_TICK_ROOM, 7.5 * len(text)):
            kept.append((x, text))
    return kept

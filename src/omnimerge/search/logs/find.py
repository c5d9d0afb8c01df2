"""Which log is of which coefficient."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from pathlib import Path

from omnimerge.errors import SearchError

_ALPHA = "{alpha}"
_NUMBER = r"-?\d+(?:\.\d+)?(?:e-?\d+)?"
# Beside a star a number is whole, neither its front nor its end cut off: 1.5 in a name is never 5,
# and 5e-07 never 07. A minus is a sign where no letter or digit is before it: merged-0.1 is at 0.1.
_NOT_BEFORE = r"(?:(?<![^\W_])(?=-)|(?<!\d)(?<!\d\.)(?<!\de)(?<!\de-)(?<!^-)(?<![\W_]-)(?=\d))"
_NOT_AFTER = r"(?!\.?\d)(?!e-?\d)"


def parse_alpha(text: str) -> Decimal:
    """Return a coefficient.

    Args:
        text: a decimal number.

    Returns:
        The value of the nearest float, exactly as it is written: 0.10 is 0.1.

    Raises:
        SearchError: if it is no number.
    """
    try:
        number = Decimal(repr(float(Decimal(text.strip())))) + 0  # -0 is 0
    except (InvalidOperation, OverflowError):
        number = Decimal("nan")
    if not number.is_finite():
        raise SearchError(f"{text!r} is no coefficient; write for example --log 0.1=PATH")
    return number


def find_logs(folder: Path, pattern: str) -> dict[Decimal, Path]:
    """Find the logs whose place in a folder fits a pattern.

    Args:
        folder: where to look.
        pattern: a path inside the folder, with ``{alpha}`` for the coefficient, ``*`` for anything
            but a slash, and ``**/`` for any folders. If ``{alpha}`` stands twice, both are the
            same text.

    Returns:
        Coefficient -> file or folder, increasing.

    Raises:
        SearchError: if the pattern has no ``{alpha}``, nothing fits, a name fits in two ways, or
            two names are of one coefficient.
    """
    if _ALPHA not in pattern or Path(pattern).is_absolute():
        raise SearchError(
            f"pattern {pattern!r}: write a path inside --logs with {{alpha}} where the coefficient "
            "stands, for example '*{alpha}*/*_samples_mme.jsonl'"
        )
    if not folder.is_dir():
        raise SearchError(f"{folder} is no folder; give --logs the folder that the logs are in")
    found: dict[Decimal, Path] = {}
    for path in _candidates(folder, pattern):
        alpha = _alpha_in(path.relative_to(folder).as_posix(), pattern)
        if alpha is None:
            continue
        other = found.setdefault(alpha, path)
        if other != path:
            raise SearchError(
                f"pattern {pattern!r} fits {other.relative_to(folder)} and "
                f"{path.relative_to(folder)} at {alpha}; write more of the name, or let it fit "
                "their folder, of which the newest run is taken"
            )
    if not found:
        there = ", ".join(sorted(entry.name for entry in folder.iterdir())[:4]) or "nothing"
        raise SearchError(f"nothing in {folder} fits {pattern!r}; it holds {there}")
    return dict(sorted(found.items()))


def _candidates(folder: Path, pattern: str) -> list[Path]:
    """What may fit, each file once although a link leads to it too."""
    literal = re.sub(r"[\[?]", lambda special: f"[{special[0]}]", pattern)
    parts = [
        part if part == "**" else re.sub(r"\*+", "*", part.replace(_ALPHA, "*"))
        for part in literal.split("/")
    ]
    places: dict[Path, Path] = {}
    for path in sorted(folder.glob("/".join(parts))):
        if not path.name.startswith((".", "~$")):
            places.setdefault(path.resolve(), path)
    return sorted(places.values())


def _alpha_in(name: str, pattern: str) -> Decimal | None:
    """The coefficient in a name; None if it does not fit after all."""
    ways = sorted({way for few in ("", "?") if (way := _match(name, pattern, few)) is not None})
    if len(ways) > 1:
        raise SearchError(
            f"pattern {pattern!r}: in {name} {{alpha}} may be {' or '.join(ways)}; "
            "write more of the name"
        )
    return parse_alpha(ways[0]) if ways else None


def _match(name: str, pattern: str, few: str) -> str | None:
    """The text of the coefficient, where stars take as much as they can, or as few (``"?"``)."""
    parts = [part for part in re.split(r"(\{alpha\}|\*\*/|\*)", pattern) if part]
    translated: list[str] = []
    for before, part, after in zip(["", *parts], parts, [*parts[1:], ""], strict=False):
        if part == _ALPHA:
            seen = _ALPHA in parts[: len(translated)]
            number = "(?P=alpha)" if seen else f"(?P<alpha>{_NUMBER})"
            front, end = _NOT_BEFORE * (before == "*"), _NOT_AFTER * (after == "*")
            translated.append(front + number + end)
        elif part == "**/":
            translated.append(f"(?:.*{few}/)?{few}")
        else:
            translated.append(f"[^/]*{few}" if part == "*" else re.escape(part))
    found = re.fullmatch("".join(translated), name)
    return found["alpha"] if found else None

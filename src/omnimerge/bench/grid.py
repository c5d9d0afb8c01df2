"""Which parameters each method is tried with, and why a method cannot be tried at all.

Methods are imported when they are asked for: importing this file loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from omnimerge.bench.line import BenchError
from omnimerge.errors import suggestion

SCALES = (0.1, 0.3, 0.5, 0.7, 1.0, 1.5)
"""As OptMerge searches λ, for all methods."""

PUBLISHED: dict[str, dict[str, Any]] = {
    "dare_linear": {"density": 0.8},
    "dare_ties": {"density": 0.8},
}
"""What OptMerge's comparison sets other than our defaults: DARE drops a fifth of the entries."""


def choose_methods(text: str) -> list[str]:
    """Read ``--methods``.

    Args:
        text: ``all``, or names with commas between them.

    Returns:
        Names of methods, each once.

    Raises:
        BenchError: if one is unknown.
    """
    from omnimerge.methods import all_methods

    known = all_methods()
    if text == "all":
        return list(known)
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            listed = ", ".join(known)
            raise BenchError(f"unknown method {name!r}{suggestion(name, known)}; known: {listed}")
    if not names:
        raise BenchError("no method is given; write `all`, or names with commas between them")
    return list(dict.fromkeys(names))


def read_scales(text: str) -> tuple[float, ...]:
    """Read ``--scales``.

    Args:
        text: numbers with commas between them.

    Returns:
        The numbers, increasing.

    Raises:
        BenchError: if one is no number above 0.
    """
    try:
        scales = sorted({float(part) for part in text.split(",")})
    except ValueError:
        raise BenchError(
            f"scales {text!r} are not numbers; write for example 0.3,0.5,1.0"
        ) from None
    if not all(0 < scale < float("inf") for scale in scales):
        raise BenchError(f"scales {text!r} must be above 0; write for example 0.3,0.5,1.0")
    return tuple(scales)


def swept(method: str) -> str | None:
    """Tell which keyword of a method is searched.

    Args:
        method: its name.

    Returns:
        ``scale``; for AdaMMS ``alpha``, the donors' share; None where there is neither.
    """
    from omnimerge.methods import get_method

    spec = get_method(method)
    if spec.takes_target:
        return "alpha"
    return "scale" if any(param.name == "scale" for param in spec.params) else None


def points(method: str, scales: Sequence[float]) -> list[dict[str, Any]]:
    """List the parameters that a method is tried with.

    Args:
        method: its name.
        scales: the values of the keyword that is searched; those above 1 are left out for a share.

    Returns:
        One mapping per point; one point where nothing is searched.
    """
    fixed = PUBLISHED.get(method, {})
    keyword = swept(method)
    if keyword is None:
        return [dict(fixed)]
    usable = [value for value in scales if keyword == "scale" or value <= 1]
    return [{**fixed, keyword: value} for value in usable]


def refusal(method: str, recipe: Mapping[str, Any]) -> str | None:
    """Say why a method cannot merge the experts of a line.

    Args:
        method: its name.
        recipe: a recipe of the line.

    Returns:
        The reason; None if it can.
    """
    from omnimerge.methods import get_method

    spec = get_method(method)
    entries = recipe["models"]
    count = len(entries) + spec.takes_target
    low, high = spec.models
    if high is not None and count > high:
        noun = "model" if high == 1 else "models"
        return f"merges {high} {noun}; there are {len(entries)} experts"
    if count < low:
        return f"needs at least {low} models; there are {len(entries)} experts"
    if spec.adapters_only and not all(_is_adapter(entry) for entry in entries):
        return "merges LoRA adapters only; these experts are fully fine-tuned"
    return None


def _is_adapter(entry: Any) -> bool:
    return isinstance(entry, Mapping) and "adapter" in entry

"""Where axes meet, each other or a recipe's own overrides, on the same tensors.

In a recipe the first override that fits a tensor wins. So where several are to hold, there is an
override for just those tensors, with the parameters of all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from pydantic import ValidationError

from omnimerge.arch import component, layer_index
from omnimerge.engine.recipe import Match
from omnimerge.errors import RecipeError, SearchError
from omnimerge.search.space import Entry, Space

if TYPE_CHECKING:
    from omnimerge.engine import MergePlan

Met = tuple[int | None, frozenset[int]]
"""The recipe's own override that is for a tensor, and the axes' matches that fit it."""


def entries_of(plan: MergePlan, space: Space) -> tuple[Entry, ...] | None:
    """Return the overrides of a space's points.

    Args:
        plan: the merge.
        space: its points.

    Returns:
        The overrides; None where no axis meets anything.

    Raises:
        SearchError: if two axes of one keyword meet, or no recipe can say what is wanted.
        RecipeError: if an axis is for no tensors.
    """
    axes = list(space.matches().values())
    matches = [_parsed(space, numbers[0]) for numbers in axes]
    own = plan.recipe.overrides
    merged = {job.output.name for job in plan.merged}
    places = {
        name: (name, slot, component(slot), layer_index(slot))
        for name, slot in plan.alignments[0].target_slots.by_name.items()
    }
    met: dict[Met, str] = {}
    for name, place in places.items():
        first = next((n for n, each in enumerate(own) if each.match.fits(*place)), None)
        if name in merged or (first is not None and own[first].keep):
            fits = frozenset(n for n, match in enumerate(matches) if match.fits(*place))
            met.setdefault((first, fits), name)
    _refuse_doubles(space, axes, met)
    if all(len(fits) < (2 if first is None else 1) for first, fits in met):
        return None
    entries: list[Entry] = []
    for first in (*range(len(own)), None):
        ours = None if first is None else own[first]
        known = {} if ours is None else ours.parameters
        if ours is None or not ours.keep:
            for fits in sorted((f for n, f in met if n == first and f), key=len, reverse=True):
                parts = [*([ours.match] if ours else []), *(matches[n] for n in sorted(fits))]
                numbers = sorted(number for n in fits for number in axes[n])
                entries.append(Entry(_all_of(parts, places.values()), tuple(numbers), known))
        if ours is not None:
            entries.append(Entry(_told(ours.match), (), known, keep=bool(ours.keep)))
    return tuple(entries)


def _parsed(space: Space, number: int) -> Match:
    axis = space.axes[number]
    try:
        return Match.model_validate(axis.match)
    except ValidationError as error:
        told = [each["msg"].removeprefix("Value error, ") for each in error.errors()]
        raise RecipeError([f"{axis.name}: {each}" for each in told], "the search") from None


def _refuse_doubles(space: Space, axes: Sequence[Sequence[int]], met: Mapping[Met, str]) -> None:
    for (_, fits), name in met.items():
        seen: dict[str, str] = {}
        for axis in (space.axes[number] for n in sorted(fits) for number in axes[n]):
            other = seen.setdefault(axis.keyword, axis.name)
            if other != axis.name:
                raise SearchError(
                    f"{other} and {axis.name} are both for some tensors, such as {name}; let "
                    "axes of one keyword be for different ones"
                )


def _all_of(
    matches: Sequence[Match], places: Iterable[tuple[str, str, str, int | None]]
) -> dict[str, str]:
    """A match that fits what all of several fit."""
    found: dict[str, str] = {}
    for match in matches:
        for key, value in _told(match).items():
            found[key] = value if found.get(key, value) == value else _both(key, found[key], value)
    try:
        both = Match.model_validate(found)
        exact = all(
            both.fits(*place) == all(match.fits(*place) for match in matches) for place in places
        )
    except ValidationError:
        exact = False
    if not exact:
        told = " and ".join(",".join(f"{k}:{v}" for k, v in _told(m).items()) for m in matches)
        raise SearchError(
            f"{told} meet on some tensors, which no recipe can say; write them as layers, "
            "or so that they do not"
        )
    return found


def _both(key: str, a: str, b: str) -> str:
    if key != "layers":
        return f"(?=.*(?:{a}))(?=.*(?:{b}))"
    ends = [(int(low), int(high or low)) for low, _, high in (a.partition("-"), b.partition("-"))]
    return f"{max(low for low, _ in ends)}-{min(high for _, high in ends)}"


def _told(match: Match) -> dict[str, str]:
    found: dict[str, str] = match.model_dump(exclude_none=True)
    return found

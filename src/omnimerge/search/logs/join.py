"""The answers of several logs, prompt by prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from omnimerge.errors import SearchError
from omnimerge.search.logs.log import Log

_SHOWN = 5


@dataclass(frozen=True)
class Joined:
    """The same prompts, answered at every coefficient.

    Attributes:
        points: the coefficients, increasing.
        ids: the prompts.
        answers: per point, the answer to each prompt.
        missing: how many other prompts were left out, as some log lacks them.
    """

    points: tuple[float, ...]
    ids: tuple[str, ...]
    answers: tuple[tuple[str, ...], ...]
    missing: int = 0


def join(logs: Mapping[float, Log], *, allow_missing: bool = False) -> Joined:
    """Join logs on their ids.

    Args:
        logs: coefficient -> log.
        allow_missing: whether ids that are not in every log are left out, instead of refused.

    Returns:
        The answers, in the order of the first log.

    Raises:
        SearchError: if ids are missing somewhere, none is everywhere, or an id is not of the same
            prompt everywhere.
    """
    points = tuple(sorted(logs))
    every = dict.fromkeys(id_ for point in points for id_ in logs[point].answers)
    common = [id_ for id_ in every if all(id_ in logs[point].answers for point in points)]
    everywhere = set(common)
    missing = [id_ for id_ in every if id_ not in everywhere]
    if not common or (missing and not allow_missing):
        raise SearchError(_missing(logs, points, missing, len(common)))
    for id_ in common:
        _same_prompt(logs, points, id_)
    answers = tuple(tuple(logs[point].answers[id_] for id_ in common) for point in points)
    return Joined(points, tuple(common), answers, len(missing))


def _missing(
    logs: Mapping[float, Log], points: Sequence[float], missing: Sequence[str], common: int
) -> str:
    told = []
    for id_ in missing[:_SHOWN]:
        lacking = [f"{point:g}" for point in points if id_ not in logs[point].answers]
        told.append(f"{id_!r} at {', '.join(lacking)}")
    more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
    way = (
        f"complete the logs, or --allow-missing compares the {common} common ones"
        if common
        else "no id is in all of them: are these logs of one task?"
    )
    return f"{len(missing)} ids are missing: {'; '.join(told)}{more}; {way}"


def _same_prompt(logs: Mapping[float, Log], points: Sequence[float], id_: str) -> None:
    for kind in (0, 1):
        told = {point: logs[point].asked[id_][kind] for point in points}
        known = {point: value for point, value in told.items() if value is not None}
        if len(set(known.values())) > 1:
            first = next(iter(known))
            other = next(point for point in known if known[point] != known[first])
            what = ("prompts", "documents (doc_hash)")[kind]
            raise SearchError(
                f"id {id_!r} is of different {what} in {logs[first].path} and "
                f"{logs[other].path}; compare logs of one task with the same settings"
            )

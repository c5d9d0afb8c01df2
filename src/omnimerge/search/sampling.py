"""Which points of a large space to try, chosen by Optuna from the scores so far.

Optuna proposes points; each is answered together with the neighbours that the criterion compares it
with. What is on disk is only read, so that a search that was stopped proposes the same points again
and goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from omnimerge.errors import SearchError
from omnimerge.search.space import Point, Space


def sample_points(
    space: Space,
    trials: int,
    seed: int,
    *,
    choosable: Sequence[Point],
    answer: Callable[[list[Point]], None],
    answered: Collection[Point],
    score: Callable[[Point], float | None],
) -> None:
    """Try points of a space.

    Args:
        space: the space.
        trials: how many points to propose.
        seed: of Optuna's sampler (TPE).
        choosable: the points that can be chosen; no others are proposed.
        answer: answers the prompts at points.
        answered: the points that are done, kept up to date by `answer`.
        score: a point's score, once it and its neighbours are done.

    Raises:
        SearchError: if Optuna is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise SearchError(
            "trials are chosen by Optuna, which is not installed; "
            "`pip install omnimerge[optuna]`, or search the whole grid"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    around = dict(zip(space.points, space.neighbours(space.points), strict=True))
    for _ in range(trials):
        trial = study.ask()
        left = list(choosable)
        for number, axis in enumerate(space.axes):
            values = sorted({point[number] for point in left})
            # Among shares the values that are left depend on those before: other parameters.
            place = trial.suggest_int(f"{axis.name} of {len(values)}", 0, len(values) - 1)
            left = [point for point in left if point[number] == values[place]]
        (point,) = left
        wanted = [space.points[i] for pair in around[point] for i in pair if i is not None]
        if missing := [p for p in sorted({point, *wanted}) if p not in answered]:
            answer(missing)
        study.tell(trial, score(point))

"""Which points of a large space to try, chosen by Optuna from the scores so far.

Optuna proposes points; each is answered together with the neighbours that the criterion compares it
with. What is on disk is only read, so that a search that was stopped proposes the same points again
and goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from omnimerge.errors import SearchError
from omnimerge.search.space import Point, Space


def sample_points(
    space: Space,
    trials: int,
    seed: int,
    *,
    answer: Callable[[list[Point]], None],
    answered: Collection[Point],
    score: Callable[[Point], float | None],
) -> None:
    """Try points of a space.

    Args:
        space: the space.
        trials: how many points to propose.
        seed: of Optuna's sampler (TPE).
        answer: answers the prompts at points.
        answered: the points that are done, kept up to date by `answer`.
        score: a point's score, once it and its neighbours are done; None where it has none.

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
    grids = [sorted({point[axis] for point in space.points}) for axis in range(len(space.axes))]
    for _ in range(trials):
        trial = study.ask()
        point = tuple(
            grid[trial.suggest_int(axis.name, 0, len(grid) - 1)]
            for axis, grid in zip(space.axes, grids, strict=True)
        )
        if point not in around:  # beyond the simplex of shares
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            continue
        wanted = [space.points[i] for pair in around[point] for i in pair if i is not None]
        if missing := [p for p in sorted({point, *wanted}) if p not in answered]:
            answer(missing)
        found = score(point)
        if found is None:  # at the edge, where it cannot be chosen
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(trial, found)

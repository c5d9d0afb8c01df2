"""What a search varies: a recipe, its axes, and a plan in which every point is legal."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omnimerge.engine import build_plan, load_recipe, with_parameters
from omnimerge.engine.loading import method_of
from omnimerge.errors import RecipeError, SearchError, suggestion
from omnimerge.search.inputs import checkpoint_digest
from omnimerge.search.meeting import entries_of
from omnimerge.search.space import Space

if TYPE_CHECKING:
    from omnimerge.engine import MergePlan, Recipe
    from omnimerge.methods import MergeMethod

PLACES = ("target", "base", "model")
"""Keys of a recipe that name checkpoints."""


def axes_of(grid: str | Sequence[str], shares: str | None, parameter: str) -> Space:
    """Read the axes along which a recipe is to be varied.

    Args:
        grid: the axes, as `search` takes them.
        shares: the grid of several donors' shares, instead.
        parameter: the keyword of an axis that names none.

    Returns:
        The space; of shares, that of one share.

    Raises:
        SearchError: if the axes are wrong.
    """
    if shares:
        return Space.of([shares])
    return Space.of([grid] if isinstance(grid, str) else list(grid), parameter)


def load_varied(
    source: str | Path | Mapping[str, Any] | Recipe,
    space: Space,
    *,
    replace: Mapping[str, Any] | None = None,
    parameters: Mapping[str, Any] | None = None,
) -> Recipe:
    """Load a recipe that need not say what is searched for all tensors.

    Args:
        source: as for `load_recipe`.
        space: what is searched.
        replace: as for `load_recipe`.
        parameters: as for `load_recipe`.

    Returns:
        The recipe, with a value for what is searched where it has none.

    Raises:
        SearchError: if an axis is no numeric keyword of the method.
        RecipeError: if the recipe is wrong.
    """
    if (method := method_of(source, replace)) is not None:
        _check_keywords(method, space)
    try:
        return load_recipe(source, replace=replace, parameters=parameters, defaults=space.defaults)
    except RecipeError as error:
        raise RecipeError([_hinted(p, space) for p in error.problems], error.source) from None


def space_of(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    grid: str | Sequence[str],
    shares: str | None,
    parameter: str,
) -> tuple[Recipe, Space]:
    """Read a recipe and the axes along which it is to be varied.

    Args:
        recipe: the merge.
        grid: the axes, as `search` takes them.
        shares: the grid of several donors' shares, instead.
        parameter: the keyword of an axis that names none.

    Returns:
        The recipe, with a value for what is searched where it has none, and the space.

    Raises:
        SearchError: if the axes are wrong, or shares are given of one donor.
        RecipeError: if the recipe is wrong.
    """
    space = axes_of(grid, shares, parameter)
    loaded = load_varied(recipe, space)
    if shares is None:
        return loaded, space
    if not loaded.merge_method.takes_target or len(loaded.models) < 2:
        raise SearchError(
            f"shares are of several donors, of a method such as adamms; the recipe has "
            f"{len(loaded.models)} model(s) and the method {loaded.method}; use a grid"
        )
    return loaded, Space.simplex(shares, len(loaded.models))


def plan_of(recipe: Recipe, space: Space, force: Collection[str]) -> tuple[MergePlan, Space]:
    """Plan a merge, after checking that every point of a space is legal and every axis counts.

    Args:
        recipe: the merge.
        space: its points.
        force: gates of the mapping to waive.

    Returns:
        The plan, and the space with the overrides that its axes need where they meet.

    Raises:
        SearchError: if an axis changes nothing, or two axes set the same for one tensor.
        RecipeError: if a point is out of a keyword's range, or an axis fits no tensor.
    """
    plan = build_plan(recipe, force=force)
    space = replace(space, entries=entries_of(plan, space))
    problems: dict[str, None] = {}
    for point in space.points:
        try:
            with_parameters(plan, *space.settings(point))
        except RecipeError as error:
            problems.update(dict.fromkeys(error.problems))
    if problems:
        raise RecipeError(list(problems), "the search")
    _check_effect(plan, space)
    return plan, space


def overridden(plan: MergePlan, space: Space) -> list[str]:
    """Tell where the recipe's own overrides set what is searched for all tensors.

    Args:
        plan: the merge.
        space: what is searched.

    Returns:
        One sentence for each.
    """
    return [
        f"overrides.{number} of the recipe sets {keyword} for its tensors; it is not searched there"
        for number, override in enumerate(plan.recipe.overrides)
        for keyword in space.defaults
        if keyword in override.parameters
    ]


def merge_settings(plan: MergePlan, space: Space) -> dict[str, Any]:
    """Return everything but the searched values that the merged weights depend on.

    Args:
        plan: the merge.
        space: what is searched.

    Returns:
        JSON values; names of places are left out.
    """
    recipe = plan.recipe.model_dump(mode="json", exclude={"max_shard_size"})
    shares = any(axis.donor is not None for axis in space.axes)
    for keyword in (*space.defaults, *(["weights"] if shares else [])):
        recipe["parameters"].pop(keyword, None)
    for entry in (recipe, *recipe["models"]):
        for place in (*PLACES, *(["weight"] if shares else [])):
            entry.pop(place, None)
    return {
        "recipe": recipe,
        "forced": list(plan.forced),
        "target": checkpoint_digest(plan.target, whole=True),
        "models": [checkpoint_digest(model) for model in plan.models],
        "base": checkpoint_digest(plan.base) if plan.base else None,
    }


def _check_keywords(method: MergeMethod, space: Space) -> None:
    numbers = [p.name for p in method.params if p.kind in (int, float) and not p.per_model]
    for axis in space.axes:
        if axis.keyword not in numbers:
            raise SearchError(
                f"{method.name} has no numeric parameter {axis.keyword!r}"
                f"{suggestion(axis.keyword, numbers)}; it has: {', '.join(numbers) or 'none'}"
            )


def _hinted(problem: str, space: Space) -> str:
    """A keyword that is searched for some tensors only is still required for the others."""
    for axis in space.axes:
        if axis.match and problem.startswith(f"parameters.{axis.keyword}: required"):
            given = f"--param {axis.keyword}=..."
            return f"{problem}; {axis.name} is for some tensors only, set the others with {given}"
    return problem


def _check_effect(plan: MergePlan, space: Space) -> None:
    first = space.points[0]
    before = [job.parameters for job in with_parameters(plan, *space.settings(first)).merged]
    for number, axis in enumerate(space.axes):
        other = next(
            point
            for point in space.points
            if [i for i, value in enumerate(point) if value != first[i]] == [number]
        )
        after = [job.parameters for job in with_parameters(plan, *space.settings(other)).merged]
        if before == after:
            raise SearchError(
                f"axis {axis.name} changes no tensor that is merged: all of those it is for are "
                "kept, or set by another axis or by an override of the recipe; leave it out"
            )

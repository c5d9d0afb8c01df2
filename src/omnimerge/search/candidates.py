"""Write the checkpoints of a grid, for those who evaluate elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omnimerge.engine.plan import with_parameters
from omnimerge.errors import OutputError
from omnimerge.search.run import plan_of, space_of
from omnimerge.search.store import write_atomically

if TYPE_CHECKING:
    from omnimerge.engine import MergePlan, Recipe

LIST_NAME = "candidates.json"


def write_candidates(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    out: Path,
    merge: Callable[[MergePlan, Path], None],
    *,
    grid: str | Sequence[str] = "0:0.6:0.1",
    shares: str | None = None,
    parameter: str = "alpha",
    force: Collection[str] = (),
    on_point: Callable[[str, bool], None] | None = None,
) -> dict[str, Path]:
    """Write one checkpoint for each point of a grid; those that are there already are kept.

    Args:
        recipe: the merge.
        out: folder for the checkpoints; ``candidates.json`` in it says which is which.
        merge: writes a plan's checkpoint into a folder, complete or not at all.
        grid: the axes, as `search` takes them.
        shares: the grid of several donors' shares, instead.
        parameter: the keyword of an axis that names none.
        force: gates of the mapping to waive.
        on_point: called with each point and whether it was written now.

    Returns:
        Point in words -> folder.

    Raises:
        OutputError: if `out` holds the candidates of another recipe.
    """
    loaded, space = space_of(recipe, grid, shares, parameter)
    plan = plan_of(loaded, space, force)
    described = {"recipe": plan.recipe.model_dump(mode="json"), "grid": space.text}
    file = out / LIST_NAME
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        if before.get("recipe") != described["recipe"]:
            raise OutputError(f"{out} holds the candidates of another recipe; give another folder")
    found = {}
    for point in space.points:
        folder = out / space.file_name(point)
        written = not folder.is_dir()
        if written:
            merge(with_parameters(plan, *space.settings(point)), folder)
        found[space.label(point)] = folder
        if on_point:
            on_point(space.label(point), written)
    listed = [
        {"values": space.values(point), "folder": space.file_name(point)} for point in space.points
    ]
    content = json.dumps({**described, "candidates": listed}, indent=1, ensure_ascii=False)
    write_atomically(file, content + "\n")
    return found

"""Write the checkpoints of a grid, for those who evaluate elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omnimerge.checkpoint.small_file import read_json
from omnimerge.checkpoint.writer import MANIFEST_NAME
from omnimerge.engine.manifest import manifest
from omnimerge.engine.planning import with_parameters
from omnimerge.errors import CheckpointError, OutputError
from omnimerge.search.planning import PLACES, merge_settings, plan_of, space_of
from omnimerge.search.store import write_atomically
from omnimerge.search.study import differences, refuse_foreign

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

    A folder holds the candidates of one recipe and the same parents, of one grid or several.

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
        OutputError: if `out` holds the candidates of another recipe or of other parents, or a
            candidate's folder something else.
        SearchError: if the axes are wrong, or `out` holds other files.
    """
    loaded, space = space_of(recipe, grid, shares, parameter)
    refuse_foreign(out, LIST_NAME, "candidates")
    plan, space = plan_of(loaded, space, force)
    settings = json.loads(json.dumps(merge_settings(plan, space)))
    listed = _listed(out, settings)
    _write(out, settings, listed)
    found = {}
    for point in space.points:
        name, words = space.file_name(point), space.label(point)
        written = _fill(with_parameters(plan, *space.settings(point)), out / name, merge)
        listed[name] = space.values(point)
        _write(out, settings, listed)
        found[words] = out / name
        if on_point:
            on_point(words, written)
    return found


def _fill(plan: MergePlan, folder: Path, merge: Callable[[MergePlan, Path], None]) -> bool:
    """Write a checkpoint unless it is there; whether it was written."""
    if folder.is_dir() and any(folder.iterdir()):
        try:
            there = read_json(folder / MANIFEST_NAME)
            same = _made_of(there) == _made_of(json.loads(json.dumps(manifest(plan))))
        except (CheckpointError, KeyError, TypeError, AttributeError):
            same = False
        if not same:
            raise OutputError(
                f"{folder} is there, and is no checkpoint of this point; move it away, or give "
                "another folder"
            )
        return False
    merge(plan, folder)
    return True


def _made_of(made: Mapping[str, Any]) -> Any:
    """What tells one merge from another in its manifest; where its inputs lay does not."""
    recipe = {key: value for key, value in made["recipe"].items() if key not in PLACES}
    recipe["models"] = [
        {key: value for key, value in entry.items() if key not in PLACES}
        for entry in recipe["models"]
    ]
    return recipe, {role: each["files"] for role, each in made["inputs"].items()}


def _listed(out: Path, settings: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Folder -> values of the candidates that are listed."""
    file = out / LIST_NAME
    if not file.is_file():
        return {}
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
        there = before["settings"]
        found = {str(entry["folder"]): dict(entry["values"]) for entry in before["candidates"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(
            f"{file} is no list of candidates, or is damaged; move it away, or give another folder"
        ) from error
    if changed := differences(there, settings):
        raise OutputError(
            f"{out} holds the candidates of another recipe ({'; '.join(changed)}); give another "
            "folder"
        )
    return found


def _write(
    out: Path, settings: Mapping[str, Any], listed: Mapping[str, Mapping[str, float]]
) -> None:
    entries = [{"values": values, "folder": folder} for folder, values in listed.items()]
    content = json.dumps({"settings": settings, "candidates": entries}, indent=1)
    write_atomically(out / LIST_NAME, content + "\n")

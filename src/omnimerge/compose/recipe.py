"""The recipe of a composition: a merge recipe whose models say which modalities they provide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omnimerge.engine import Recipe
from omnimerge.engine import load_recipe as load_merge_recipe
from omnimerge.engine.loading import read_yaml
from omnimerge.errors import RecipeError, suggestion

TEXT = "text"
"""What a model provides whose language model alone is merged."""

KNOWN = ("image", "audio", "video", TEXT)


@dataclass(frozen=True)
class ComposeRecipe:
    """A validated recipe.

    Attributes:
        merge: how the language models are merged; its models are those of the composition.
        provides: per model the modalities that it provides; None for all that it offers, empty for
            a model whose language model alone is wanted.
    """

    merge: Recipe
    provides: tuple[tuple[str, ...] | None, ...]


def load_recipe(
    source: str | Path | Mapping[str, Any] | ComposeRecipe,
    *,
    replace: Mapping[str, Any] | None = None,
    parameters: Mapping[str, Any] | None = None,
) -> ComposeRecipe:
    """Read and check a recipe.

    Relative paths in a file are looked up beside the file first, then in the working directory.

    Args:
        source: a YAML file, or the mapping it would hold.
        replace: keys that replace the recipe's.
        parameters: keywords of the method that replace single ones of the recipe's.

    Returns:
        The recipe.

    Raises:
        RecipeError: if anything is wrong with it; all problems are reported at once.
    """
    if isinstance(source, ComposeRecipe):
        merge = load_merge_recipe(source.merge, replace=replace, parameters=parameters)
        return ComposeRecipe(merge, source.provides)
    if isinstance(source, Mapping):
        raw, name = dict(source), "recipe"
    else:
        raw, name = read_yaml(Path(source)), str(source)
    folder = None if isinstance(source, Mapping) else Path(source).parent
    provides: list[tuple[str, ...] | None] = []
    problems: list[str] = []
    models = raw.get("models")
    if isinstance(models, (list, tuple)):
        entries = []
        for number, entry in enumerate(models):
            entry = dict(entry) if isinstance(entry, Mapping) else entry
            given = entry.pop("provides", None) if isinstance(entry, dict) else None
            provides.append(_provided(given, number, problems))
            entries.append(entry)
        raw["models"] = entries
    if raw.get("select") == "all":
        problems.append("select: all would merge towers; give language_model or linear")
    if problems:
        raise RecipeError(problems, name)
    if folder is not None:
        raw = _beside(raw, folder)
    merge = load_merge_recipe(raw, replace=replace, parameters=parameters)
    if merge.selection == "all":
        merge = merge.model_copy(update={"select": "language_model"})
    return ComposeRecipe(merge, tuple(provides))


def _provided(given: Any, number: int, problems: list[str]) -> tuple[str, ...] | None:
    if given is None:
        return None
    words = [given] if isinstance(given, str) else given
    key = f"models.{number}.provides"
    if not isinstance(words, (list, tuple)) or not words:
        problems.append(f"{key}: give one or several of {', '.join(KNOWN)}")
        return None
    for word in words:
        if not isinstance(word, str) or word not in KNOWN:
            hint = suggestion(str(word), KNOWN)
            problems.append(f"{key}: {word!r} is none of {', '.join(KNOWN)}{hint}")
    return tuple(dict.fromkeys(str(word) for word in words if word != TEXT))


def _beside(raw: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The recipe with paths that exist beside its file."""

    def found(value: Any) -> Any:
        there = isinstance(value, str) and value and (folder / value).exists()
        return str(folder / value) if there else value

    near = dict(raw)
    near |= {key: found(near[key]) for key in ("target", "base") if key in near}
    if isinstance(near.get("models"), list):
        near["models"] = [
            {k: found(v) if k in ("model", "adapter") else v for k, v in entry.items()}
            if isinstance(entry, dict)
            else found(entry)
            for entry in near["models"]
        ]
    if isinstance(near.get("layouts"), list):
        near["layouts"] = [found(each) for each in near["layouts"]]
    return near

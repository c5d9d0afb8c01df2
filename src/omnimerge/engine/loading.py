"""From a YAML file to a recipe, with every problem reported at once."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from omnimerge.checkpoint.yaml_file import read_mapping
from omnimerge.engine.recipe import Branches, Match, ModelEntry, Override, Recipe
from omnimerge.errors import RecipeError, suggestion
from omnimerge.methods import MergeMethod, all_methods


def load_recipe(
    source: str | Path | Mapping[str, Any] | Recipe,
    *,
    replace: Mapping[str, Any] | None = None,
    parameters: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Recipe:
    """Read and check a recipe.

    Relative paths in a file are looked up beside the file first, then in the working directory.

    Args:
        source: a YAML file, or the mapping it would hold.
        replace: keys that replace the recipe's, as options of the command line do.
        parameters: keywords of the method that replace single ones of the recipe's.
        defaults: keywords of the method to use where the recipe has none, such as the one that a
            search is going to set; those that the method does not have are ignored.

    Returns:
        The recipe.

    Raises:
        RecipeError: if anything is wrong with it; all problems are reported at once.
    """
    if isinstance(source, Recipe):
        if not replace and not parameters:
            return source
        source = source.model_dump(exclude_unset=True)
    raw, name = _read(source)
    raw |= replace or {}
    method = all_methods().get(str(raw.get("method")))
    given = raw.get("parameters") or {}
    if isinstance(given, Mapping):
        known = {param.name for param in method.params} if method else set()
        usable = {key: value for key, value in (defaults or {}).items() if key in known}
        raw["parameters"] = {**usable, **given, **(parameters or {})}
    return _validate(raw, name)


def method_of(
    source: str | Path | Mapping[str, Any] | Recipe, replace: Mapping[str, Any] | None = None
) -> MergeMethod | None:
    """Return the method that a recipe names, whatever else is wrong with the recipe.

    Args:
        source: as for `load_recipe`.
        replace: as for `load_recipe`.

    Returns:
        The method; None if there is none of that name.

    Raises:
        RecipeError: if the file cannot be read.
    """
    if isinstance(source, Recipe):
        source = {"method": source.method}
    return all_methods().get(str((_read(source)[0] | dict(replace or {})).get("method")))


def _read(source: str | Path | Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The keys of a recipe, and what to call it."""
    if isinstance(source, Mapping):
        return dict(source), "recipe"
    path = Path(source)
    return _beside(read_yaml(path), path.parent), str(path)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds keys, none of them twice.

    Args:
        path: the file.

    Returns:
        The mapping.

    Raises:
        RecipeError: if it cannot be read, or is something else.
    """
    try:
        return read_mapping(path)
    except ValueError as error:
        reason = str(error)
    if reason == "it holds no keys":
        reason += "; see `omnimerge plan --help` for one"
    elif not path.is_file():
        reason = f"cannot be read: {reason}"
    raise RecipeError([reason], str(path))


def _beside(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    def resolve(value: Any) -> Any:
        with contextlib.suppress(OSError):  # a text that is no path is reported later
            if isinstance(value, str) and value and (folder / value).exists():
                return str(folder / value)
        return value

    found = dict(raw)
    for key in ("target", "base"):
        if key in found:
            found[key] = resolve(found[key])
    if isinstance(found.get("models"), list):
        found["models"] = [
            {key: resolve(each) if key != "weight" else each for key, each in entry.items()}
            if isinstance(entry, dict)
            else resolve(entry)
            for entry in found["models"]
        ]
    if isinstance(found.get("layouts"), list):
        found["layouts"] = [resolve(each) for each in found["layouts"]]
    return found


def _validate(raw: dict[str, Any], source: str) -> Recipe:
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        problems = [line for item in error.errors() for line in _problem(item)]
        if not any("_fits_the_method" in str(item) for item in error.errors()):
            problems += _late_problems(raw, problems)
        raise RecipeError(list(dict.fromkeys(problems)), source) from None


def _problem(item: Any) -> list[str]:
    where = ".".join(str(part) for part in item["loc"])
    kind, message = item["type"], item["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        return [f"{where}: unknown key{_hint(item['loc'])}"]
    if kind == "missing":
        return [f"{where}: missing"]
    if kind == "value_error" and not where:
        return str(message).splitlines()
    shown = repr(item["input"])
    return [f"{where}: {message}" + (f" (got {shown})" if len(shown) < 80 else "")]


def _hint(location: tuple[Any, ...]) -> str:
    """Closest known key at this place of the recipe, or the list of them."""
    schema: type[BaseModel] = Recipe
    if location[0] == "models":
        schema = ModelEntry
    elif location[0] == "branches":
        schema = Branches
    elif location[0] == "overrides":
        schema = Match if "match" in location else Override
    known = list(schema.model_fields)
    return suggestion(str(location[-1]), known) or f"; known: {', '.join(known)}"


def _late_problems(raw: dict[str, Any], found: list[str]) -> list[str]:
    """Problems with the method, where other problems kept pydantic from looking for them."""
    known = {key: value for key, value in raw.items() if key in Recipe.model_fields}
    broken = {problem.split(":")[0].split(".")[0] for problem in found}
    if broken & {"method", "models", "parameters"} or not {"method", "models"} <= set(known):
        return []
    relevant = ("method", "target", "base", "models", "parameters")
    try:
        Recipe.model_validate({key: known[key] for key in relevant if key in known})
    except ValidationError as error:
        return [line for item in error.errors() for line in _problem(item)]
    return []

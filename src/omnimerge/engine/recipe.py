"""A recipe: which checkpoints, which method, which coefficients. See `loading` for files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from omnimerge.errors import RecipeError, UnknownMethodError
from omnimerge.methods import MergeMethod, get_method

Selection = Literal["all", "language_model", "linear"]
Dtype = Literal["auto", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _as_text(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if value == "":
        raise ValueError("give a path or a Hub id, not an empty text")
    return value


Reference = Annotated[str, BeforeValidator(_as_text)]


class ModelEntry(_Strict):
    """One checkpoint being merged: a whole one, or a PEFT adapter on top of one."""

    model: Reference | None = None
    adapter: Reference | None = None
    weight: float | None = None

    @model_validator(mode="after")
    def _names_something(self) -> ModelEntry:
        if self.model is None and self.adapter is None:
            raise ValueError("give a model, or an adapter")
        return self


class Lines(_Strict):
    """LiNeS: the merged task vector is scaled by α + β · depth."""

    alpha: float
    beta: float

    @property
    def pair(self) -> tuple[float, float]:
        """(α, β)."""
        return self.alpha, self.beta


class Branches(_Strict):
    """What feeds the target's tensors where one side holds them twice, for text and for images.

    `shared` are the target's single tensors, `text` and `vision` its two; each gets the donor's
    `text` or `vision` one, or nothing (`keep`). What is left out follows the paper's rule.
    """

    shared: Literal["text", "vision", "keep"] | None = None
    text: Literal["text", "vision", "keep"] | None = None
    vision: Literal["text", "vision", "keep"] | None = None

    def policy(self) -> dict[str, str]:
        """Return what is given."""
        return self.model_dump(exclude_none=True)


class Match(_Strict):
    """Which tensors an override is for; all given conditions must hold."""

    component: Literal["llm", "vision", "audio", "projector", "other"] | None = None
    name: str | None = None
    slot: str | None = None
    layers: str | None = None

    @field_validator("name", "slot")
    @classmethod
    def _is_regex(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{value!r} is no regular expression: {error}") from None
        return value

    @field_validator("layers")
    @classmethod
    def _is_range(cls, value: str | None) -> str | None:
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", value or "0")
        if not match or int(match.group(1)) > int(match.group(2) or match.group(1)):
            raise ValueError(f"{value!r} is no layer range; write 7 or 0-13")
        return value

    def fits(self, name: str, slot: str, component: str, layer: int | None) -> bool:
        """Return whether a tensor is meant.

        Args:
            name: the target's tensor name.
            slot: its slot.
            component: its component.
            layer: its layer in the language model, or None.

        Returns:
            True if every given condition holds.
        """
        if self.component is not None and self.component != component:
            return False
        if self.name is not None and not re.search(self.name, name):
            return False
        if self.slot is not None and not re.search(self.slot, slot):
            return False
        if self.layers is None:
            return True
        low, _, high = self.layers.partition("-")
        return layer is not None and int(low) <= layer <= int(high or low)


class Override(_Strict):
    """What is done differently for some tensors. The first override that fits wins."""

    match: Match
    keep: Literal["target"] | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _says_one_thing(self) -> Override:
        if bool(self.keep) == bool(self.parameters):
            raise ValueError("give either keep: target or parameters")
        return self


def _entry(value: Any) -> Any:
    return {"model": value} if isinstance(value, (str, Path)) else value


def _entries(value: Any) -> Any:
    if not isinstance(value, (list, tuple)):
        raise ValueError("give a list of checkpoints")
    if not value:
        raise ValueError("give at least one checkpoint")
    return value


def parse_size(value: Any) -> int:
    """Read a number of bytes.

    Args:
        value: such as ``5GB``, ``500 MiB`` or 1000.

    Returns:
        The number.

    Raises:
        ValueError: if it is no size.
    """
    match = re.fullmatch(r"([\d.]+)\s*([A-Za-z]*)", str(value).strip())
    if not match or match.group(2).upper() not in _UNITS:
        raise ValueError(f"{value!r} is no size; write for example 5GB or 500MB")
    size = float(match.group(1)) * _UNITS[match.group(2).upper()]
    if not 1 <= size < 1e18:
        raise ValueError(f"{value!r} is no size to work with; write for example 5GB or 500MB")
    return int(size)


class Recipe(_Strict):
    """A validated recipe. The fields are those of the YAML file, with their defaults."""

    method: str
    target: Reference | None = None
    base: Reference | None = None
    models: Annotated[
        tuple[Annotated[ModelEntry, BeforeValidator(_entry)], ...], BeforeValidator(_entries)
    ]
    parameters: dict[str, Any] = Field(default_factory=dict)
    select: Selection | None = None
    lines: Lines | None = None
    overrides: tuple[Override, ...] = ()
    vocabulary: Literal["auto", "target", "overlap"] = "auto"
    branches: Branches | None = None
    layouts: tuple[Reference, ...] = ()
    dtype: Dtype = "auto"
    max_shard_size: Annotated[int, BeforeValidator(parse_size)] = 5 * 10**9
    seed: int = 0

    @model_validator(mode="after")
    def _fits_the_method(self) -> Recipe:
        problems = _method_problems(self)
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def stores_float8(self) -> bool:
        """Whether matrices are stored in 8 bits, a type that no model computes in."""
        return self.dtype.startswith("float8")

    @property
    def merge_method(self) -> MergeMethod:
        """The registered method."""
        return get_method(self.method)

    @property
    def selection(self) -> Selection:
        """Which tensors are merged: the recipe's choice, or the method's default."""
        return self.select or self.merge_method.select  # type: ignore[return-value]

    @property
    def target_reference(self) -> str:
        """The checkpoint whose architecture the output has: target, else base, else model 1."""
        return self.target or self.base or self.model_reference(self.models[0])

    def model_reference(self, entry: ModelEntry) -> str:
        """The whole checkpoint of an entry: its model, or what its adapter is put on.

        Args:
            entry: one of the models.

        Returns:
            The reference.

        Raises:
            RecipeError: if an adapter stands alone and there is neither base nor target.
        """
        found = entry.model or self.base or self.target
        if found is None:
            raise RecipeError([f"models: {entry.adapter} is an adapter; give its model, or a base"])
        return found

    @property
    def all_parameters(self) -> dict[str, Any]:
        """The method's keywords, `weight` entries of the models included."""
        weights = [entry.weight for entry in self.models]
        if any(weight is not None for weight in weights):
            return {"weights": [1.0 if w is None else w for w in weights], **self.parameters}
        return dict(self.parameters)

    def model_count(self) -> int:
        """Return how many tensors the method gets, the target included where it takes it."""
        return len(self.models) + self.merge_method.takes_target


def _method_problems(recipe: Recipe) -> list[str]:
    try:
        method = recipe.merge_method
    except UnknownMethodError as error:
        return [f"method: {error}"]
    count = recipe.model_count()
    low, high = method.models
    problems = []
    if "weights" in recipe.parameters and any(m.weight is not None for m in recipe.models):
        problems.append("parameters.weights: given beside weight entries of models; keep one")
    if count < low or (high is not None and count > high):
        least = low - method.takes_target
        wanted = f"exactly {least}" if low == high else f"at least {least}"
        problems.append(f"models: {method.name} takes {wanted}, not {len(recipe.models)}")
    if method.needs_base and recipe.base is None:
        problems.append(f"base: {method.name} works on task vectors; give the common ancestor")
    if method.takes_target and recipe.target is None and recipe.base is None:
        problems.append(f"target: {method.name} needs the checkpoint to merge into")
    problems += _adapter_problems(recipe, method)
    if recipe.lines and not method.needs_base:
        problems.append(f"lines: scales task vectors, which {method.name} has none of")
    problems += [f"parameters.{p}" for p in method.problems(recipe.all_parameters, count)]
    for number, override in enumerate(recipe.overrides):
        merged = {**recipe.all_parameters, **override.parameters}
        wrong = method.problems(merged, count) if override.parameters else []
        problems += [f"overrides.{number}.parameters.{p}" for p in wrong]
    return problems


def _adapter_problems(recipe: Recipe, method: MergeMethod) -> list[str]:
    problems = []
    if recipe.base is None and recipe.target is None:
        problems += [
            f"models.{number}.model: missing; the adapter needs the checkpoint that it was made for"
            for number, entry in enumerate(recipe.models)
            if entry.model is None
        ]
    if method.adapters_only and any(entry.adapter is None for entry in recipe.models):
        problems.append(f"models: {method.name} merges LoRA adapters; give each as `adapter: PATH`")
    return problems

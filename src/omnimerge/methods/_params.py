"""The keywords of merge methods, read off their signatures."""

import inspect
import numbers
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True, slots=True)
class Range:
    """Closed interval of legal values; also the default search interval."""

    low: float
    high: float

    def __contains__(self, value: Any) -> bool:
        return bool(self.low <= value <= self.high)

    def __str__(self) -> str:
        return f"[{self.low:g}, {self.high:g}]"


@dataclass(frozen=True, slots=True)
class Param:
    """One keyword of a merge method, as declared in its signature.

    Attributes:
        name: the keyword.
        per_model: one value per model instead of one for all.
        kind: type of a value: float, int, bool or str.
        choices: legal values where there is a fixed list.
        default: its default.
        required: whether there is no default.
        range: legal interval of a number.
        nullable: whether null is a value too.
    """

    name: str
    per_model: bool
    kind: type
    choices: tuple[str, ...]
    default: Any
    required: bool
    range: Range | None
    nullable: bool

    def problem(self, value: Any, models: int) -> str | None:
        """Return what is wrong with a value, or None.

        Args:
            value: what the user gave.
            models: number of models.

        Returns:
            The problem in words, naming the value and what is legal.
        """
        if value is None and self.nullable:
            return None
        if not self.per_model:
            return self._single_problem(value)
        if not isinstance(value, Sequence) or isinstance(value, str):
            return f"{value!r} is not a list with one value per model"
        if len(value) != models:
            return f"{len(value)} values for {models} models"
        return next((p for v in value if (p := self._single_problem(v))), None)

    def _single_problem(self, value: Any) -> str | None:
        number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if self.choices:
            legal = value in self.choices
            return None if legal else f"{value!r} is not one of {', '.join(self.choices)}"
        if (self.kind is float and not number) or (self.kind is int and not isinstance(value, int)):
            hint = "; write 0.1, not 1e-1" if _looks_like_a_number(value) else ""
            return f"{value!r} is not a number{hint}"
        if self.kind in (bool, str) and not isinstance(value, self.kind):
            return f"{value!r} is not {'true or false' if self.kind is bool else 'a text'}"
        if number and (value != value or abs(value) == float("inf")):
            return f"{value} is not finite"
        if number and self.range and value not in self.range:
            return f"{value} is not in {self.range}"
        return None


def params_of(fn: Callable[..., Any], provided: Collection[str]) -> tuple[Param, ...]:
    """Read the keywords of a merge method off its signature.

    Args:
        fn: the method's function.
        provided: keywords that the caller fills, not the recipe.

    Returns:
        One entry per keyword of the recipe.
    """
    signature = inspect.signature(fn)
    hints = get_type_hints(fn, include_extras=True)
    keyword_only = [p for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
    return tuple(_param(p, hints[p.name]) for p in keyword_only if p.name not in provided)


def _param(parameter: inspect.Parameter, hint: Any) -> Param:
    inner, *extras = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    nullable = NoneType in get_args(inner)
    inner = _without_none(inner)
    per_model = get_origin(inner) is Sequence
    if per_model:
        (inner,) = get_args(inner)
    choices = get_args(inner) if get_origin(inner) is Literal else ()
    required = parameter.default is parameter.empty
    return Param(
        name=parameter.name,
        per_model=per_model,
        kind=str if choices else inner,
        choices=choices,
        default=None if required else parameter.default,
        required=required,
        range=next((extra for extra in extras if isinstance(extra, Range)), None),
        nullable=nullable,
    )


def _looks_like_a_number(value: Any) -> bool:
    """YAML 1.1 reads 1e-1 as a text."""
    try:
        return isinstance(value, str) and float(value) == float(value)
    except ValueError:
        return False


def _without_none(hint: Any) -> Any:
    if get_origin(hint) in (Union, type(int | None)):
        (hint,) = [arg for arg in get_args(hint) if arg is not NoneType]
    return hint

"""Declare a merge method once; recipe schema, command line, docs and search bounds follow."""

import inspect
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType, NoneType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from torch import Tensor

from omnimerge.errors import MethodError, UnknownMethodError, suggestion

MergeFn = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class Range:
    """Closed interval of legal values; also the default search interval."""

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

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
    """

    name: str
    per_model: bool
    kind: type
    choices: tuple[str, ...]
    default: Any
    required: bool
    range: Range | None

    def problem(self, value: Any, models: int) -> str | None:
        """Return what is wrong with a value, or None.

        Args:
            value: what the user gave.
            models: number of models.

        Returns:
            The problem in words, naming the value and what is legal.
        """
        if value is None and self.default is None and not self.required:
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


@dataclass(frozen=True, slots=True)
class MergeMethod:
    """A registered merge method: a pure function plus what the planner must know of it.

    Attributes:
        name: key in recipes.
        fn: ``fn(models, base, *, keywords) -> Tensor``, float32.
        family: heading under which it is listed.
        summary: first line of its docstring.
        paper: URL of the publication.
        needs_base: whether it works on task vectors.
        takes_target: whether `models` starts with the target (AdaMMS) instead of holding the
            recipe's models only.
        elementwise: whether it may be applied to any slice of a tensor, so that memory is bounded.
        select: which tensors it merges by default.
        models: fewest and most models it takes (`takes_target` included).
        params: its keywords.
    """

    name: str
    fn: MergeFn
    family: str
    summary: str
    paper: str
    needs_base: bool
    takes_target: bool
    elementwise: bool
    select: str
    models: tuple[int, int | None]
    params: tuple[Param, ...]

    def problems(self, parameters: Mapping[str, Any], models: int) -> list[str]:
        """Check keywords against the signature.

        Args:
            parameters: keyword -> value.
            models: number of models, the target included where `takes_target`.

        Returns:
            One line per problem: unknown, missing, or out of range.
        """
        known = {param.name: param for param in self.params}
        found = [
            f"{name}: {self.name} has no such parameter{suggestion(name, known)}; "
            f"it has: {', '.join(known) or 'none'}"
            for name in parameters
            if name not in known
        ]
        for name, param in known.items():
            if name not in parameters:
                if param.required:
                    found.append(f"{name}: required by {self.name}")
            elif problem := param.problem(parameters[name], models):
                found.append(f"{name}: {problem}")
        return found

    def __call__(
        self, models: Sequence[Tensor], base: Tensor | None = None, **parameters: Any
    ) -> Tensor:
        """Check the inputs and merge one tensor.

        Args:
            models: the tensors, all of one shape; the target first where `takes_target`.
            base: the common ancestor's tensor; ignored by methods that do not need it.
            **parameters: the method's keywords.

        Returns:
            The merged tensor, float32.

        Raises:
            MethodError: if shapes, number of models, base or keywords do not fit.
        """
        low, high = self.models
        if len(models) < low or (high is not None and len(models) > high):
            wanted = f"exactly {low}" if low == high else f"at least {low}"
            raise MethodError(f"{self.name} takes {wanted} models, not {len(models)}")
        if self.needs_base and base is None:
            raise MethodError(f"{self.name} works on task vectors and needs a base")
        shapes = {tuple(t.shape) for t in [*models, *([base] if base is not None else [])]}
        if len(shapes) > 1:
            raise MethodError(f"{self.name} got tensors of different shapes: {sorted(shapes)}")
        if problems := self.problems(parameters, len(models)):
            raise MethodError("; ".join(problems))
        return self.fn(models, base, **parameters)


_METHODS: dict[str, MergeMethod] = {}


def merge_method(
    name: str,
    *,
    paper: str,
    family: str,
    needs_base: bool = False,
    takes_target: bool = False,
    elementwise: bool = False,
    select: Literal["all", "language_model", "linear"] = "all",
    models: tuple[int, int | None] = (1, None),
) -> Callable[[MergeFn], MergeFn]:
    """Register a pure tensor function as the merge method `name`.

    Keyword-only parameters of the function become recipe keys: `Sequence[...]` ones hold one value
    per model. The function is returned unchanged, so it stays importable and testable by itself.

    Args:
        name: key in recipes, on the command line and in reports; `snake_case`.
        paper: URL of the publication, preferably arXiv.
        family: heading under which it is listed.
        needs_base: whether it needs the common ancestor.
        takes_target: whether `models` starts with the target.
        elementwise: whether it may be applied to any slice of a tensor.
        select: which tensors it merges by default.
        models: fewest and most models.

    Returns:
        A decorator that registers the function and hands it back.

    Raises:
        ValueError: if `name` is taken, or the signature is not ``(models, base, *, ...)``.
    """

    def register(fn: MergeFn) -> MergeFn:
        if name in _METHODS:
            raise ValueError(f"merge method {name!r} is already {_METHODS[name].fn.__module__}")
        signature = inspect.signature(fn)
        if list(signature.parameters)[:2] != ["models", "base"] or not fn.__doc__:
            raise ValueError(f"{fn.__qualname__} needs (models, base, *, ...) and a docstring")
        summary = fn.__doc__.strip().splitlines()[0]
        _METHODS[name] = MergeMethod(
            name,
            fn,
            family,
            summary,
            paper,
            needs_base,
            takes_target,
            elementwise,
            select,
            models,
            _params(fn, signature),
        )
        return fn

    return register


def get_method(name: str) -> MergeMethod:
    """Look up a merge method, suggesting the closest name when there is none.

    Args:
        name: registered name, for example ``"linear"``.

    Returns:
        The registered method.

    Raises:
        UnknownMethodError: if nothing is registered under `name`.
    """
    try:
        return _METHODS[name]
    except KeyError:
        raise UnknownMethodError(str(name), _METHODS) from None


def all_methods() -> Mapping[str, MergeMethod]:
    """Return a read-only view of every registered method, by name."""
    return MappingProxyType(_METHODS)


def _params(fn: MergeFn, signature: inspect.Signature) -> tuple[Param, ...]:
    hints = get_type_hints(fn, include_extras=True)
    keyword_only = [p for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
    return tuple(_param(p, hints[p.name]) for p in keyword_only)


def _param(parameter: inspect.Parameter, hint: Any) -> Param:
    inner, *extras = get_args(hint) if get_origin(hint) is Annotated else (hint,)
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


def merge_tensors(
    method: str, models: Sequence[Tensor], base: Tensor | None = None, **parameters: Any
) -> Tensor:
    """Merge one tensor of several models, in memory.

    Args:
        method: a name that `omnimerge methods` lists.
        models: the tensors, all of one shape; the target first for `adamms`.
        base: the common ancestor's tensor; ignored by methods that do not need it.
        **parameters: the method's keywords.

    Returns:
        The merged tensor, float32.

    Raises:
        UnknownMethodError: if there is no such method.
        MethodError: if shapes, number of models, base or keywords do not fit.
    """
    return get_method(method)(models, base, **parameters)

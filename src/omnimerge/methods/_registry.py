"""Declare a merge method once; recipe schema, command line, docs and search bounds follow."""

import hashlib
import inspect
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType, NoneType
from typing import (
    Annotated,
    Any,
    Literal,
    Protocol,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    runtime_checkable,
)

import torch
from torch import Tensor

from omnimerge.errors import MethodError, UnknownMethodError, suggestion

MergeFn = Callable[..., Tensor]

# Keywords that the caller of a method fills, not the recipe.
_PROVIDED = ("statistics", "generator")


@runtime_checkable
class Statistics(Protocol):
    """What a method has to know of a whole model before it merges the first tensor.

    Every pass shows it all tensors (or slices of them) once, in any order.
    """

    passes: int

    def see(self, number: int, models: Sequence[Tensor], base: Tensor | None) -> None:
        """Take in one tensor, or a slice of one.

        Args:
            number: which pass this is, from 0.
            models: one tensor per model.
            base: the common ancestor's tensor.
        """

    def close(self, number: int) -> None:
        """End a pass.

        Args:
            number: which pass this was.
        """


StatisticsFactory = Callable[[int, Mapping[str, Any]], Statistics | None]
"""(number of models, the method's keywords) -> statistics, or None where none are needed."""


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
        statistics: makes what it has to know of the whole model, if anything.
        random: whether it draws at random, from a generator that is given to it.
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
    statistics: StatisticsFactory | None
    random: bool

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

    def collect(
        self,
        tensors: Callable[[], Iterable[tuple[Sequence[Tensor], Tensor | None]]],
        models: int,
        parameters: Mapping[str, Any],
    ) -> Statistics | None:
        """Gather what the method has to know of a whole model.

        Args:
            tensors: called once per pass; gives (models, base) for every tensor or slice.
            models: number of models.
            parameters: the method's keywords.

        Returns:
            The statistics, or None if this method, with these keywords, needs none.
        """
        found = self.statistics(models, self.complete(parameters)) if self.statistics else None
        for number in range(found.passes if found else 0):
            for each, base in tensors():
                found.see(number, each, base)  # type: ignore[union-attr]
            found.close(number)  # type: ignore[union-attr]
        return found

    def complete(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Return keywords with the defaults of those that are not given.

        Args:
            parameters: the keywords that are given.

        Returns:
            All keywords.
        """
        return {p.name: p.default for p in self.params if not p.required} | dict(parameters)

    def merge(
        self,
        models: Sequence[Tensor],
        base: Tensor | None,
        parameters: Mapping[str, Any],
        *,
        statistics: Statistics | None = None,
        name: str = "",
        seed: int = 0,
    ) -> Tensor:
        """Merge one tensor whose inputs have been checked.

        Args:
            models: the tensors, all of one shape.
            base: the common ancestor's tensor.
            parameters: the method's keywords.
            statistics: what `collect` returned.
            name: the tensor's name, from which, with the seed, random methods draw.
            seed: the recipe's seed.

        Returns:
            The merged tensor, float32.
        """
        provided: dict[str, Any] = {}
        if self.statistics:
            provided["statistics"] = statistics
        if self.random:
            provided["generator"] = generator_for(seed, name)
        return self.fn(models, base, **parameters, **provided)

    def __call__(
        self,
        models: Sequence[Tensor],
        base: Tensor | None = None,
        *,
        seed: int = 0,
        **parameters: Any,
    ) -> Tensor:
        """Check the inputs and merge one tensor, as if it were the whole model.

        Args:
            models: the tensors, all of one shape; the target first where `takes_target`.
            base: the common ancestor's tensor; ignored by methods that do not need it.
            seed: for methods that draw at random.
            **parameters: the method's keywords.

        Returns:
            The merged tensor, float32.

        Raises:
            MethodError: if shapes, number of models, base or keywords do not fit.
        """
        self.check(len(models), has_base=base is not None, parameters=parameters)
        self.check_shapes(models, base)
        statistics = self.collect(lambda: [(models, base)], len(models), parameters)
        return self.merge(models, base, parameters, statistics=statistics, seed=seed)

    def check(self, models: int, *, has_base: bool, parameters: Mapping[str, Any]) -> None:
        """Check the number of models, the base and the keywords.

        Args:
            models: number of models.
            has_base: whether there is a base.
            parameters: the keywords.

        Raises:
            MethodError: if something does not fit.
        """
        low, high = self.models
        if models < low or (high is not None and models > high):
            wanted = f"exactly {low}" if low == high else f"at least {low}"
            raise MethodError(f"{self.name} takes {wanted} models, not {models}")
        if self.needs_base and not has_base:
            raise MethodError(f"{self.name} works on task vectors and needs a base")
        if problems := self.problems(parameters, models):
            raise MethodError("; ".join(problems))

    def check_shapes(self, models: Sequence[Tensor], base: Tensor | None, name: str = "") -> None:
        """Check that all tensors have one shape.

        Args:
            models: one tensor per model.
            base: the common ancestor's tensor.
            name: the tensor's name, for the message.

        Raises:
            MethodError: if they differ.
        """
        shapes = {tuple(t.shape) for t in [*models, *([base] if base is not None else [])]}
        if len(shapes) > 1:
            what = f"tensor {name!r} has" if name else f"{self.name} got tensors of"
            raise MethodError(f"{what} different shapes: {sorted(shapes)}")


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
    statistics: StatisticsFactory | None = None,
    random: bool = False,
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
        statistics: makes what the method has to know of the whole model; the function then takes
            a keyword `statistics`.
        random: whether the function takes a keyword `generator` to draw from.

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
            name=name,
            fn=fn,
            family=family,
            summary=summary,
            paper=paper,
            needs_base=needs_base,
            takes_target=takes_target,
            elementwise=elementwise,
            select=select,
            models=models,
            params=_params(fn, signature),
            statistics=statistics,
            random=random,
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
    return tuple(_param(p, hints[p.name]) for p in keyword_only if p.name not in _PROVIDED)


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


def generator_for(seed: int, name: str) -> torch.Generator:
    """Return a random generator that depends on a seed and a tensor's name alone.

    So a merge gives the same bytes in any order, on any number of threads or machines.

    Args:
        seed: the recipe's seed.
        name: the tensor's name.

    Returns:
        A generator on the CPU.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

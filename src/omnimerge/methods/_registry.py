"""Declare a merge method once; recipe schema, command line, docs and search bounds follow."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor

from omnimerge.errors import MethodError, UnknownMethodError, suggestion
from omnimerge.methods._low_rank import LowRank, in_column_space, in_joint_space
from omnimerge.methods._params import Param, params_of
from omnimerge.methods._random import Stream
from omnimerge.methods._statistics import Statistics

MergeFn = Callable[..., Tensor]

# Keywords that the caller of a method fills, not the recipe.
_PROVIDED = ("statistics", "stream", "full_shape", "depth")
Slices = Literal["entries", "rows", "whole"]
StatisticsFactory = Callable[[int, Mapping[str, Any]], Statistics | None]
"""(number of models, the method's keywords) -> statistics, or None where none are needed."""
LowRankFn = Callable[..., LowRank | Tensor]
"""(task vectors as `LowRank`s, shape, keywords) -> the merged task vector."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a model a tensor, or a slice of one, belongs.

    Attributes:
        name: the tensor's name.
        seed: the recipe's seed; random methods draw from (seed, name, position).
        offset: position of a slice's first entry in the tensor.
        depth: 0 for the first layer to 1 for the last; None outside of the layers.
    """

    name: str = ""
    seed: int = 0
    offset: int = 0
    depth: float | None = None


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
        slices: what it may be applied to, so that memory is bounded: any `entries` of a tensor, any
            `rows` of it, or the `whole` only.
        select: which tensors it merges by default.
        models: fewest and most models it takes (`takes_target` included).
        params: its keywords.
        provided: which of the keywords that the caller fills it takes.
        statistics: makes what it has to know of a tensor or of the whole model, if anything.
        low_rank: how it merges task vectors that are given as factors: on cores in the `joint`
            space of rows and columns, in the space of `columns`, by a function of its own, or not.
        adapters_only: whether it merges nothing but LoRA adapters.
        exact: whether it gives the same bits on every device: nothing but sums, products and
            comparisons of float32 numbers, entry by entry.
        fused: whether it takes tensors in the dtypes that they are stored in, and slices of any
            length at once: it leaves all to `kernels`, which need no float32 copies.
    """

    name: str
    fn: MergeFn
    family: str
    summary: str
    paper: str
    needs_base: bool
    takes_target: bool
    slices: Slices
    select: str
    models: tuple[int, int | None]
    params: tuple[Param, ...]
    provided: tuple[str, ...]
    statistics: StatisticsFactory | None
    low_rank: Literal["joint", "columns"] | LowRankFn | None
    adapters_only: bool
    exact: bool
    fused: bool

    @property
    def random(self) -> bool:
        """Whether it draws at random."""
        return "stream" in self.provided

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
            elif problem := param.problem(parameters[name], models - self.takes_target):
                found.append(f"{name}: {problem}")
        return found

    def new_statistics(self, models: int, parameters: Mapping[str, Any]) -> Statistics | None:
        """Make what the method has to know before it merges.

        Args:
            models: number of models.
            parameters: the method's keywords.

        Returns:
            The statistics, to be filled; None if the method, with these keywords, needs none.
        """
        return self.statistics(models, self.complete(parameters)) if self.statistics else None

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
        place: Place | None = None,
    ) -> Tensor:
        """Merge one tensor whose inputs have been checked.

        Args:
            models: the tensors, all of one shape.
            base: the common ancestor's tensor.
            parameters: the method's keywords.
            statistics: what `new_statistics` made, filled.
            place: where the tensor belongs.

        Returns:
            The merged tensor, float32.
        """
        place = place or Place()
        known = {
            "statistics": statistics,
            "stream": Stream.of(place.seed, place.name, place.offset),
            "depth": place.depth,
            "full_shape": None,
        }
        provided = {name: known[name] for name in self.provided}
        return self.fn(models, base, **parameters, **provided)

    def merge_low_rank(
        self,
        deltas: Sequence[LowRank],
        parameters: Mapping[str, Any],
        *,
        place: Place | None = None,
    ) -> LowRank | Tensor:
        """Merge the task vectors of one matrix, given as factors.

        Args:
            deltas: one task vector per model, all of one shape.
            parameters: the method's keywords.
            place: where the matrix belongs.

        Returns:
            The merged task vector, `scale` included: as factors where the method leaves it of low
            rank, else dense.

        Raises:
            MethodError: if the method has no form for factors.
        """
        if not any(delta.left.shape[1] for delta in deltas):
            return deltas[0]  # no expert changes it
        place = place or Place()
        shape = deltas[0].shape
        known = {
            "statistics": None,
            "stream": Stream.of(place.seed, place.name),
            "depth": place.depth,
            "full_shape": shape,
        }
        keywords = {**parameters, **{name: known[name] for name in self.provided}}
        if callable(self.low_rank):
            return self.low_rank(deltas, **keywords)
        run = {"joint": in_joint_space, "columns": in_column_space}.get(self.low_rank or "")
        if run is None:
            raise MethodError(f"{self.name} has no form for factors; use LowRank.dense()")
        return run(lambda cores, zeros: self.fn(cores, zeros, **keywords), deltas)

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
    slices: Slices = "whole",
    select: Literal["all", "language_model", "linear"] = "all",
    models: tuple[int, int | None] = (1, None),
    statistics: StatisticsFactory | None = None,
    low_rank: Literal["joint", "columns"] | LowRankFn | None = None,
    adapters_only: bool = False,
    exact: bool = True,
    fused: bool = False,
) -> Callable[[MergeFn], MergeFn]:
    """Register a pure tensor function as the merge method `name`.

    Keyword-only parameters of the function become recipe keys: `Sequence[...]` ones hold one value
    per model. Four names are filled by the caller instead: `statistics`, `stream` (to draw from),
    `depth` and `full_shape` (of the matrices, where the models are cores of larger ones). The
    function is returned unchanged, so it stays importable and testable by itself.

    Args:
        name: key in recipes, on the command line and in reports; `snake_case`.
        paper: URL of the publication, preferably arXiv.
        family: heading under which it is listed.
        needs_base: whether it needs the common ancestor.
        takes_target: whether `models` starts with the target.
        slices: what of a tensor it may be applied to.
        select: which tensors it merges by default.
        models: fewest and most models.
        statistics: makes what the method has to know of a tensor or of the whole model.
        low_rank: how it merges factors; see `MergeMethod`.
        adapters_only: whether it merges nothing but LoRA adapters.
        exact: false for what sums or takes functions that devices round differently; a method on
            `whole` tensors never is.
        fused: whether it takes tensors as they are stored; see `MergeMethod`.

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
            slices=slices,
            select=select,
            models=models,
            params=params_of(fn, _PROVIDED),
            provided=tuple(name for name in _PROVIDED if name in signature.parameters),
            statistics=statistics,
            low_rank=low_rank,
            adapters_only=adapters_only,
            exact=exact and slices != "whole",
            fused=fused,
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

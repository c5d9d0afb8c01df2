"""Merge tensors or whole models that are in memory, by the name of a method."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from omnimerge.errors import MethodError
from omnimerge.methods._low_rank import LowRank, added
from omnimerge.methods._ops import scaled_by_depth
from omnimerge.methods._registry import MergeMethod, Place, get_method
from omnimerge.methods._statistics import gather

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def merge_state_dicts(
    method: str,
    models: Sequence[Mapping[str, Tensor | LowRank]],
    base: Mapping[str, Tensor] | None = None,
    *,
    seed: int = 0,
    lines: tuple[float, float] | None = None,
    **parameters: Any,
) -> dict[str, Tensor]:
    """Merge several models in memory, tensor by tensor.

    Statistics of the whole model (a global threshold, norms) are taken over all tensors. The layer
    of a tensor is the number after `layers.` in its name.

    Args:
        method: a name that `omnimerge methods` lists.
        models: one mapping of names to tensors per model; the target first for `adamms`. All have
            the same names. A `LowRank` is a task vector: what an expert adds to the base's tensor.
        base: the common ancestor's tensors; ignored by methods that do not need it.
        seed: for methods that draw at random.
        lines: (α, β) of LiNeS, which scales the merged task vector of any method that works on
            task vectors by α + β · depth; see `lines`.
        **parameters: the method's keywords.

    Returns:
        Name -> merged tensor, float32, in the order of the first model. Integer tensors are the
        first model's.

    Raises:
        UnknownMethodError: if there is no such method.
        MethodError: if names, shapes, number of models, base or keywords do not fit, or a tensor
            holds NaN or infinity.
    """
    chosen = get_method(method)
    chosen.check(len(models), has_base=base is not None, parameters=parameters)
    _check_names(models, base)
    if lines and not chosen.needs_base:
        raise MethodError(f"lines scales task vectors, which {method} has none of")
    _check_adapters(chosen, (value for model in models for value in model.values()))

    def inputs(name: str) -> tuple[list[Tensor | LowRank], Tensor | None]:
        return [model[name] for model in models], None if base is None else base[name]

    names = [name for name, tensor in models[0].items() if _is_merged(tensor)]
    for name in names:
        _check_tensors(chosen, *inputs(name), name)
    statistics = chosen.new_statistics(len(models), parameters)
    if statistics and statistics.scope == "model":
        gather(statistics, lambda: (_dense(*inputs(name)) for name in names))
    layers = [int(match.group(1)) for name in names if (match := _LAYER.search(name))]
    merged: dict[str, Any] = dict(models[0])
    for name in names:
        match = _LAYER.search(name)
        depth = int(match.group(1)) / max(1, max(layers)) if match else None
        place = Place(name=name, seed=seed, depth=depth)
        known = statistics if statistics and statistics.scope == "model" else None
        each, origin = inputs(name)
        merged[name] = _merge(chosen, each, origin, parameters, known, place)
        if lines and origin is not None:
            merged[name] = scaled_by_depth(merged[name], origin, lines, depth)
    return merged


def merge_tensors(
    method: str,
    models: Sequence[Tensor | LowRank],
    base: Tensor | None = None,
    *,
    seed: int = 0,
    **parameters: Any,
) -> Tensor:
    """Merge one tensor of several models, in memory.

    Args:
        method: a name that `omnimerge methods` lists.
        models: the tensors, all of one shape; the target first for `adamms`. A `LowRank` is a task
            vector: what an expert adds to the base's tensor.
        base: the common ancestor's tensor; ignored by methods that do not need it.
        seed: for methods that draw at random.
        **parameters: the method's keywords.

    Returns:
        The merged tensor, float32.

    Raises:
        UnknownMethodError: if there is no such method.
        MethodError: if shapes, number of models, base or keywords do not fit, or a tensor holds
            NaN or infinity.
    """
    chosen = get_method(method)
    chosen.check(len(models), has_base=base is not None, parameters=parameters)
    _check_adapters(chosen, models)
    _check_tensors(chosen, models, base)
    return _merge(chosen, models, base, parameters, None, Place(seed=seed))


def _merge(
    method: MergeMethod,
    models: Sequence[Tensor | LowRank],
    base: Tensor | None,
    parameters: Mapping[str, Any],
    statistics: Any,
    place: Place,
) -> Tensor:
    factors = [model for model in models if isinstance(model, LowRank)]
    if method.low_rank and len(factors) == len(models) and base is not None:
        return added(base, method.merge_low_rank(factors, parameters, place=place))
    return method.merge(*_dense(models, base), parameters, statistics=statistics, place=place)


def _dense(
    models: Sequence[Tensor | LowRank], base: Tensor | None
) -> tuple[list[Tensor], Tensor | None]:
    """The models as tensors; factors are multiplied and added to the base."""
    tensors = [
        base.float() + model.dense().reshape(base.shape)  # type: ignore[union-attr, operator]
        if isinstance(model, LowRank)
        else model
        for model in models
    ]
    return tensors, base


def _check_adapters(method: MergeMethod, values: Iterable[Tensor | LowRank]) -> None:
    if method.adapters_only and not any(isinstance(value, LowRank) for value in values):
        raise MethodError(f"{method.name} merges LoRA adapters; give the factors, as LowRank")


def _is_merged(tensor: Tensor | LowRank) -> bool:
    return isinstance(tensor, LowRank) or tensor.is_floating_point()


def _check_names(models: Sequence[Mapping[str, Any]], base: Mapping[str, Tensor] | None) -> None:
    for mapping in [*models[1:], *([base] if base is not None else [])]:
        if odd := set(mapping) ^ set(models[0]):
            raise MethodError(f"{len(odd)} tensors are not in every model, such as {min(odd)!r}")


def _check_tensors(
    method: MergeMethod, models: Sequence[Tensor | LowRank], base: Tensor | None, name: str = ""
) -> None:
    what = f"tensor {name!r}" if name else "the tensor"
    tensors = [model for model in models if isinstance(model, Tensor)]
    for model in models:
        if isinstance(model, LowRank):
            if base is None:
                raise MethodError(f"{what} is given as factors, which need a base to be added to")
            if model.shape[0] * model.shape[1] != base.numel():
                raise MethodError(f"{what}: factors of {model.shape} for {tuple(base.shape)}")
    method.check_shapes(tensors, base, name)
    for number, model in enumerate(models):
        finite = model.isfinite() if isinstance(model, LowRank) else _finite(model)
        if not finite:
            raise MethodError(f"{what} of model {number} holds NaN or infinity")
    if base is not None and not _finite(base):
        raise MethodError(f"{what} of the base holds NaN or infinity")


def _finite(tensor: Tensor) -> bool:
    values = tensor.float() if tensor.element_size() < 4 else tensor
    # A finite sum needs finite entries; the slower look is for sums that overflow.
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())

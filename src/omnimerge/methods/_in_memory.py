"""Merge tensors or whole models that are in memory, by the name of a method."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from omnimerge.errors import MethodError
from omnimerge.methods._registry import get_method


def merge_state_dicts(
    method: str,
    models: Sequence[Mapping[str, Tensor]],
    base: Mapping[str, Tensor] | None = None,
    *,
    seed: int = 0,
    **parameters: Any,
) -> dict[str, Tensor]:
    """Merge several models in memory, tensor by tensor.

    Statistics of the whole model (a global threshold, norms) are taken over all tensors.

    Args:
        method: a name that `omnimerge methods` lists.
        models: one mapping of names to tensors per model; the target first for `adamms`. All have
            the same names.
        base: the common ancestor's tensors; ignored by methods that do not need it.
        seed: for methods that draw at random.
        **parameters: the method's keywords.

    Returns:
        Name -> merged tensor, float32, in the order of the first model. Integer tensors are the
        first model's.

    Raises:
        UnknownMethodError: if there is no such method.
        MethodError: if names, shapes, number of models, base or keywords do not fit.
    """
    chosen = get_method(method)
    chosen.check(len(models), has_base=base is not None, parameters=parameters)
    for mapping in [*models[1:], *([base] if base is not None else [])]:
        if odd := set(mapping) ^ set(models[0]):
            raise MethodError(f"{len(odd)} tensors are not in every model, such as {min(odd)!r}")

    def inputs(name: str) -> tuple[list[Tensor], Tensor | None]:
        return [model[name] for model in models], None if base is None else base[name]

    names = [name for name, tensor in models[0].items() if tensor.is_floating_point()]
    for name in names:
        chosen.check_shapes(*inputs(name), name)
    statistics = chosen.collect(lambda: map(inputs, names), len(models), parameters)
    merged = dict(models[0])
    for name in names:
        each, origin = inputs(name)
        merged[name] = chosen.merge(
            each, origin, parameters, statistics=statistics, name=name, seed=seed
        )
    return merged


def merge_tensors(
    method: str,
    models: Sequence[Tensor],
    base: Tensor | None = None,
    *,
    seed: int = 0,
    **parameters: Any,
) -> Tensor:
    """Merge one tensor of several models, in memory.

    Args:
        method: a name that `omnimerge methods` lists.
        models: the tensors, all of one shape; the target first for `adamms`.
        base: the common ancestor's tensor; ignored by methods that do not need it.
        seed: for methods that draw at random.
        **parameters: the method's keywords.

    Returns:
        The merged tensor, float32.

    Raises:
        UnknownMethodError: if there is no such method.
        MethodError: if shapes, number of models, base or keywords do not fit.
    """
    return get_method(method)(models, base, seed=seed, **parameters)

"""mergekit's gradients and filters, turned into overrides of a recipe."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Parameters = dict[str, Any]

# What a plain LLM's tensors are called, where a checkpoint is not here to be asked.
_LAYER_NAMES = (
    "input_layernorm.weight",
    *(f"self_attn.{part}_proj.{leaf}" for part in "qkvo" for leaf in ("weight", "bias")),
    "self_attn.q_norm.weight",
    "self_attn.k_norm.weight",
    "post_attention_layernorm.weight",
    *(f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
)
_OTHER_NAMES = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")


@dataclass(frozen=True)
class Site:
    """Where a tensor is.

    Attributes:
        name: the tensor's name.
        layer: its layer in the language model, or None.
    """

    name: str
    layer: int | None


def usual_sites(layers: int) -> list[Site]:
    """Return the tensors of a plain LLM.

    Args:
        layers: how many layers it has.

    Returns:
        The tensors of every layer, and those outside of them.
    """
    inner = [
        Site(f"model.layers.{layer}.{name}", layer)
        for layer in range(layers)
        for name in _LAYER_NAMES
    ]
    return inner + [Site(name, None) for name in _OTHER_NAMES]


def evaluate(setting: Any, name: str, t: float, read: Callable[[Any], Any]) -> Any:
    """Return what a setting is worth for one tensor.

    Args:
        setting: a scalar, a gradient (list of scalars), or conditions.
        name: the tensor's name; empty for one that no filter matches.
        t: how deep in the model the tensor is: 0 for the first layer and outside of the layers, 1
            for the last layer.
        read: turns a scalar of the file into a value.

    Returns:
        The value, or None where no condition holds.
    """
    if _is_gradient(setting):
        return read(_interpolated([read(value) for value in setting], t))
    if not isinstance(setting, (list, Mapping)):
        return read(setting)
    for condition in _conditions(setting):
        wanted = condition.get("filter")
        if wanted in (None, "*") or (name and wanted in name):
            return evaluate(condition.get("value"), name, t, read)
    return None


def _interpolated(values: Sequence[Any], t: float) -> Any:
    position = t * (len(values) - 1)
    low = int(position)
    if any(isinstance(value, bool) for value in values):
        return values[low]
    high, share = min(low + 1, len(values) - 1), position - low
    return (1 - share) * values[low] + share * values[high]


def malformed(setting: Any) -> str | None:
    """Return what is wrong with the form of a setting, or None.

    Args:
        setting: a scalar, a gradient, or conditions.

    Returns:
        The problem in words.
    """
    if not isinstance(setting, (list, Mapping)):
        return "a value is missing" if setting is None else None
    if _is_gradient(setting):
        return None
    for condition in _conditions(setting):
        if not isinstance(condition, Mapping) or set(condition) - {"filter", "value"}:
            return f"{condition!r} is neither a number nor a mapping of filter and value"
        if not isinstance(condition.get("filter"), (str, type(None))):
            return f"{condition['filter']!r} is no filter; give a part of tensor names"
        inner = condition.get("value")
        if isinstance(inner, Mapping) or (isinstance(inner, list) and not _is_gradient(inner)):
            return f"{inner!r} is no value; give a number or a list of numbers"
        if inner is None:
            return f"{dict(condition)} has no value"
    return None if setting else "an empty list says nothing"


def varies(setting: Any) -> bool:
    """Return whether a setting depends on the layer.

    Args:
        setting: a scalar, a gradient, or conditions.

    Returns:
        True if a gradient of more than one value is in it.
    """
    if _is_gradient(setting):
        return len(setting) > 1
    if not isinstance(setting, (list, Mapping)):
        return False
    return any(varies(condition.get("value")) for condition in _conditions(setting))


def filters(setting: Any) -> list[str]:
    """Return the filters of a setting that not every tensor passes.

    Args:
        setting: a scalar, a gradient, or conditions.

    Returns:
        The filters in order.
    """
    if not isinstance(setting, (list, Mapping)) or _is_gradient(setting):
        return []
    found = [condition.get("filter") for condition in _conditions(setting)]
    return [name for name in found if name not in (None, "*")]


def _is_gradient(setting: Any) -> bool:
    scalar = (bool, int, float, str)
    return (
        isinstance(setting, list)
        and bool(setting)
        and all(isinstance(value, scalar) for value in setting)
    )


def _conditions(setting: Any) -> list[Any]:
    return [setting] if isinstance(setting, Mapping) else list(setting)


Place = tuple[int | None, frozenset[str]]
"""A layer, or None, and the filters that a tensor in it passes."""


@dataclass(frozen=True)
class _Rule:
    """An override before it is written: it fits all tensors that pass these filters."""

    passed: frozenset[str]
    layers: tuple[int, int] | None
    parameters: Parameters

    def fits(self, place: Place) -> bool:
        layer, passed = place
        if not self.passed <= passed:
            return False
        if self.layers is None:
            return True
        return layer is not None and self.layers[0] <= layer <= self.layers[1]


def places(sites: Sequence[Site], names: Sequence[str]) -> dict[Place, Site]:
    """Sort tensors by layer and by the filters that they pass.

    Args:
        sites: the tensors.
        names: all filters.

    Returns:
        One tensor for every place at which there are tensors.
    """
    found: dict[Place, Site] = {}
    for site in sites:
        found.setdefault((site.layer, frozenset(n for n in names if n in site.name)), site)
    return found


def overrides(default: Parameters, wanted: Mapping[Place, Parameters]) -> list[dict[str, Any]]:
    """Return the overrides that give every place its parameters.

    Args:
        default: the recipe's parameters.
        wanted: the parameters of every place.

    Returns:
        Entries for the recipe's `overrides`, none without need.
    """
    rules = _rules(wanted)
    for rule in reversed(list(rules)):
        fewer = [other for other in rules if other is not rule]
        if all(_result(fewer, place, default) == value for place, value in wanted.items()):
            rules = fewer
    return [_written(rule, default) for rule in rules]


def _rules(wanted: Mapping[Place, Parameters]) -> list[_Rule]:
    """One rule per filters passed and run of equal layers; the more filters, the earlier."""
    sets = sorted(dict.fromkeys(passed for _, passed in wanted), key=lambda p: (-len(p), sorted(p)))
    inner = [rule for passed in sets for rule in _runs(passed, wanted)]
    outer = [_Rule(p, None, wanted[None, p]) for p in sets if (None, p) in wanted]
    return inner + outer


def _runs(passed: frozenset[str], wanted: Mapping[Place, Parameters]) -> Iterator[_Rule]:
    layers = sorted(layer for layer, p in wanted if p == passed and layer is not None)
    start = 0
    for end in range(1, len(layers) + 1):
        value = wanted[layers[start], passed]
        if end < len(layers):
            follows = layers[end] == layers[end - 1] + 1
            if follows and wanted[layers[end], passed] == value:
                continue
        yield _Rule(passed, (layers[start], layers[end - 1]), value)
        start = end


def _result(rules: Sequence[_Rule], place: Place, default: Parameters) -> Parameters:
    return next((rule.parameters for rule in rules if rule.fits(place)), default)


def _written(rule: _Rule, default: Parameters) -> dict[str, Any]:
    match = {}
    if rule.layers:
        low, high = rule.layers
        match["layers"] = str(low) if low == high else f"{low}-{high}"
    if rule.passed:
        match["name"] = _pattern(rule.passed)
    changed = {k: v for k, v in rule.parameters.items() if default.get(k) != v}
    return {"match": match, "parameters": changed or rule.parameters}


def _pattern(passed: frozenset[str]) -> str:
    """A regular expression for names that hold all of these texts."""
    longest = sorted(p for p in passed if not any(p != q and p in q for q in passed))
    if len(longest) == 1:
        return re.escape(longest[0])
    return "^" + "".join(f"(?=.*{re.escape(text)})" for text in longest)

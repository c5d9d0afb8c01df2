"""What transformers calls a checkpoint's tensors when it loads them into a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    get_model_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from omnimerge.compose.names import MODEL_TYPE, TEXT_PREFIX


@dataclass(frozen=True)
class Renamed:
    """Where a tensor goes.

    Attributes:
        plain: its name in the model, with its own leaf, as on disk, if it is stacked or split.
        final: the model's tensors that it becomes, or becomes a part of.
        converted: whether it is stacked or split.
    """

    plain: str
    final: tuple[str, ...]
    converted: bool


def renamed(model: Any, names: Sequence[str]) -> dict[str, Renamed]:
    """Say where each tensor of a checkpoint goes.

    Args:
        model: a transformers model; on the meta device is enough.
        names: the tensors on disk.

    Returns:
        Name -> where it goes, whether or not the model has such tensors.
    """
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    others = [rule for rule in rules if not isinstance(rule, WeightRenaming)]
    state, prefix = model.state_dict(), model.base_model_prefix

    def placed(name: str) -> str:
        found: str = rename_source_key(name, [], [], prefix, state)[0]
        stripped = found.removeprefix("model.")  # LightOnOCR's base model names no prefix
        return stripped if found not in state and stripped in state else found

    result = {}
    for name in names:
        plain = rename_source_key(name, renamings, [])[0]
        final: tuple[str, ...] = (placed(plain),)
        converted = False
        for rule in others:
            changed, pattern = rule.rename_source_key(plain)
            if pattern is not None:
                first = rule.target_patterns[0]
                each = [changed.replace(first, target, 1) for target in rule.target_patterns]
                final, converted = tuple(map(placed, each)), True
                break
        inner = plain.removeprefix(f"{prefix}.") if prefix else plain
        result[name] = Renamed(inner if converted else final[0], final, converted)
    return result


def conversions_of(model: Any) -> str:
    """Return by which name transformers knows how a model's tensors are stacked or split.

    Args:
        model: a base model.

    Returns:
        A class or a ``model_type``; empty if there are no such rules.
    """
    for name in (type(model).__name__, str(model.config.model_type)):
        rules = get_checkpoint_conversion_mapping(name)
        if rules is not None:
            return name if _stacking(rules) else ""
    return ""


def convert_text_like(name: str) -> None:
    """Let the text model of composed models be loaded and saved by the rules of another model.

    Transformers has the rules for the experts of a multimodal model under that model's name, not
    under that of its text model, which is all that a composed model has of it.

    Args:
        name: what `conversions_of` returned.
    """
    rules = _stacking(get_checkpoint_conversion_mapping(name) or []) if name else []
    base, _, scope = TEXT_PREFIX.rstrip(".").partition(".")
    for rule in rules:
        rule.scope_prefix, rule.base_model_prefix = scope, base
    register_checkpoint_conversion_mapping(MODEL_TYPE, rules, overwrite=True)


def _stacking(rules: Sequence[Any]) -> list[Any]:
    return [rule for rule in rules if isinstance(rule, WeightConverter)]

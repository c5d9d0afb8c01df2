"""The text model of a composed model: its class, also where transformers' AutoModel knows none."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from transformers import AutoModel, PreTrainedModel


def text_class(decoder: Any, config: Any) -> str:
    """Return the class of a text model, where it has to be named.

    Args:
        decoder: the text model.
        config: its configuration.

    Returns:
        The name; empty where `AutoModel` gives this class for the configuration.
    """
    known = AutoModel._model_mapping.get(type(config), None)
    return "" if known is type(decoder) else type(decoder).__name__


def text_model(config: Any, name: str) -> Any:
    """Build a text model.

    Args:
        config: its configuration.
        name: its class, beside the configuration's in transformers; empty for `AutoModel`'s.

    Returns:
        The model.

    Raises:
        ValueError: if transformers has no such class.
    """
    if not name:
        return AutoModel.from_config(config)
    home = type(config).__module__
    if not home.startswith("transformers.models."):
        raise ValueError(f"{home} is no module of transformers, so {name} is not looked up there")
    module = import_module(home.replace(".configuration_", ".modeling_"))
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ValueError(f"{module.__name__} has no model {name!r}; use a version that has it")
    model: Any = found
    return model._from_config(config)

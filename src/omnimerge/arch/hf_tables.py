"""What only transformers knows. The sole file of this room that imports it, and only when asked."""

from __future__ import annotations

from typing import Any


def config_defaults(model_type: str) -> dict[str, Any]:
    """Return the default config of a text model type.

    Published configs leave out values that equal their class's defaults.

    Args:
        model_type: for example ``llama``.

    Returns:
        The defaults, empty if transformers does not know the type.
    """
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        return {}
    defaults: dict[str, Any] = CONFIG_MAPPING[model_type]().to_dict()
    defaults.pop("head_dim", None)  # follows from the heads and the shapes
    return defaults

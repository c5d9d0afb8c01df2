"""What only transformers knows. The sole file of this room that imports it, and only when asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omnimerge.errors import LayoutError


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


def parameter_modules(folder: Path) -> dict[str, tuple[str, str]]:
    """Return the modules of a checkpoint's architecture, built without memory.

    Args:
        folder: the checkpoint's folder.

    Returns:
        Parameter name in memory -> (module name, kind): `linear`, `embedding`, `convolution`,
        `plain` for another module without children, or `inner`.

    Raises:
        LayoutError: if transformers does not know the architecture.
    """
    import torch
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
        architecture = getattr(transformers, (config.architectures or [""])[0])
        with torch.device("meta"):
            model = architecture(config)
    except Exception as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise LayoutError(
            f"transformers {transformers.__version__} does not know the architecture of {folder}, "
            f"so that the modules of an adapter cannot be named ({reason})"
        ) from error
    kinds = {
        "linear": torch.nn.Linear,
        "embedding": torch.nn.Embedding,
        "convolution": torch.nn.modules.conv._ConvNd,
    }
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        kind = "inner" if next(module.children(), None) is not None else "plain"
        kind = next((k for k, cls in kinds.items() if isinstance(module, cls)), kind)
        for leaf, _ in module.named_parameters(recurse=False):
            found[f"{name}.{leaf}"] = (name, kind)
    return found

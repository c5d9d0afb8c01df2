"""What only transformers knows. The sole file of this room that imports it, and only when asked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omnimerge.checkpoint.small_file import read_json
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


def language_model_names(folder: Path, names: Sequence[str]) -> dict[str, str] | None:
    """Ask transformers where the language model of a checkpoint lies.

    Its tables bring names on disk to those in memory, where the model says what its decoder, its
    embedding and its head are. They are internal (`conversion_mapping`, `core_model_loading`), so
    whatever goes wrong in them counts as no answer.

    Args:
        folder: the checkpoint's folder.
        names: its tensor names on disk.

    Returns:
        `layers` (with ``{i}``), `embed`, `norm` and `head`, as on disk and without leaves; a tied
        head has a name that no tensor bears. None if transformers cannot tell.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key

        model = _on_meta(folder)
        transforms = get_model_conversion_mapping(model)
        renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        modules = {id(module): name for name, module in model.named_modules()}
        stack, decoder = _largest_stack(model.get_decoder())
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        state = model.state_dict()
        disk = {}
        for name in names:
            memory, _ = rename_source_key(name, renamings, [], model.base_model_prefix, state)
            disk[memory] = name
        inner = f"{modules[id(stack)]}.0."
        first = next(name for name in disk if name.startswith(inner))
        width = embedding.weight.shape[1]
        norm = [
            name
            for name, module in decoder.named_children()
            if getattr(getattr(module, "weight", None), "shape", None) == (width,)
        ][-1]
        found = {
            "layers": _prefix(disk[first], first.removeprefix(inner)),
            "embed": _stem(disk[f"{modules[id(embedding)]}.weight"]),
            "norm": _stem(disk[f"{modules[id(decoder)]}.{norm}.weight"]),
            "head": "lm_head",
        }
        if head is not None and f"{modules[id(head)]}.weight" in disk:
            found["head"] = _stem(disk[f"{modules[id(head)]}.weight"])
        return found
    except Exception:  # noqa: BLE001 - unknown classes and odd configs raise whatever they like
        return None


def _largest_stack(module: Any) -> tuple[Any, Any]:
    """The list of layers with the most parameters, and the module that holds it."""
    stacks = {}
    for _, parent in module.named_modules():
        for _, child in parent.named_children():
            names = [name for name, _ in child.named_children()]
            if names and all(name.isdigit() for name in names):
                stacks[sum(p.numel() for p in child.parameters())] = child, parent
    return stacks[max(stacks)]


def _prefix(name: str, rest: str) -> str:
    """``a.layers.0.q.weight`` without ``q.weight``, the number as ``{i}``."""
    if not name.endswith(rest):
        raise ValueError(f"{name} does not end in {rest}")
    return re.sub(r"\.0\.$", ".{i}.", name.removesuffix(rest))


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _on_meta(folder: Path) -> Any:
    """The model of a checkpoint's architecture, built without memory."""
    import torch
    import transformers

    _check_counts(read_json(folder / "config.json"))  # a config's class may build lists already
    # A checkpoint's own code is never run here, and nobody is asked whether it may.
    config = transformers.AutoConfig.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=False
    )
    architecture = getattr(transformers, (config.architectures or [""])[0])
    with torch.device("meta"):
        return architecture(config)


_COUNTS = re.compile(r".*(layers?|depths?|experts|blocks|stages)")
_MOST = 10_000


def _check_counts(config: Mapping[str, Any]) -> None:
    """Refuse to build as many modules as no model has, whatever a config claims."""
    for key, value in config.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        for each in values:
            if isinstance(each, Mapping):
                _check_counts(each)
            elif isinstance(each, int) and each > _MOST and _COUNTS.fullmatch(str(key)):
                raise ValueError(f"{key} is {each}")


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
        model = _on_meta(folder)
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

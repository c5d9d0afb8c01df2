"""PEFT LoRA adapters: what one changes, parameter by parameter."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omnimerge.checkpoint.headers import TensorMeta
from omnimerge.checkpoint.links import check_inside
from omnimerge.checkpoint.locate import locate
from omnimerge.checkpoint.reader import Checkpoint, read_header, stamp
from omnimerge.checkpoint.small_file import read_json
from omnimerge.errors import CheckpointError, suggestion

if TYPE_CHECKING:
    from pydantic_core import SchemaValidator

CONFIG_NAME = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

# Options with which what is added to a weight is not B·A·scale, or not added at all times.
_UNSUPPORTED = {
    "alora_invocation_tokens": "it is active after certain tokens only",
    "arrow_config": "it routes between adapters",
    "kasa_config": "KaSA changes the base's weights",
    "layer_replication": "it adds layers",
    "target_parameters": "it adapts parameters that are no modules",
    "trainable_token_indices": "it holds rows of the vocabulary",
    "use_bdlora": "its factors are block-diagonal",
    "use_qalora": "its inputs are pooled",
}
_ALTERED_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")

_PARTS = {
    "a": r"lora_(?:embedding_)?A(?:\.default)?(?:\.weight)?",
    "b": r"lora_(?:embedding_)?B(?:\.default)?(?:\.weight)?",
    "shift": r"lora_B(?:\.default)?\.bias",
    "magnitude": r"lora_magnitude_vector(?:\.default)?(?:\.weight)?",
    "whole": r"(?:base_layer|modules_to_save(?:\.default)?|original_module)\.(?P<leaf>weight|bias)",
}


@dataclass(frozen=True, slots=True)
class Change:
    """What an adapter does to one parameter.

    Attributes:
        a: tensor of the factor A, or None.
        b: tensor of the factor B, or None.
        scale: factor on B·A, or on `shift`.
        transposed: whether the parameter is stored as (in, out), so that B·A is transposed.
        magnitude: DoRA's tensor of norms, or None.
        whole: tensor that replaces the base's, or None.
        shift: tensor that is added, times `scale`, or None.
    """

    a: str | None = None
    b: str | None = None
    scale: float = 1.0
    transposed: bool = False
    magnitude: str | None = None
    whole: str | None = None
    shift: str | None = None

    @property
    def low_rank(self) -> bool:
        """Whether the change is B·A·scale and nothing else."""
        return not (self.magnitude or self.whole or self.shift)


class Adapter:
    """A PEFT LoRA adapter, opened. See `Adapter.open`.

    Args:
        reference: what the user wrote.
        store: its weight file.
        config: ``adapter_config.json``.
        changes: parameter, as PEFT names it without ``base_model.model.`` -> what is done to it.
    """

    def __init__(
        self,
        reference: str,
        store: Checkpoint,
        config: Mapping[str, Any],
        changes: Mapping[str, Change],
    ) -> None:
        self.reference = reference
        self.store = store
        self.config = config
        self.changes = changes

    @classmethod
    def open(cls, reference: str | Path) -> Adapter:
        """Open an adapter: its config and the header of its weights.

        Args:
            reference: folder, or Hub id with an optional ``@revision``.

        Returns:
            The opened adapter.

        Raises:
            CheckpointError: if it is missing, damaged, no LoRA adapter, or of a form whose weights
                are not the base's plus B·A.
        """
        folder = locate(reference)
        config_file = folder / CONFIG_NAME
        if not config_file.is_file():
            raise CheckpointError(f"{folder} has no {CONFIG_NAME}; is it a PEFT adapter's folder?")
        config = read_json(config_file)
        _check_config(config, folder)
        file = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
        if file is None:
            raise CheckpointError(f"{folder} holds neither {' nor '.join(_WEIGHTS)}")
        check_inside(folder, file)
        stamps = {each: stamp(each) for each in (config_file, file)}
        tensors = {meta.name: meta for meta in read_header(file)}
        store = Checkpoint(str(reference), folder, config, tensors, (file,))
        store.stamps = stamps
        return cls(str(reference), store, config, _changes(tensors, config, folder))


def _check_config(config: Mapping[str, Any], folder: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{folder} is a {kind} adapter; only LORA can be merged")
    for key, why in _UNSUPPORTED.items():
        if config.get(key):
            raise CheckpointError(f"{folder} has {key} set, which cannot be merged: {why}")
    init = str(config.get("init_lora_weights", "")).lower()
    if init.startswith(_ALTERED_BASE):
        raise CheckpointError(
            f"{folder} was started by {init}, which alters the base's weights; save it as a plain "
            "LoRA with PEFT's path_initial_model_for_weight_conversion"
        )
    if config.get("bias") not in (None, "none", "all", "lora_only"):
        raise CheckpointError(f"{folder} has bias {config['bias']!r}, which is not known")


def _changes(
    tensors: Mapping[str, TensorMeta], config: Mapping[str, Any], folder: Path
) -> dict[str, Change]:
    found: dict[str, dict[str, Any]] = {}
    for key in tensors:
        name, part = _parse(key, folder)
        if part in found.setdefault(name, {}):
            raise CheckpointError(f"{folder} holds {name!r} twice, the second time as {key!r}")
        found[name][part] = key
    if not found:
        raise CheckpointError(f"{folder} holds no tensors")
    for name, parts in found.items():
        module = name.rpartition(".")[0]
        if ("a" in parts) != ("b" in parts) or ("magnitude" in parts and "a" not in parts):
            raise CheckpointError(f"{folder} lacks a factor of {name!r}: it has {sorted(parts)}")
        if "a" in parts:
            _check_factors(tensors[parts["a"]], tensors[parts["b"]], folder)
            rank = _rank(tensors[parts["a"]], module, config, folder)
            embedding = "lora_embedding" in parts["a"]
            parts["transposed"] = embedding or bool(config.get("fan_in_fan_out"))
            parts["scale"] = _scale(rank, module, config, folder)
        elif "shift" in parts:
            weight = found.get(f"{module}.weight", {})
            if "a" not in weight:
                raise CheckpointError(f"{folder} holds lora_B.bias of {module!r} without factors")
            _check_factors(tensors[weight["a"]], tensors[weight["b"]], folder)
            rank = tensors[weight["a"]].shape[0]
            parts["scale"] = _scale(rank, module, config, folder)
    return {name: Change(**parts) for name, parts in found.items()}


def _parse(key: str, folder: Path) -> tuple[str, str]:
    """From a key of the file to (parameter, what the tensor is to it)."""
    name = key.removeprefix("base_model.model.")
    for part, pattern in _PARTS.items():
        match = re.fullmatch(rf"(?P<module>.+)\.{pattern}", name)
        if match:
            leaf = match.groupdict().get("leaf") or ("bias" if part == "shift" else "weight")
            return f"{match['module']}.{leaf}", part
    if "lora_" in name or "trainable_tokens" in name or "." not in name:
        raise CheckpointError(f"{folder} holds {key!r}, of a kind that is not known")
    return name, "whole"


def _check_factors(a: TensorMeta, b: TensorMeta, folder: Path) -> None:
    for meta in (a, b):
        if len(meta.shape) < 2 or not meta.numel:
            raise CheckpointError(f"{folder}: {meta.name!r} of shape {meta.shape} is no factor")


def _rank(meta: TensorMeta, module: str, config: Mapping[str, Any], folder: Path) -> int:
    rank = meta.shape[0]
    said = _pattern(config, "rank_pattern", module, config.get("r", rank), folder)
    if said != rank:
        raise CheckpointError(
            f"{folder}: the factors of {module!r} have rank {rank}, its config says {said}"
        )
    return rank


def _scale(rank: int, module: str, config: Mapping[str, Any], folder: Path) -> float:
    alpha = _pattern(config, "alpha_pattern", module, config.get("lora_alpha", 8), folder)
    try:
        scale = float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    except (TypeError, ValueError, OverflowError):
        scale = math.nan
    if not math.isfinite(scale):
        raise CheckpointError(f"{folder}: the alpha of {module!r} is {alpha!r}, which is no number")
    return scale


def _pattern(config: Mapping[str, Any], key: str, module: str, default: Any, folder: Path) -> Any:
    """The value of the first pattern that fits the end of a module's name, as PEFT has it."""
    patterns = config.get(key) or {}
    if not isinstance(patterns, Mapping):
        raise CheckpointError(f"{folder}: {key} is no mapping of patterns")
    for pattern, value in patterns.items():
        if module == pattern or module.endswith(f".{pattern}"):
            return value
        if _fits(pattern, module, f"{folder}: {key}"):
            return value
    return default


def _fits(pattern: str, module: str, where: str) -> bool:
    from pydantic_core import SchemaError, ValidationError

    try:
        _linear(rf"^(.*\.)?({pattern})$").validate_python(module)
    except ValidationError:
        return False
    except SchemaError as error:
        raise CheckpointError(
            f"{where}: {pattern[:200]!r} is no pattern that can be used"
        ) from error
    return True


@lru_cache(maxsize=4096)
def _linear(pattern: str) -> SchemaValidator:
    """A matcher whose time grows with the text only, whatever the pattern; `re` has no such one."""
    from pydantic_core import SchemaValidator, core_schema

    return SchemaValidator(core_schema.str_schema(pattern=pattern, regex_engine="rust-regex"))


def unresolved(adapter: Adapter, missing: Sequence[str], known: Collection[str]) -> CheckpointError:
    """Make the error for parameters of an adapter that the base does not have.

    Args:
        adapter: the adapter.
        missing: its parameters without a counterpart.
        known: the base's tensor names.

    Returns:
        The error, to be raised.
    """
    hint = suggestion(missing[0], known)
    if missing[0].startswith("lm_head."):
        hint = "; the base ties its head to its embedding, so that changing one changes both"
    return CheckpointError(
        f"{adapter.store.folder} changes {len(missing)} parameters that the base does not have, "
        f"such as {missing[0]!r}{hint}"
    )

"""Load a model for generation, and refuse one whose weights do not all fit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from omnimerge.checkpoint.remote import Remote
from omnimerge.checkpoint.small_file import check_small_files
from omnimerge.errors import GenerationError, one_line

DTYPES = ("auto", "float32", "bfloat16", "float16")

_SHOWN = 5
_REMOTE = (
    "AutoModelForMultimodalLM",
    "AutoModelForImageTextToText",
    "AutoModelForVision2Seq",
    "AutoModelForCausalLM",
    "AutoModel",
)


def check_device(device: str) -> None:
    """Refuse a device that this machine does not have.

    Args:
        device: a torch device, such as ``cpu`` or ``cuda:0``.

    Raises:
        GenerationError: if nothing can be put on it.
    """
    try:
        torch.ones(1, device=device).add_(1).item()  # an old GPU gives memory and runs nothing
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise GenerationError(
            f"device {device!r} cannot be used here ({one_line(error)}); use cpu, or a device that "
            "this machine and this torch have"
        ) from error


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to answer.

    Attributes:
        model: a transformers model in evaluation mode.
        multimodal: whether it takes more than text.
        prefix: what the names of its tensors on disk begin with, where the folder holds further
            models that do not take part in answering (``thinker.`` of Omni models), else empty.
    """

    model: Any
    multimodal: bool
    prefix: str


def load_model(folder: Path, *, device: str, dtype: str, trust_remote_code: bool) -> LoadedModel:
    """Load the model of a checkpoint folder.

    Args:
        folder: the checkpoint.
        device: a torch device, such as ``cpu`` or ``cuda:0``.
        dtype: one of `DTYPES`; ``auto`` is float32 on a CPU, the checkpoint's dtype elsewhere.
        trust_remote_code: whether Python code in the folder may run.

    Returns:
        The model.

    Raises:
        GenerationError: if the folder holds no generating model, or its tensors are not exactly
            those of the model.
        CheckpointError: if a small file of the folder must not be opened, such as a pipe.
    """
    if dtype not in DTYPES:
        raise GenerationError(f"unknown dtype {dtype!r}; use one of {', '.join(DTYPES)}")
    if remote := Remote.of(folder):
        raise GenerationError(
            f"{remote.url} can be merged from where it is, but not run; download it, and give the "
            "folder"
        )
    if not (folder / "config.json").is_file():
        raise GenerationError(f"{folder} has no config.json; give the folder of a checkpoint")
    check_small_files(folder)
    if dtype == "auto" and device.startswith("cpu"):
        dtype = "float32"
    check_device(device)
    options = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    config, prefix = _config(folder, options)
    loader, multimodal = _auto_class(config, folder)
    try:
        model, info = loader.from_pretrained(
            str(folder),
            config=config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are listed in `info`, and refused below
            **options,
        )
        model = model.to(device)
    except Exception as error:
        raise GenerationError(
            f"cannot load {folder} on {device} ({one_line(error)}); check the folder with "
            "`omnimerge inspect`"
        ) from error
    _check_keys(folder, info, prefix)
    return LoadedModel(model.eval(), multimodal, prefix)


def _config(folder: Path, options: dict[str, Any]) -> tuple[Any, str]:
    """The config of the part that answers, and the prefix of its tensors on disk."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(folder), **options)
    except Exception as error:
        hint = "" if options["trust_remote_code"] else ", or allow its code with trust_remote_code"
        raise GenerationError(
            f"cannot read the config of {folder} ({one_line(error)}); give a folder that this "
            f"version of transformers knows{hint}"
        ) from error
    thinker = getattr(config, "thinker_config", None)
    return (config, "") if thinker is None else (thinker, "thinker.")


def _auto_class(config: Any, folder: Path) -> tuple[Any, bool]:
    """The auto class of the config, and whether its models take more than text."""
    import transformers
    from transformers.models.auto import modeling_auto

    kind = config.model_type
    parts = any(hasattr(config, part) for part in ("vision_config", "audio_config"))
    for name, table, multimodal in (
        ("AutoModelForMultimodalLM", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", True),
        ("AutoModelForImageTextToText", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", True),
        ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", False),
        # Some audio models are listed here only (audioflamingo3, in transformers 5.23).
        ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", parts),
    ):
        auto = getattr(transformers, name, None)
        if kind in getattr(modeling_auto, table, {}) or _is_registered(auto, config):
            return auto, multimodal
    offered = getattr(config, "auto_map", None) or {}
    for name in _REMOTE:
        if name in offered and hasattr(transformers, name):
            return getattr(transformers, name), (folder / "preprocessor_config.json").is_file()
    raise GenerationError(
        f"model type {kind!r} of {folder} does not generate text with transformers "
        f"{transformers.__version__}; give a multimodal or causal language model"
    )


def _is_registered(auto: Any, config: Any) -> bool:
    """Whether a class was registered for the config from outside, as for composed models."""
    return type(config) in getattr(getattr(auto, "_model_mapping", None), "_extra_content", {})


def _check_keys(folder: Path, info: dict[str, Any], prefix: str) -> None:
    """Refuse a model of which parts were left at random, or weights were left over."""
    problems = []
    for kind in ("missing", "unexpected", "mismatched"):
        found: Iterable[Any] = info.get(f"{kind}_keys") or ()
        names = sorted(name if isinstance(name, str) else str(name[0]) for name in found)
        if kind == "unexpected" and prefix:
            names = [name for name in names if name.startswith(prefix)]
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            problems.append(f"{len(names)} {kind} ({', '.join(names[:_SHOWN])}{more})")
    if problems:
        raise GenerationError(
            f"the tensors of {folder} are not those of its model type: {'; '.join(problems)}; "
            "check config.json against the weights with `omnimerge inspect`"
        )

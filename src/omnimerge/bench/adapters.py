"""LoRA adapters of miniatures, by PEFT."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch

from omnimerge.bench.line import BenchError

Draw = Callable[[str], torch.Generator]
"""Name of a matrix -> where its first numbers come from."""


def check_peft() -> None:
    """Refuse to go on without PEFT.

    Raises:
        BenchError: if it is not installed.
    """
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise BenchError("LoRA experts are trained with PEFT: pip install peft") from error


def with_adapter(model: Any, *, rank: int, matrices: str, draw: Draw) -> Any:
    """Put a fresh adapter on a model; its first matrices are drawn as PEFT does, but reproducibly.

    Args:
        model: the model.
        rank: of the adapter, and its `lora_alpha`.
        matrices: regular expression on names of modules.
        draw: tells the generator of each matrix.

    Returns:
        PEFT's model; only what the adapter adds learns.
    """
    import peft

    settings = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=matrices)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks by a name that transformers left
        made = peft.get_peft_model(model, settings)  # what it draws is replaced just below
    for key, weight in made.named_parameters():
        if "lora_A" in key:
            bound = 1 / math.sqrt(weight.shape[1])
            weight.data.uniform_(-bound, bound, generator=draw(key))
    return made

"""Models with fresh weights, each of which is a function of a seed and of its name."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from transformers import GenerationConfig

# What a layer adds starts small beside what it is added to.
_ADDED = ("o_proj.weight", "down_proj.weight", "merger.mlp.2.weight", "projector.linear_2.weight")


def fresh_model(kind: type[Any], config: Any, *, seed: int, text: Mapping[str, Any]) -> Any:
    """Build a model with fresh weights.

    Args:
        kind: the model's class.
        config: its configuration.
        seed: every weight is a function of this seed and the weight's name.
        text: configuration of its language model, with the tokens that generation needs.

    Returns:
        The model, in float32, which generates greedily.
    """
    # The constructor draws from the global generator; what it draws is replaced just below.
    with torch.random.fork_rng(devices=[]):
        built = kind(config)
    for key, weight in built.named_parameters():
        _initialise(key, weight.data, seed)
    special = {name: text[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    built.generation_config = GenerationConfig(do_sample=False, **special)
    return built


def _initialise(key: str, weight: torch.Tensor, seed: int) -> None:
    """Fill one weight: norms and layer scales with one, biases with zero, the others with noise."""
    if key.endswith("bias"):
        weight.zero_()
    elif weight.ndim == 1 and "newline" not in key:
        weight.fill_(1.0)
    else:
        digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        weight.normal_(0.0, _spread(key, weight), generator=generator)


def _spread(key: str, weight: torch.Tensor) -> float:
    """Return the standard deviation of a fresh weight."""
    if "embed_tokens" in key or "position_embeddings" in key:
        return 0.2
    fan_in = weight[0].numel() if weight.ndim > 1 else weight.numel()
    return (0.35 if key.endswith(_ADDED) else 1.0) / math.sqrt(fan_in)

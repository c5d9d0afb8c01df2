"""PEFT adapters for the tiny models, with factors that are not zero, and PEFT's own merge of them."""

from __future__ import annotations

import warnings
from pathlib import Path

import peft
import torch

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def save(model, folder: Path, *, seed: int = 0, size: float = 0.05, dtype=None, **options):
    """Put a LoRA on a model, fill it at random, save it; return PEFT's merged state dict."""
    config = peft.LoraConfig(**{"r": 4, "target_modules": ALL_LINEAR, **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of embeddings, ties and Conv1D
        adapted = peft.get_peft_model(model, config)
        _fill(adapted, seed, size, dtype)
        adapted.save_pretrained(folder)
        merged = adapted.merge_and_unload()
    return {name: tensor.detach().clone() for name, tensor in merged.state_dict().items()}


def _fill(adapted, seed, size, dtype):
    for number, (name, parameter) in enumerate(adapted.named_parameters()):
        if not parameter.requires_grad:
            continue
        generator = torch.Generator().manual_seed(1000 * seed + number)
        noise = torch.randn(parameter.shape, generator=generator) * size
        if "lora_magnitude" in name or "lora_" not in name:
            parameter.data += noise * (parameter.data.abs().mean() + 0.01)
        else:
            parameter.data = noise
        if dtype is not None:
            parameter.data = parameter.data.to(dtype)

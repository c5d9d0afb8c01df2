"""Inputs with an image or a sound for the tiny models of `tiny_multimodal`, padded on the left.

Made by hand, so that architectures can be tried whose processors need what is not installed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Inputs = dict[str, Any]

MEDIA, START, END = 10, 12, 13  # token ids of the tiny configurations
LENGTHS = (5, 9, 6)  # tokens of text per sample
FIRST_WORD, LAST_WORD = 20, 95


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _words(tokens: int, before: tuple[int, ...] = (), after: tuple[int, ...] = ()) -> Inputs:
    random = torch.Generator().manual_seed(1)
    rows = []
    for length in LENGTHS:
        text = torch.randint(FIRST_WORD, LAST_WORD, (length,), generator=random).tolist()
        rows.append([1, *before, *[MEDIA] * tokens, *after, *text])
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def _patches() -> Inputs:
    words = _words(4, (START,), (END,))
    return {
        **words,
        "mm_token_type_ids": (words["input_ids"] == MEDIA).int(),
        "pixel_values": _random(16 * len(LENGTHS), 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * len(LENGTHS)),
    }


def _picture(tokens: int, *shape: int, **more: Any) -> Callable[[], Inputs]:
    return lambda: {**_words(tokens), "pixel_values": _random(len(LENGTHS), *shape), **more}


def _token_types(make: Callable[[], Inputs], media: int) -> Callable[[], Inputs]:
    def made() -> Inputs:
        inputs = make()
        types = (inputs["input_ids"] == MEDIA).long() * media
        return {**inputs, "token_type_ids": types}

    return made


def _mllama() -> Inputs:
    words = _words(1)
    shape = words["input_ids"].shape
    mask = torch.zeros((*shape, 1, 4), dtype=torch.long)
    mask[..., 0] = 1
    return {
        **words,
        "pixel_values": _random(len(LENGTHS), 1, 4, 3, 28, 28),
        "aspect_ratio_ids": torch.ones((len(LENGTHS), 1), dtype=torch.long),
        "aspect_ratio_mask": torch.tensor([[[1, 0, 0, 0]]] * len(LENGTHS)),
        "cross_attention_mask": mask,
    }


def _qwen2_audio() -> Inputs:
    sounds = {"feature_attention_mask": torch.ones((len(LENGTHS), 100), dtype=torch.long)}
    return {**_words(25), "input_features": _random(len(LENGTHS), 16, 100), **sounds}


def _llava_next() -> Inputs:
    sizes = torch.tensor([[28, 56]] * len(LENGTHS))
    return {**_picture(4 + 8 + 2, 3, 3, 28, 28)(), "image_sizes": sizes}


def _llava_onevision() -> Inputs:
    sizes = torch.tensor([[28, 28]] * len(LENGTHS))
    return {**_picture(4 + 4 + 2, 2, 3, 28, 28)(), "image_sizes": sizes}


def _mistral3() -> Inputs:
    sizes = torch.tensor([[28, 28]] * len(LENGTHS))
    return {**_picture(1, 3, 28, 28)(), "image_sizes": sizes}


MAKERS: dict[str, Callable[[], Inputs]] = {
    "qwen2_vl": _patches,
    "qwen2_5_vl": _patches,
    "qwen3_vl": _patches,
    "qwen3_vl_moe": _patches,
    "qwen3_5": _patches,
    "glm4v": _patches,
    "llava": _picture(4, 3, 28, 28),
    "vipllava": _picture(4, 3, 28, 28),
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "internvl": _picture(1, 3, 28, 28),
    "idefics2": _picture(4, 1, 3, 28, 28),
    "idefics3": _picture(1, 1, 3, 28, 28),
    "smolvlm": _picture(1, 1, 3, 28, 28),
    "gemma3": _token_types(_picture(4, 3, 56, 56), 1),
    "paligemma": _token_types(_picture(4, 3, 28, 28), 0),
    "aya_vision": _picture(1, 3, 28, 28),
    "mistral3": _mistral3,
    "mllama": _mllama,
    "qwen2_audio": _qwen2_audio,
    "fuyu": _picture(1, 1, 12),
    "chameleon": _picture(64, 3, 8, 8),
    "blip-2": _picture(2, 3, 28, 28),
}


def inputs(model_type: str) -> Inputs:
    """Make a batch of three samples of different lengths, each with one image or sound."""
    return MAKERS[model_type]()

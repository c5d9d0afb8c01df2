"""The miniatures of the capability benchmark: configurations, processors, files on disk.

One small Qwen2 under two real architectures, `mini-internvl` and `mini-qwen2-vl`, laid out as the
published checkpoints are: same file names, same tensor names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
)

from omnimerge.bench import vocabulary
from omnimerge.bench.capabilities import words
from omnimerge.bench.capabilities.tasks import IMAGE_SIZE
from omnimerge.bench.fresh import fresh_model
from omnimerge.bench.line import BenchError
from omnimerge.bench.saving import save_weights
from omnimerge.generate.processor import without_video

INTERNVL = "mini-internvl"
QWEN2VL = "mini-qwen2-vl"
NAMES = (INTERNVL, QWEN2VL)

VOCABULARY_SIZE = 512
HIDDEN_SIZE = 96
PATCH_SIZE = 6
VISUAL_TOKENS = (IMAGE_SIZE // PATCH_SIZE // 2) ** 2

# As Phi-3 writes turns; short, since most of what a miniature reads would be template otherwise.
_TURNS = (
    "{{% for message in messages %}}<|{{{{ message['role'] }}}}|>"
    "{{% if message['content'] is string %}}{{{{ message['content'] }}}}"
    "{{% else %}}{{% for part in message['content'] %}}"
    "{{% if part['type'] == 'image' %}}{image}"
    "{{% elif part['type'] == 'text' %}}{{{{ part['text'] }}}}{{% endif %}}"
    "{{% endfor %}}{{% endif %}}<|im_end|>{{% endfor %}}"
    "{{% if add_generation_prompt %}}<|assistant|>{{% endif %}}"
)
CHAT_TEMPLATES = {
    INTERNVL: _TURNS.format(image="<IMG_CONTEXT>"),
    QWEN2VL: _TURNS.format(image="<|vision_start|><|image_pad|><|vision_end|>"),
}
"""Jinja source of each model's chat template."""

_NAMED = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}

# In memory (transformers 5) to on disk (published).
_PUBLISHED: dict[str, tuple[tuple[str, str], ...]] = {
    INTERNVL: (
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
    ),
    QWEN2VL: ((r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual.")),
}

_LAYERS, _HEADS = 4, 4

Model = Any
"""A transformers model."""


def token_id(token: str) -> int:
    """Return the id of a token.

    Args:
        token: the token.

    Returns:
        Its row in the embedding.
    """
    return vocabulary.tokens(words.WORDS, words.SPECIAL_TOKENS)[token]


def tokenizer(name: str) -> Any:
    """Build the tokenizer of a miniature.

    Args:
        name: one of `NAMES`.

    Returns:
        The tokenizer: the same ids for all; InternVL's also names its image tokens.
    """
    named = _named() if name == INTERNVL else None
    return vocabulary.tokenizer(
        CHAT_TEMPLATES[name], known=words.WORDS, special=words.SPECIAL_TOKENS, named=named
    )


def _named() -> dict[str, str]:
    """Name every special token, since those without a name would not be special."""
    others = [token for token in words.SPECIAL_TOKENS if token not in _NAMED.values()]
    return {f"special_{number}": token for number, token in enumerate(others)} | _NAMED


def _text() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 256,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": token_id("<|endoftext|>"),
        "eos_token_id": token_id("<|im_end|>"),
        "pad_token_id": token_id("<|endoftext|>"),
    }


def config(name: str) -> Any:
    """Build the configuration of a miniature.

    Args:
        name: one of `NAMES`.

    Returns:
        A configuration of the model's own class.
    """
    return {INTERNVL: _internvl_config, QWEN2VL: _qwen2vl_config}[name]()


def _internvl_config() -> InternVLConfig:
    return InternVLConfig(
        text_config={**_text(), "model_type": "qwen2"},
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": [IMAGE_SIZE, IMAGE_SIZE],
            "patch_size": [PATCH_SIZE, PATCH_SIZE],
        },
        image_token_id=token_id("<IMG_CONTEXT>"),
        image_seq_length=VISUAL_TOKENS,
        tie_word_embeddings=False,
    )


def _qwen2vl_config() -> Qwen2VLConfig:
    text = _text()
    rope = {**text["rope_parameters"], "mrope_section": [4, 4, 4]}
    return Qwen2VLConfig(
        text_config={**text, "rope_parameters": rope, "use_sliding_window": False},
        vision_config={
            "depth": 2,
            "embed_dim": 64,
            "hidden_size": HIDDEN_SIZE,
            "mlp_ratio": 3,
            "num_heads": 4,
            "patch_size": PATCH_SIZE,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=False,
    )


def model(name: str, *, seed: int) -> Model:
    """Build a model with fresh weights.

    Args:
        name: one of `NAMES`.
        seed: every weight is a function of this seed and the weight's name.

    Returns:
        The model, in float32, with its generation settings.
    """
    classes = {
        INTERNVL: InternVLForConditionalGeneration,
        QWEN2VL: Qwen2VLForConditionalGeneration,
    }
    return fresh_model(classes[name], config(name), seed=seed, text=_text())


def image_processor(name: str) -> Any:
    """Build the image processor of a miniature.

    Args:
        name: one of `NAMES`.

    Returns:
        The image processor, which keeps a picture at its size.
    """
    if name == INTERNVL:
        return GotOcr2ImageProcessorPil(
            size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, crop_to_patches=False
        )
    return Qwen2VLImageProcessorPil(
        patch_size=PATCH_SIZE,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": IMAGE_SIZE**2, "longest_edge": IMAGE_SIZE**2},
    )


def processor(name: str) -> Any:
    """Assemble the processor of a miniature, without video.

    Args:
        name: one of `NAMES`.

    Returns:
        The processor.
    """
    parts: dict[str, Any] = {
        "image_processor": image_processor(name),
        "tokenizer": tokenizer(name),
        "video_processor": None,
        "chat_template": CHAT_TEMPLATES[name],
    }
    with without_video():
        if name == INTERNVL:
            return InternVLProcessor(**parts, image_seq_length=VISUAL_TOKENS)
        return Qwen2VLProcessor(**parts)


def save(name: str, trained: Model, folder: Path) -> None:
    """Write a complete checkpoint in the published layout, in float32.

    Args:
        name: one of `NAMES`.
        trained: the model.
        folder: where to write; made if it does not exist.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = config(name)
    settings.architectures = [type(trained).__name__]
    settings.dtype = torch.float32
    settings.save_pretrained(folder)
    trained.generation_config.save_pretrained(folder)
    tokenizer(name).save_pretrained(folder)
    _save_processor(name, folder)
    save_weights(trained, folder, _PUBLISHED[name], torch.float32)


def _save_processor(name: str, folder: Path) -> None:
    """Write what is published beside the weights for pictures: how they are cut and counted."""
    kind = {INTERNVL: InternVLProcessor, QWEN2VL: Qwen2VLProcessor}[name].__name__
    pixels = {**image_processor(name).to_dict(), "processor_class": kind}
    _write_json(folder / "preprocessor_config.json", pixels)
    if name == INTERNVL:
        counted = {"image_seq_length": VISUAL_TOKENS, "processor_class": kind}
        _write_json(folder / "processor_config.json", counted)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, sort_keys=True, default=int)
    path.write_text(text + "\n", encoding="utf-8")


def load(folder: Path) -> Model:
    """Load a miniature as any checkpoint is loaded, and insist that nothing is amiss.

    Args:
        folder: the checkpoint.

    Returns:
        The model in float32, in evaluation mode.

    Raises:
        BenchError: naming tensors that are missing, unexpected or of another shape.
    """
    loaded, info = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[fault]:
            raise BenchError(f"{folder}: {fault.replace('_', ' ')}: {sorted(info[fault])}")
    return loaded.eval()

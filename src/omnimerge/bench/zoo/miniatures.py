"""The three miniature architectures: configurations, vocabulary, processors, files on disk.

They are the real classes of transformers at a small size, over one vocabulary, and their
checkpoints are laid out as the published ones are: same file names, same tensor names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
)

from omnimerge.bench import vocabulary
from omnimerge.bench.fresh import fresh_model
from omnimerge.bench.saving import save_weights
from omnimerge.bench.zoo import scenes, words
from omnimerge.errors import CheckpointError

LLM = "mini-llm"
TARGET = "mini-qwen2-vl"
DONOR = "mini-llava-onevision"
NAMES = (LLM, TARGET, DONOR)

HIDDEN_SIZE = 96
PATCH_SIZE = 12  # what one visual token stands for; Qwen2-VL merges 2 x 2 patches of half of it

_TURNS = (
    "{{% for message in messages %}}<|im_start|>{{{{ message['role'] }}}}\n"
    "{{% if message['content'] is string %}}{{{{ message['content'] }}}}"
    "{{% else %}}{{% for part in message['content'] %}}"
    "{{% if part['type'] == 'image' %}}{image}"
    "{{% elif part['type'] == 'text' %}}{{{{ part['text'] }}}}{{% endif %}}"
    "{{% endfor %}}{{% endif %}}<|im_end|>\n{{% endfor %}}"
    "{{% if add_generation_prompt %}}<|im_start|>assistant\n{{% endif %}}"
)

CHAT_TEMPLATES = {
    LLM: _TURNS.format(image=""),
    TARGET: _TURNS.format(image="<|vision_start|><|image_pad|><|vision_end|>"),
    DONOR: _TURNS.format(image="<image>\n"),
}
"""Jinja source of each model's chat template."""

# In memory (transformers 5) to on disk (published).
PUBLISHED: dict[str, tuple[tuple[str, str], ...]] = {
    LLM: (),
    TARGET: ((r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual.")),
    DONOR: (
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.vision_tower\.", "vision_tower.vision_model."),
        (r"^model\.(multi_modal_projector\.|image_newline$)", r"\1"),
    ),
}


def token_id(token: str) -> int:
    """Return the id of a token.

    Args:
        token: One of `words.SPECIAL_TOKENS`, say.

    Returns:
        Its row in the embedding.
    """
    return vocabulary.tokens(words.WORDS, words.SPECIAL_TOKENS)[token]


_TEXT: dict[str, Any] = {
    "vocab_size": words.SIZE,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "bos_token_id": token_id("<|endoftext|>"),
    "eos_token_id": token_id("<|im_end|>"),
    "pad_token_id": token_id("<|endoftext|>"),
}


def tokenizer(name: str) -> Any:
    """Build the tokenizer, which is the same for the three models but for the chat template.

    Args:
        name: One of `NAMES`.

    Returns:
        The tokenizer.
    """
    return vocabulary.tokenizer(CHAT_TEMPLATES[name], words.WORDS, words.SPECIAL_TOKENS)


def config(name: str) -> Any:
    """Build the configuration of one miniature.

    Args:
        name: One of `NAMES`.

    Returns:
        A configuration of the model's own class.
    """
    if name == LLM:
        return Qwen2Config(**_TEXT, use_sliding_window=False)
    if name == TARGET:
        rope = {**_TEXT["rope_parameters"], "mrope_section": [4, 4, 4]}
        return Qwen2VLConfig(
            text_config={**_TEXT, "rope_parameters": rope},
            vision_config={
                "depth": 2,
                "embed_dim": 64,
                "hidden_size": HIDDEN_SIZE,
                "num_heads": 4,
                "mlp_ratio": 3,
                "patch_size": PATCH_SIZE // 2,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
            },
            image_token_id=token_id("<|image_pad|>"),
            video_token_id=token_id("<|video_pad|>"),
            vision_start_token_id=token_id("<|vision_start|>"),
            vision_end_token_id=token_id("<|vision_end|>"),
            tie_word_embeddings=False,
        )
    return LlavaOnevisionConfig(
        text_config={**_TEXT, "model_type": "qwen2"},
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": scenes.IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
            "vision_use_head": False,
        },
        image_token_index=token_id("<image>"),
        video_token_index=token_id("<video>"),
        image_grid_pinpoints=[[scenes.IMAGE_SIZE, scenes.IMAGE_SIZE]],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
        tie_word_embeddings=False,
    )


def model(name: str, *, seed: int) -> Any:
    """Build a model with fresh weights.

    Args:
        name: One of `NAMES`.
        seed: Every weight is a function of this seed and the weight's name.

    Returns:
        The model, in float32, with its generation settings.
    """
    classes = {
        LLM: Qwen2ForCausalLM,
        TARGET: Qwen2VLForConditionalGeneration,
        DONOR: LlavaOnevisionForConditionalGeneration,
    }
    return fresh_model(classes[name], config(name), seed=seed, text=_TEXT)


def image_processor(name: str) -> Any:
    """Build the image processor of a multimodal miniature.

    Args:
        name: `TARGET` or `DONOR`.

    Returns:
        The image processor, which keeps a scene's picture at its size.
    """
    side = scenes.IMAGE_SIZE
    if name == TARGET:
        return Qwen2VLImageProcessorPil(
            patch_size=PATCH_SIZE // 2,
            merge_size=2,
            temporal_patch_size=2,
            size={"shortest_edge": side * side, "longest_edge": side * side},
        )
    return LlavaOnevisionImageProcessorPil(
        size={"height": side, "width": side}, image_grid_pinpoints=[[side, side]]
    )


class _WithoutVideo:
    """Lets a processor do without the video processor, which would need torchvision."""

    def check_argument_for_proper_class(self, name: str, value: Any) -> Any:
        """Accept a missing part; check the others as transformers does."""
        parent: Any = super()
        return None if value is None else parent.check_argument_for_proper_class(name, value)


class _ImageQwen2VLProcessor(_WithoutVideo, Qwen2VLProcessor):  # type: ignore[misc]
    """Qwen2-VL's processor, for text and images."""


class _ImageLlavaOnevisionProcessor(_WithoutVideo, LlavaOnevisionProcessor):  # type: ignore[misc]
    """LLaVA-OneVision's processor, for text and images."""


def processor(name: str) -> Any:
    """Assemble the processor of a multimodal miniature: chat template, text and images.

    Args:
        name: `TARGET` or `DONOR`.

    Returns:
        The processor, without video.
    """
    parts = {
        "image_processor": image_processor(name),
        "tokenizer": tokenizer(name),
        "video_processor": None,
        "chat_template": CHAT_TEMPLATES[name],
    }
    if name == TARGET:
        return _ImageQwen2VLProcessor(**parts)
    if name == DONOR:
        return _ImageLlavaOnevisionProcessor(**parts, **_DONOR_PROCESSOR)
    raise CheckpointError(f"{name} takes no images; take {TARGET} or {DONOR}")


_DONOR_PROCESSOR: dict[str, Any] = {
    "num_image_tokens": (scenes.IMAGE_SIZE // PATCH_SIZE) ** 2,
    "vision_feature_select_strategy": "full",
    "vision_aspect_ratio": "anyres_max_9",
}


def save(name: str, trained: Any, folder: Path) -> None:
    """Write a complete checkpoint in the published layout, in bfloat16.

    Args:
        name: One of `NAMES`.
        trained: The model.
        folder: Where to write; made if it does not exist.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = config(name)
    settings.architectures = [type(trained).__name__]
    settings.dtype = torch.bfloat16
    settings.save_pretrained(folder)
    trained.generation_config.save_pretrained(folder)
    tokenizer(name).save_pretrained(folder)
    if name != LLM:
        _save_processor(name, folder)
    save_weights(trained, folder, PUBLISHED[name], torch.bfloat16)


def _save_processor(name: str, folder: Path) -> None:
    """Write what is published beside the weights for pictures: how they are cut and counted."""
    kind = {TARGET: Qwen2VLProcessor, DONOR: LlavaOnevisionProcessor}[name].__name__
    pixels = {**image_processor(name).to_dict(), "processor_class": kind}
    _write_json(folder / "preprocessor_config.json", pixels)
    if name == DONOR:
        counted = {**_DONOR_PROCESSOR, "image_token": "<image>", "video_token": "<video>"}
        _write_json(folder / "processor_config.json", {**counted, "processor_class": kind})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, sort_keys=True, default=int)
    path.write_text(text + "\n", encoding="utf-8")


def load(name: str, folder: Path) -> Any:
    """Load a miniature as any checkpoint is loaded, and insist that nothing is amiss.

    Args:
        name: One of `NAMES`.
        folder: The checkpoint.

    Returns:
        The model in float32, in evaluation mode.
    """
    auto = AutoModelForCausalLM if name == LLM else AutoModelForImageTextToText
    loaded, info = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[fault]:
            raise CheckpointError(f"{folder}: {fault.replace('_', ' ')}: {sorted(info[fault])}")
    return loaded.eval()

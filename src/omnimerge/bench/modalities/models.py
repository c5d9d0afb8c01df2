"""The miniatures of the line: a Qwen2, and over it a LLaVA, a Qwen2-Audio and a Qwen2-VL.

Real classes of transformers with real processors, saved as published checkpoints are. The video
expert is a Qwen2-VL, so that the composed model's text model has M-RoPE.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from omnimerge.bench.modalities.media import FRAMES, RATE, SIDE
from omnimerge.bench.modalities.world import LEADS, words
from omnimerge.compose.part_processor import PartProcessor
from omnimerge.compose.processing import OmniProcessor
from omnimerge.generate.quiet import quiet

LLM = "llm"
HIDDEN = 64
PATCH = 8  # of pictures; of videos it is half of that, four of which make one token
MELS = 32

PLACEHOLDERS = {"image": "<image>", "audio": "<|AUDIO|>", "video": "<|video_pad|>"}
TOKENS = {"image": (SIDE // PATCH) ** 2, "audio": 25, "video": (SIDE // PATCH) ** 2}
"""How many features stand for one medium."""

_SPECIAL = ("<|endoftext|>", "<|im_end|>")
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_PIXELS = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def tokenizer(*extra: str) -> PreTrainedTokenizerFast:
    """Build a tokenizer of whole words.

    Args:
        *extra: special tokens beside the language model's own.

    Returns:
        The tokenizer.
    """
    vocabulary = {word: number for number, word in enumerate(("<unk>", *words()))}
    made = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = WhitespaceSplit()
    special = [AddedToken(token, special=True, normalized=False) for token in (*_SPECIAL, *extra)]
    made.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        model_max_length=512,
    )


def vocabulary(modality: str) -> PreTrainedTokenizerFast:
    """Build the tokenizer of one of the models.

    Args:
        modality: one of `PLACEHOLDERS`, or `LLM`.

    Returns:
        The tokenizer, with the model's placeholder.
    """
    extra = [PLACEHOLDERS[modality]] if modality in PLACEHOLDERS else []
    return tokenizer(*extra, *(["<|image_pad|>"] if modality == "video" else []))


ROWS = len(words()) + 8
"""Rows of the embedding: some more than there are tokens, as published checkpoints have."""


def text_config(**changes: Any) -> dict[str, Any]:
    """Return the configuration of the language model, as JSON."""
    names = vocabulary(LLM)
    return {
        "vocab_size": ROWS,
        "hidden_size": HIDDEN,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "rope_parameters": _ROPE,
        "bos_token_id": None,
        "eos_token_id": names.eos_token_id,
        "pad_token_id": names.pad_token_id,
        **changes,
    }


def new(modality: str, *, seed: int) -> Any:
    """Build a model with fresh weights.

    Args:
        modality: one of `PLACEHOLDERS`, or `LLM`.
        seed: every weight is a function of it and of the weight's name.

    Returns:
        The model, in float32.
    """
    makers = {LLM: _llm, "image": _seeing, "audio": _hearing, "video": _watching}
    with torch.random.fork_rng(devices=[]):  # the constructor draws what is replaced just below
        built = makers[modality]()
    for number, (name, weight) in enumerate(sorted(built.named_parameters())):
        _initialise(name, weight.data, torch.Generator().manual_seed(seed * 10007 + number))
    return built


def _initialise(name: str, weight: torch.Tensor, generator: torch.Generator) -> None:
    if weight.ndim == 1:
        weight.fill_(0.0 if name.endswith("bias") or "class_embedding" in name else 1.0)
    else:
        fan_in = weight[0].numel()
        spread = 0.2 if "embed_tokens" in name else fan_in**-0.5
        if name.endswith(("o_proj.weight", "down_proj.weight", "fc2.weight", "out_proj.weight")):
            spread *= 0.35  # what a layer adds starts small beside what it is added to
        weight.normal_(0.0, spread, generator=generator)


def _llm() -> Any:
    return Qwen2ForCausalLM(Qwen2Config(**text_config()))


def _seeing() -> Any:
    config = LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": SIDE,
            "patch_size": PATCH,
            "projection_dim": 48,
        },
        text_config={**text_config(), "model_type": "qwen2"},
        image_token_index=_placeholder("image"),
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    return LlavaForConditionalGeneration(config)


def _hearing() -> Any:
    config = Qwen2AudioConfig(
        audio_config={
            "num_mel_bins": MELS,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 96,
            "d_model": 48,
            "max_source_positions": 50,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "activation_dropout": 0.0,
        },
        text_config={**text_config(), "model_type": "qwen2"},
        audio_token_index=_placeholder("audio"),
    )
    return Qwen2AudioForConditionalGeneration(config)


def _watching() -> Any:
    config = Qwen2VLConfig(
        text_config=text_config(rope_parameters={**_ROPE, "mrope_section": [2, 3, 3]}),
        vision_config={
            "depth": 2,
            "embed_dim": 48,
            "hidden_size": HIDDEN,
            "num_heads": 4,
            "mlp_ratio": 2,
            "patch_size": PATCH // 2,
            "spatial_merge_size": 2,
            "temporal_patch_size": FRAMES,
        },
        image_token_id=vocabulary("video").convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=_placeholder("video"),
        vision_start_token_id=_placeholder("video"),  # nothing is written around a video here
        vision_end_token_id=_placeholder("video"),
        tie_word_embeddings=False,
    )
    return Qwen2VLForConditionalGeneration(config)


def _placeholder(modality: str) -> int:
    number: int = vocabulary(modality).convert_tokens_to_ids(PLACEHOLDERS[modality])
    return number


_FILES: dict[str, dict[str, dict[str, Any]]] = {
    "image": {
        "preprocessor_config": {
            **_PIXELS,
            "image_processor_type": "CLIPImageProcessor",
            "size": {"height": SIDE, "width": SIDE},
            "do_center_crop": False,
        },
        "processor_config": {
            "processor_class": "LlavaProcessor",
            "patch_size": PATCH,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
            "image_token": PLACEHOLDERS["image"],
        },
    },
    "audio": {
        "preprocessor_config": {
            "feature_extractor_type": "WhisperFeatureExtractor",
            "processor_class": "Qwen2AudioProcessor",
            "feature_size": MELS,
            "chunk_length": 1,
            "sampling_rate": RATE,
            "hop_length": 160,
            "n_fft": 400,
            "return_attention_mask": True,
        },
        "processor_config": {"processor_class": "Qwen2AudioProcessor"},
    },
    "video": {
        "preprocessor_config": {
            **_PIXELS,
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2VLProcessor",
            "min_pixels": SIDE * SIDE,
            "max_pixels": SIDE * SIDE,
            "patch_size": PATCH // 2,
            "merge_size": 2,
            "temporal_patch_size": FRAMES,
        },
    },
}


def save(modality: str, model: Any, folder: Path) -> None:
    """Write a complete checkpoint: weights, configuration, tokenizer, processor, chat template.

    Args:
        modality: one of `PLACEHOLDERS`, or `LLM`.
        model: the model.
        folder: where to write; made if it does not exist.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in _FILES.get(modality, {}).items():
        text = json.dumps(content, indent=2) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    vocabulary(modality).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(chat_template(modality), encoding="utf-8")
    model.save_pretrained(folder)


def chat_template(modality: str) -> str:
    """Return the Jinja source of a model's chat template."""
    lead = ""
    if modality in PLACEHOLDERS:
        shown = f"{LEADS[modality]} : {PLACEHOLDERS[modality]} . "
        lead = f"{{% if part['type'] == '{modality}' %}}{shown}{{% endif %}}"
    return (
        "{% for message in messages %}{% if message['content'] is string %}"
        "{{ message['content'] }}{% else %}{% for part in message['content'] %}"
        f"{lead}{{% if part['type'] == 'text' %}}{{{{ part['text'] }}}}{{% endif %}}"
        "{% endfor %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %} answer :{% endif %}"
    )


def load(modality: str, folder: Path) -> Any:
    """Load one of the models.

    Args:
        modality: one of `PLACEHOLDERS`, or `LLM`.
        folder: its checkpoint.

    Returns:
        The model in float32, in evaluation mode.
    """
    classes = {
        LLM: Qwen2ForCausalLM,
        "image": LlavaForConditionalGeneration,
        "audio": Qwen2AudioForConditionalGeneration,
        "video": Qwen2VLForConditionalGeneration,
    }
    with quiet():
        return classes[modality].from_pretrained(folder, dtype=torch.float32).eval()


def processor(modality: str, folder: Path) -> OmniProcessor:
    """Make a processor for one expert, which takes videos without torchvision.

    Args:
        modality: one of `PLACEHOLDERS`.
        folder: its checkpoint.

    Returns:
        A processor whose only part is the expert; see `own_inputs` for its inputs.
    """
    token = PLACEHOLDERS[modality]
    part = PartProcessor.load(folder, {modality: token}, {token: token})
    names = vocabulary(modality)
    return OmniProcessor(names, {modality: part}, chat_template=chat_template(modality))


def own_inputs(modality: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return a batch of `processor` as the expert's own class takes it.

    Args:
        modality: the expert's.
        inputs: the batch.

    Returns:
        The same without the part's name, with ``mm_token_type_ids`` where the class needs them.
    """
    found = {name.removeprefix(f"{modality}_"): value for name, value in inputs.items()}
    if modality == "video":
        place = _placeholder("video")
        found["mm_token_type_ids"] = (inputs["input_ids"] == place).int() * 2
    return found

"""Tiny random models of real transformers architectures, saved with their published names.

All of one family share an ancestor: the decoder of each is the same random weights plus a little
noise of its own, so that they can be merged as real descendants of one LLM can.
"""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path

import torch
import transformers as T
from safetensors.torch import load_file, save_file

VOCAB = 96
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "projection_dim": 16,
}
SIGLIP = {**{k: v for k, v in CLIP.items() if k != "projection_dim"}}
SIGLIP["model_type"] = "siglip_vision_model"
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
QWEN_ROPE = {"rope_type": "default", "rope_theta": 1e6}
AUDIO = {
    "num_mel_bins": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "d_model": 16,
    "max_source_positions": 50,
}
QWEN_TOKENS = {
    "image_token_id": 10,
    "video_token_id": 11,
    "vision_start_token_id": 12,
    "vision_end_token_id": 13,
}


def _llama(**changes):
    return T.LlamaConfig(**{**TEXT, **changes})


def _qwen2(**changes):
    return T.Qwen2Config(**{**TEXT, "rope_parameters": QWEN_ROPE, **changes})


def _qwen2_vl(**changes):
    vision = {
        "depth": 1,
        "embed_dim": 16,
        "hidden_size": 32,
        "num_heads": 2,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "mlp_ratio": 2,
    }
    text = {**TEXT, "rope_parameters": MROPE, **changes}
    config = T.Qwen2VLConfig(text_config=text, vision_config=vision, **QWEN_TOKENS)
    config.tie_word_embeddings = changes.get("tie_word_embeddings", False)
    return T.Qwen2VLForConditionalGeneration(config)


_VISION_2_5 = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 32,
    "out_hidden_size": 32,
    "num_heads": 2,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 56,
    "fullatt_block_indexes": [0],
}


def _qwen2_5_vl(**changes):
    text = {**TEXT, "rope_parameters": MROPE, **changes}
    return T.Qwen2_5_VLForConditionalGeneration(
        T.Qwen2_5_VLConfig(text_config=text, vision_config=_VISION_2_5, **QWEN_TOKENS)
    )


def _llava(**changes):
    return T.LlavaForConditionalGeneration(
        T.LlavaConfig(vision_config=CLIP, text_config=_llama(**changes), image_token_id=10)
    )


def _llava_next(**changes):
    return T.LlavaNextForConditionalGeneration(
        T.LlavaNextConfig(
            vision_config=CLIP,
            text_config=_llama(**changes),
            image_token_id=10,
            image_grid_pinpoints=[[28, 56]],
        )
    )


def _llava_onevision(**changes):
    return T.LlavaOnevisionForConditionalGeneration(
        T.LlavaOnevisionConfig(
            vision_config=SIGLIP,
            text_config=_qwen2(**changes),
            image_token_id=10,
            video_token_id=11,
            image_grid_pinpoints=[[28, 28]],
        )
    )


def _video_llava(**changes):
    return T.VideoLlavaForConditionalGeneration(
        T.VideoLlavaConfig(
            vision_config=CLIP, text_config=_llama(**changes), image_token_id=10, video_token_id=11
        )
    )


def _internvl(**changes):
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": [28, 28],
        "patch_size": [14, 14],
    }
    return T.InternVLForConditionalGeneration(
        T.InternVLConfig(
            text_config=_qwen2(**changes),
            vision_config=vision,
            image_token_id=10,
            tie_word_embeddings=False,
        )
    )


def _qwen2_audio(**changes):
    return T.Qwen2AudioForConditionalGeneration(
        T.Qwen2AudioConfig(audio_config=AUDIO, text_config=_qwen2(**changes), audio_token_id=10)
    )


def _qwen2_5_omni_thinker(**changes):
    config = T.Qwen2_5OmniThinkerConfig(
        text_config={**TEXT, "rope_parameters": MROPE, **changes},
        vision_config=_VISION_2_5,
        audio_config={**AUDIO, "output_dim": 32, "n_window": 50},
        audio_token_id=14,
        image_token_id=10,
        video_token_id=11,
    )
    return T.Qwen2_5OmniThinkerForConditionalGeneration(config)


def _plain_llama(**changes):
    return T.LlamaForCausalLM(_llama(**changes))


def _plain_qwen2(**changes):
    return T.Qwen2ForCausalLM(_qwen2(**changes))


QWEN2_FAMILY = {
    "qwen2": _plain_qwen2,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "llava_onevision": _llava_onevision,
    "internvl": _internvl,
    "qwen2_audio": _qwen2_audio,
    "qwen2_5_omni_thinker": _qwen2_5_omni_thinker,
}
LLAMA_FAMILY = {
    "llama": _plain_llama,
    "llava": _llava,
    "llava_next": _llava_next,
    "video_llava": _video_llava,
}
FAMILIES = {**QWEN2_FAMILY, **LLAMA_FAMILY}


def build(name: str, *, ancestor: str = "ancestor", own: str | None = None, **text_changes):
    """Build a tiny model whose decoder is an ancestor's plus noise of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(_seed(name))
        model = FAMILIES[name](**text_changes)
    model.eval()
    with torch.no_grad():
        for leaf, parameter in decoder_parameters(model).items():
            shared = _draw(f"{ancestor}/{leaf}", parameter.shape) * 0.2
            noise = _draw(f"{own or name}/{leaf}", parameter.shape) * 0.02
            parameter.copy_((1.0 if parameter.ndim == 1 else 0.0) + shared + noise)
    return model


def decoder_parameters(model) -> dict[str, torch.nn.Parameter]:
    """The language model's parameters by names that all architectures share, in memory."""
    found = dict(model.get_decoder().named_parameters())
    head = model.get_output_embeddings().weight
    if head is not model.get_input_embeddings().weight:
        found["lm_head.weight"] = head
    return found


def save(model, folder: Path, *, naming: str = "published", shard: str = "50GB") -> Path:
    """Save a model with the names that the published checkpoints of its kind have on disk."""
    if naming == "v5":
        model.save_pretrained(folder, save_original_format=False, max_shard_size=shard)
        return folder
    model.save_pretrained(folder, max_shard_size=shard)
    if naming == "published" and shard == "50GB":
        file = folder / "model.safetensors"
        tensors = {_published(name, model): t for name, t in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


def save_llava_original(model, folder: Path) -> Path:
    """Save a LLaVA or LLaVA-OneVision with the names and the config of the original code."""
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    renames = [
        (r"^language_model\.model\.", "model."),
        (r"^language_model\.lm_head", "lm_head"),
        (r"^vision_tower\.(vision_model\.)?", "model.vision_tower.vision_tower.vision_model."),
        (r"^multi_modal_projector\.linear_1", "model.mm_projector.0"),
        (r"^multi_modal_projector\.linear_2", "model.mm_projector.2"),
        (r"^image_newline", "model.image_newline"),
    ]
    for pattern, replacement in renames:
        tensors = {re.sub(pattern, replacement, name): t for name, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    text = model.config.get_text_config()
    config = {**TEXT, "model_type": "llava_qwen", "rope_theta": text.rope_parameters["rope_theta"]}
    config |= {
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "mm_projector_type": "mlp2x_gelu",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def load(name: str, folder: Path):
    """Load with transformers; return the model, having checked that every key found its place."""
    cls = type(build_class(name))
    model, info = cls.from_pretrained(folder, output_loading_info=True)
    problems = {key: sorted(map(str, value)) for key, value in info.items() if value}
    assert problems == {}, f"{name}: {problems}"
    return model.eval()


_INSTANCES: dict[str, object] = {}


def build_class(name: str):
    """One instance of an architecture, for its class."""
    if name not in _INSTANCES:
        _INSTANCES[name] = build(name)
    return _INSTANCES[name]


def _published(name: str, model) -> str:
    kind = model.config.model_type
    if kind in ("llava", "llava_next", "llava_onevision", "video_llava"):
        return re.sub(
            r"^(vision|image|video)_tower\.(?!vision_model)", r"\1_tower.vision_model.", name
        )
    return f"thinker.{name}" if kind == "qwen2_5_omni_thinker" else name


def _seed(text: str) -> int:
    return zlib.crc32(text.encode())


def _draw(key: str, shape) -> torch.Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(_seed(key)))

"""Tiny random models of most multimodal text generators of transformers, named as published.

The decoder of each has width 32, two layers (mllama: three) and 96 words. Unlike those of
tiny_models, which come in families, these share no ancestor: each is saved together with a slightly
perturbed copy of itself, as the fine-tuned sibling that it can be merged with.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from pathlib import Path

import tiny_models
import torch
import transformers as T
from safetensors.torch import load_file, save_file
from tiny_models import AUDIO, CLIP, MROPE, QWEN_TOKENS, SIGLIP, TEXT, VOCAB
from transformers import PreTrainedModel

ROPE = {"rope_type": "default", "rope_theta": 1e4}
IMAGE = {"image_token_id": 10}
UNTIED = {"tie_word_embeddings": False}
TIED = {"tie_word_embeddings": True}
VIT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VIT = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 32,
    "out_hidden_size": 32,
    "num_heads": 2,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
SOUND = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_mel_bins": 16,
}
QFORMER = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "encoder_hidden_size": 16,
}
EXPERTS = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
VQ = {
    "embed_dim": 4,
    "latent_channels": 32,
    "base_channels": 32,
    "channel_multiplier": [1],
    "num_res_blocks": 1,
}


def _new(kind: str, task: str = "ForConditionalGeneration", **config) -> PreTrainedModel:
    return getattr(T, kind + task)(getattr(T, f"{kind}Config")(**config))


def _llama(**changes):
    return T.LlamaConfig(**{**TEXT, "rope_parameters": ROPE, **changes})


def _mistral(**changes):
    return T.MistralConfig(**{**TEXT, "head_dim": 8, "rope_parameters": ROPE, **changes})


def _qwen2(**changes):
    return T.Qwen2Config(**{**TEXT, "rope_parameters": ROPE, **changes})


def _qwen3(**changes):
    return T.Qwen3Config(**{**TEXT, "head_dim": 8, "rope_parameters": ROPE, **changes})


def _llava_next_video():
    return _new(
        "LlavaNextVideo",
        vision_config={**CLIP, "image_size": 56},
        text_config=_llama(),
        image_token_index=10,
        video_token_index=11,
        image_grid_pinpoints=[[56, 112]],
    )


def _vipllava():
    return _new(
        "VipLlava",
        vision_config=CLIP,
        text_config=_llama(),
        image_token_index=10,
        vision_feature_layers=[-2, -1],
    )


def _qwen3_vl_parts(**text):
    rope = {**MROPE, "mrope_interleaved": True}
    vision = {
        **QWEN_VIT,
        "depth": 2,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    return {
        "text_config": {**TEXT, "head_dim": 8, "rope_parameters": rope, **text},
        "vision_config": vision,
        **QWEN_TOKENS,
    }


def _qwen3_vl():
    return _new("Qwen3VL", **_qwen3_vl_parts())


def _qwen3_vl_moe():
    return _new("Qwen3VLMoe", **_qwen3_vl_parts(**EXPERTS))


def _qwen3_omni_moe_thinker():
    parts = _qwen3_vl_parts(**EXPERTS)
    parts["audio_config"] = {**AUDIO, "output_dim": 32, "n_window": 4, "downsample_hidden_size": 4}
    del parts["vision_start_token_id"], parts["vision_end_token_id"]
    config = T.Qwen3OmniMoeThinkerConfig(**parts, audio_token_id=14, audio_start_token_id=15)
    return T.Qwen3OmniMoeThinkerForConditionalGeneration(config)


def _qwen3_5():
    text = {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_conv_kernel_dim": 2,
        "head_dim": 16,
        "rope_parameters": {**MROPE, "mrope_interleaved": True, "partial_rotary_factor": 0.5},
    }
    vision = {**QWEN_VIT, "num_position_embeddings": 16}
    return _new("Qwen3_5", text_config={**TEXT, **text}, vision_config=vision, **QWEN_TOKENS)


def _lighton_ocr():
    text, vision = _qwen3(**TIED), {**VIT, "model_type": "pixtral"}
    return _new("LightOnOcr", text_config=text, vision_config=vision, **IMAGE)


def _idefics2():
    perceiver = {
        "hidden_size": 32,
        "resampler_n_latents": 4,
        "resampler_depth": 1,
        "resampler_n_heads": 4,
        "resampler_head_dim": 8,
        "num_key_value_heads": 2,
    }
    return _new(
        "Idefics2",
        vision_config=VIT,
        perceiver_config=perceiver,
        text_config=_mistral(),
        **IMAGE,
        **UNTIED,
    )


def _idefics3():
    text = _llama()
    return _new("Idefics3", text_config=text, vision_config=VIT, scale_factor=2, **IMAGE, **UNTIED)


def _smolvlm():
    text = _llama(**TIED)
    return _new("SmolVLM", text_config=text, vision_config=VIT, scale_factor=2, **IMAGE, **TIED)


def _gemma3():
    return _new(
        "Gemma3",
        text_config={**TEXT, "head_dim": 8, "sliding_window": 64, "query_pre_attn_scalar": 8},
        vision_config={**SIGLIP, "image_size": 56, "vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_index=10,
        boi_token_index=12,
        eoi_token_index=13,
    )


def _paligemma():
    return _new(
        "PaliGemma",
        text_config=T.GemmaConfig(**{**TEXT, "num_key_value_heads": 1}, head_dim=8),
        vision_config={**SIGLIP, "projection_dim": 32, "vision_use_head": False},
        projection_dim=32,
        image_token_index=10,
    )


def _mllama():
    vision = {
        **VIT,
        "num_global_layers": 1,
        "attention_heads": 2,
        "vision_output_dim": 32,
        "intermediate_layers_indices": [0],
        "max_num_tiles": 4,
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1], [2, 2]],
    }
    text = {**TEXT, "num_hidden_layers": 3, "cross_attention_layers": [1], "rope_parameters": ROPE}
    return _new("Mllama", text_config=text, vision_config=vision, image_token_index=10)


def _mistral3():
    return _new(
        "Mistral3",
        text_config=_mistral(),
        vision_config={**VIT, "model_type": "pixtral"},
        image_token_index=10,
        **UNTIED,
    )


def _voxtral():
    audio = {**SOUND, "vocab_size": VOCAB, "intermediate_size": 64, "max_source_positions": 50}
    return _new("Voxtral", audio_config=audio, text_config=_llama(head_dim=8), audio_token_id=10)


def _audioflamingo3():
    audio = {**SOUND, "max_source_positions": 50}
    return _new("AudioFlamingo3", audio_config=audio, text_config=_qwen2(), audio_token_id=10)


def _glmasr():
    audio = {**SOUND, "intermediate_size": 64, "max_position_embeddings": 50}
    text = _llama()
    return _new("GlmAsr", audio_config=audio, text_config=text, audio_token_id=10, **UNTIED)


def _granite_speech():
    encoder = {
        "input_dim": 16,
        "num_layers": 2,
        "hidden_dim": 16,
        "feedforward_mult": 2,
        "num_heads": 2,
        "dim_head": 8,
        "output_dim": 8,
        "context_size": 8,
        "max_pos_emb": 8,
        "conv_kernel_size": 3,
    }
    return _new(
        "GraniteSpeech",
        text_config=T.GraniteConfig(**{**TEXT, **TIED}),
        encoder_config=encoder,
        projector_config={**QFORMER, "model_type": "blip_2_qformer"},
        audio_token_index=10,
        has_lora_adapter=False,
    )


def _deepseek_vl():
    return _new("DeepseekVL", text_config=_llama(), vision_config=SIGLIP, **IMAGE, **UNTIED)


def _janus():
    vision = {
        **{k: v for k, v in VIT.items() if k != "intermediate_size"},
        "mlp_ratio": 2.0,
        "projection_dim": 32,
        "num_image_tokens": 4,
    }
    pictures = {**VQ, "num_embeddings": 16, "projection_dim": 32, "image_token_embed_dim": 32}
    return _new(
        "Janus",
        text_config=_llama(),
        vision_config=vision,
        vq_config={**pictures, "num_hidden_layers": 1, "num_patches": 2},
        **IMAGE,
        **UNTIED,
    )


def _phi4_multimodal():
    sound = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_blocks": 1,
        "num_attention_heads": 2,
        "ext_pw_out_channel": 16,
        "depthwise_separable_out_channel": 16,
        "input_size": 16,
        "nemo_conv_channels": 16,
        "bias_max_distance": 8,
        "audio_token_id": 11,
    }
    return _new(
        "Phi4Multimodal",
        "ForCausalLM",
        **TEXT,
        **TIED,
        vision_config={**VIT, "crop_size": 28, **IMAGE},
        audio_config=sound,
    )


def _got_ocr2():
    vision = {
        **{k: v for k, v in VIT.items() if k != "intermediate_size"},
        "mlp_dim": 32,
        "output_channels": 8,
        "window_size": 2,
        "global_attn_indexes": [0],
    }
    text = _qwen2(**TIED)
    return _new("GotOcr2", text_config=text, vision_config=vision, image_token_index=10, **TIED)


def _aria():
    return _new(
        "Aria",
        text_config={
            **TEXT,
            "intermediate_size": 24,
            "moe_num_experts": 4,
            "moe_topk": 2,
            "moe_num_shared_experts": 1,
        },
        vision_config={**VIT, "model_type": "idefics3_vision"},
        projector_patch_to_query_dict={4: 2},
        image_token_index=10,
    )


def _glm4v_parts(**text):
    rope = {**MROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 0, 1]}
    return {
        "text_config": {**TEXT, "rope_parameters": rope, **text},
        "vision_config": {**QWEN_VIT, "image_size": 28},
        "video_token_id": 11,
        "image_start_token_id": 12,
        "image_end_token_id": 13,
        **IMAGE,
    }


def _glm4v():
    return _new("Glm4v", **_glm4v_parts())


def _glm4v_moe():
    experts = {"moe_intermediate_size": 24, "n_routed_experts": 4, "num_experts_per_tok": 2}
    return _new("Glm4vMoe", **_glm4v_parts(**experts, first_k_dense_replace=1))


def _ovis2():
    return _new(
        "Ovis2",
        text_config=_qwen2(**TIED),
        vision_config={**VIT, "vocab_size": 16, "hidden_stride": 2},
        visual_indicator_token_ids=[12, 13, 14, 15, 16],
        vocab_size=VOCAB,
        hidden_size=32,
        **IMAGE,
        **TIED,
    )


def _video_llama_3():
    vision = {k: v for k, v in VIT.items() if k != "image_size"}
    return _new(
        "VideoLlama3",
        text_config=_qwen2(),
        vision_config=vision,
        video_token_id=11,
        **IMAGE,
        **UNTIED,
    )


def _cohere2():
    return T.Cohere2Config(**{**TEXT, **TIED, "sliding_window": 64})


def _cohere2_vision():
    return _new(
        "Cohere2Vision",
        text_config=_cohere2(),
        vision_config=SIGLIP,
        alignment_intermediate_size=32,
        **IMAGE,
    )


def _aya_vision():
    return _new("AyaVision", text_config=_cohere2(), vision_config=SIGLIP, image_token_index=10)


def _lfm2_vl():
    text = {**TEXT, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
    vision = {k: v for k, v in VIT.items() if k != "image_size"}
    return _new(
        "Lfm2Vl",
        text_config=T.Lfm2Config(**text),
        vision_config={**vision, "num_patches": 4, "vision_use_head": False},
        projector_hidden_size=32,
        **IMAGE,
    )


def _paddleocr_vl():
    return _new(
        "PaddleOCRVL",
        text_config={**TEXT, "head_dim": 8, "rope_parameters": MROPE, **UNTIED},
        vision_config=VIT,
        **QWEN_TOKENS,
        **UNTIED,
    )


def _llama4():
    return _new(
        "Llama4",
        text_config={
            **TEXT,
            "head_dim": 8,
            "intermediate_size": 24,
            "intermediate_size_mlp": 64,
            "num_local_experts": 2,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 64,
        },
        vision_config={
            **VIT,
            "intermediate_size": 64,
            "vision_output_dim": 16,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
        },
        image_token_index=10,
        boi_token_index=12,
        eoi_token_index=13,
    )


def _opt():
    return T.OPTConfig(
        **{k: v for k, v in TEXT.items() if k not in ("intermediate_size", "num_key_value_heads")},
        ffn_dim=64,
        word_embed_proj_dim=32,
    )


def _blip_parts():
    return {
        "text_config": _opt(),
        "vision_config": VIT,
        "qformer_config": QFORMER,
        "num_query_tokens": 2,
        "image_token_index": 10,
    }


def _blip_2():
    return _new("Blip2", **_blip_parts(), image_text_hidden_size=16)


def _instructblip():
    return _new("InstructBlip", **{**_blip_parts(), "text_config": _llama()})


def _fuyu():
    text = {**TEXT, "model_type": "persimmon"}
    return _new("Fuyu", "ForCausalLM", text_config=text, patch_size=2, image_size=8, **IMAGE)


def _chameleon():
    words = {"<image>": 10, **{f"IMGIMG{letter}Z": 20 + i for i, letter in enumerate("ABCD")}}
    pictures = {**VQ, "num_embeddings": 4, "resolution": 8}
    return _new("Chameleon", **TEXT, vq_config=pictures, vocabulary_map=words)


def _emu3():
    words = {"<image>": 10, **{f"<|visual token {i:06d}|>": 20 + i for i in range(4)}}
    pictures = {**VQ, "latent_channels": 4, "codebook_size": 4, "hidden_size": 32}
    pictures |= {"temporal_downsample_factor": 1, "attn_resolutions": []}
    return _new("Emu3", text_config=TEXT, vq_config=pictures, vocabulary_map=words)


BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    **{name: make for name, make in tiny_models.FAMILIES.items() if name not in ("qwen2", "llama")},
    "llava_next_video": _llava_next_video,
    "vipllava": _vipllava,
    "qwen3_vl": _qwen3_vl,
    "qwen3_vl_moe": _qwen3_vl_moe,
    "qwen3_omni_moe_thinker": _qwen3_omni_moe_thinker,
    "qwen3_5": _qwen3_5,
    "lighton_ocr": _lighton_ocr,
    "idefics2": _idefics2,
    "idefics3": _idefics3,
    "smolvlm": _smolvlm,
    "gemma3": _gemma3,
    "paligemma": _paligemma,
    "mllama": _mllama,
    "mistral3": _mistral3,
    "voxtral": _voxtral,
    "audioflamingo3": _audioflamingo3,
    "glmasr": _glmasr,
    "granite_speech": _granite_speech,
    "deepseek_vl": _deepseek_vl,
    "janus": _janus,
    "phi4_multimodal": _phi4_multimodal,
    "got_ocr2": _got_ocr2,
    "aria": _aria,
    "glm4v": _glm4v,
    "glm4v_moe": _glm4v_moe,
    "ovis2": _ovis2,
    "video_llama_3": _video_llama_3,
    "cohere2_vision": _cohere2_vision,
    "aya_vision": _aya_vision,
    "lfm2_vl": _lfm2_vl,
    "paddleocr_vl": _paddleocr_vl,
    "llama4": _llama4,
    "blip-2": _blip_2,
    "instructblip": _instructblip,
    "fuyu": _fuyu,
    "chameleon": _chameleon,
    "emu3": _emu3,
}


def build(model_type: str, *, seed: int = 0) -> PreTrainedModel:
    """Build a tiny model of random weights, the same ones for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_seed(f"{model_type}/{seed}"))
        return BUILDERS[model_type]().eval()


def save(model_type: str, folder: Path, *, seed: int = 0) -> Path:
    """Save a tiny model with the names that the published checkpoints of its kind have on disk."""
    return _save(build(model_type, seed=seed), folder)


def save_perturbed(model_type: str, folder: Path, *, seed: int = 0, own: str = "") -> Path:
    """Save the model that `save` writes plus 2 % of noise; another `own` is another sibling."""
    model = build(model_type, seed=seed)
    perturb(model, own)
    return _save(model, folder)


def perturb(model: PreTrainedModel, own: str = "") -> None:
    """Add to each floating-point parameter 2 % of its spread (of 1, where it is constant)."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():
                constant = parameter.min() == parameter.max()
                spread = 1.0 if constant else float(parameter.std())
                generator = torch.Generator().manual_seed(_seed(own + name))
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02 * spread)


def load(model_type: str, folder: Path) -> PreTrainedModel:
    """Load with transformers; return the model, having checked that every key found its place."""
    cls = type(build(model_type))
    model, info = cls.from_pretrained(folder, output_loading_info=True)
    problems = {key: sorted(map(str, value)) for key, value in info.items() if value}
    assert problems == {}, f"{model_type}: {problems}"
    return model.eval()


# What transformers strips from the towers' names on loading, and a model that was never loaded
# lacks on saving: `vision_tower.embeddings` is published as `vision_tower.vision_model.embeddings`.
_NESTED_TOWERS = ("CLIPVisionModel", "SiglipVisionModel", "Siglip2VisionModel")
_THINKERS = ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker")


def _save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = {_published(name, model): t for name, t in load_file(file).items()}
    if model.config.model_type == "qwen3_vl_moe":  # published as (expert, in, out)
        for name in (name for name in tensors if ".mlp.experts." in name):
            tensors[name] = tensors[name].transpose(1, 2).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def _published(name: str, model: PreTrainedModel) -> str:
    for path, module in model.named_modules():
        if type(module).__name__ in _NESTED_TOWERS:
            tower = path.rpartition(".")[2]
            name = re.sub(rf"^((?:model\.)?{tower}\.)(?!vision_model\.)", r"\1vision_model.", name)
    return f"thinker.{name}" if model.config.model_type in _THINKERS else name


def _seed(text: str) -> int:
    return zlib.crc32(text.encode())

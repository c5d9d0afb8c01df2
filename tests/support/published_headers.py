"""The published checkpoints' names, shapes and configurations, without data.

`write` makes a folder whose weight files have a real header and are otherwise holes, so that 34
billion parameters take no room. Names are those of the published files; where these are pickles
(LLaVA-1.5, mPLUG-Owl2), the folder has safetensors of the same names and shapes. The language
models are complete, and so are Qwen2-VL and InternVL2.5; of the other towers and projectors, which
no recipe here merges, there are some tensors of each kind.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omnimerge.checkpoint import shard
from omnimerge.checkpoint.shard import OutputTensor, shard_by_size
from omnimerge.checkpoint.writer import CheckpointWriter

Shapes = dict[str, tuple[int, ...]]

QWEN2_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
QWEN2_5_HALF_B = {
    **QWEN2_7B,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
}
LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
QWEN3_30B = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
YI_34B = {
    **LLAMA_7B,
    "hidden_size": 7168,
    "intermediate_size": 20480,
    "num_hidden_layers": 60,
    "num_attention_heads": 56,
    "num_key_value_heads": 8,
    "rope_theta": 5000000.0,
}


def decoder(
    config: Mapping[str, Any], vocab: int, prefix: str = "model.", head: str = "lm_head",
    bias: bool = False,
) -> Shapes:  # fmt: skip
    """A decoder with split matrices, as Llama and Qwen2 have it."""
    hidden, mlp = config["hidden_size"], config["intermediate_size"]
    kv = config["num_key_value_heads"] * (hidden // config["num_attention_heads"])
    block: Shapes = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    block |= {"self_attn.q_proj": (hidden, hidden), "self_attn.o_proj": (hidden, hidden)}
    block |= {"self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden)}
    block |= {"mlp.gate_proj": (mlp, hidden), "mlp.up_proj": (mlp, hidden)}
    block |= {"mlp.down_proj": (hidden, mlp)}
    shapes: Shapes = {f"{prefix}embed_tokens.weight": (vocab, hidden)}
    for i in range(config["num_hidden_layers"]):
        shapes |= {f"{prefix}layers.{i}.{name}.weight": shape for name, shape in block.items()}
        if bias:
            at = f"{prefix}layers.{i}.self_attn"
            shapes |= {f"{at}.{name}_proj.bias": (block[f"self_attn.{name}_proj"][0],)
                       for name in "qkv"}  # fmt: skip
    return shapes | {f"{prefix}norm.weight": (hidden,), f"{head}.weight": (vocab, hidden)}


def qwen2_vl() -> tuple[Shapes, dict[str, Any]]:
    """Qwen2-VL-7B, base and instruction-tuned."""
    shapes = decoder(QWEN2_7B, 152064, bias=True)
    block: Shapes = {"attn.qkv.weight": (3840, 1280), "attn.qkv.bias": (3840,)}
    block |= {"attn.proj.weight": (1280, 1280), "attn.proj.bias": (1280,)}
    block |= {"mlp.fc1.weight": (5120, 1280), "mlp.fc1.bias": (5120,)}
    block |= {"mlp.fc2.weight": (1280, 5120), "mlp.fc2.bias": (1280,)}
    block |= {f"norm{n}.{leaf}": (1280,) for n in (1, 2) for leaf in ("weight", "bias")}
    for i in range(32):
        shapes |= {f"visual.blocks.{i}.{name}": shape for name, shape in block.items()}
    shapes["visual.patch_embed.proj.weight"] = (1280, 3, 2, 14, 14)
    shapes |= {f"visual.merger.ln_q.{leaf}": (1280,) for leaf in ("weight", "bias")}
    shapes |= {"visual.merger.mlp.0.weight": (5120, 5120), "visual.merger.mlp.0.bias": (5120,)}
    shapes |= {"visual.merger.mlp.2.weight": (3584, 5120), "visual.merger.mlp.2.bias": (3584,)}
    rope = {"type": "mrope", "mrope_section": [16, 24, 24]}
    return shapes, {
        **QWEN2_7B, "model_type": "qwen2_vl", "vocab_size": 152064, "rope_scaling": rope,
        "vision_config": {"depth": 32, "embed_dim": 1280, "hidden_size": 3584},
    }  # fmt: skip


def _siglip(prefix: str, hidden: int = 1152, layers: int = 26) -> Shapes:
    shapes: Shapes = {f"{prefix}embeddings.patch_embedding.weight": (hidden, 3, 14, 14)}
    for i in range(layers):
        at = f"{prefix}encoder.layers.{i}.self_attn"
        shapes |= {f"{at}.{name}_proj.weight": (hidden, hidden) for name in "qkv"}
    return shapes


def llava_onevision_original() -> tuple[Shapes, dict[str, Any]]:
    """LLaVA-OneVision-7B as lmms-lab publishes it: original LLaVA naming."""
    shapes = decoder(QWEN2_7B, 152064, bias=True)
    shapes |= _siglip("model.vision_tower.vision_tower.vision_model.")
    shapes |= {"model.mm_projector.0.weight": (3584, 1152), "model.mm_projector.0.bias": (3584,)}
    shapes |= {"model.mm_projector.2.weight": (3584, 3584), "model.mm_projector.2.bias": (3584,)}
    shapes["model.image_newline"] = (3584,)
    return shapes, {**QWEN2_7B, "model_type": "llava", "vocab_size": 152064}


def _internvit(hidden: int) -> Shapes:
    """InternViT-300M, and its projector to the language model."""
    block: Shapes = {"attn.qkv.weight": (3072, 1024), "attn.qkv.bias": (3072,)}
    block |= {"attn.proj.weight": (1024, 1024), "attn.proj.bias": (1024,)}
    block |= {"mlp.fc1.weight": (4096, 1024), "mlp.fc1.bias": (4096,)}
    block |= {"mlp.fc2.weight": (1024, 4096), "mlp.fc2.bias": (1024,)}
    block |= {f"norm{n}.{leaf}": (1024,) for n in (1, 2) for leaf in ("weight", "bias")}
    block |= {"ls1": (1024,), "ls2": (1024,)}
    shapes: Shapes = {}
    for i in range(24):
        at = f"vision_model.encoder.layers.{i}."
        shapes |= {at + name: shape for name, shape in block.items()}
    shapes["vision_model.embeddings.class_embedding"] = (1, 1, 1024)
    shapes["vision_model.embeddings.patch_embedding.weight"] = (1024, 3, 14, 14)
    shapes["vision_model.embeddings.patch_embedding.bias"] = (1024,)
    shapes["vision_model.embeddings.position_embedding"] = (1, 1025, 1024)
    shapes |= {"mlp1.0.weight": (4096,), "mlp1.0.bias": (4096,)}
    shapes |= {"mlp1.1.weight": (hidden, 4096), "mlp1.1.bias": (hidden,)}
    return shapes | {"mlp1.3.weight": (hidden, hidden), "mlp1.3.bias": (hidden,)}


def internvl2_5_1b() -> tuple[Shapes, dict[str, Any]]:
    """InternVL2.5-1B: InternViT-300M and Qwen2.5-0.5B, embedding and head apart."""
    shapes = decoder(
        QWEN2_5_HALF_B, 151674, "language_model.model.", "language_model.lm_head", bias=True
    )
    shapes |= _internvit(896)
    text = {**QWEN2_5_HALF_B, "model_type": "qwen2", "vocab_size": 151674}
    return shapes, {"model_type": "internvl_chat", "llm_config": text, "tie_word_embeddings": False}


def internvl3_5_30b(layers: int = 48) -> tuple[Shapes, dict[str, Any]]:
    """InternVL3.5-30B-A3B: InternViT-300M and Qwen3-30B-A3B, every expert in tensors of its own."""
    prefix, hidden, vocab = "language_model.model.", QWEN3_30B["hidden_size"], 151936
    block: Shapes = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    block |= {"self_attn.q_proj": (4096, hidden), "self_attn.o_proj": (hidden, 4096)}
    block |= {"self_attn.k_proj": (512, hidden), "self_attn.v_proj": (512, hidden)}
    block |= {"self_attn.q_norm": (128,), "self_attn.k_norm": (128,), "mlp.gate": (128, hidden)}
    for i in range(128):
        at = f"mlp.experts.{i}."
        block |= {f"{at}gate_proj": (768, hidden), f"{at}up_proj": (768, hidden)}
        block |= {f"{at}down_proj": (hidden, 768)}
    shapes: Shapes = {f"{prefix}embed_tokens.weight": (vocab, hidden)}
    for i in range(layers):
        shapes |= {f"{prefix}layers.{i}.{name}.weight": shape for name, shape in block.items()}
    shapes |= {f"{prefix}norm.weight": (hidden,), "language_model.lm_head.weight": (vocab, hidden)}
    text = {**QWEN3_30B, "num_hidden_layers": layers, "vocab_size": vocab}
    return shapes | _internvit(hidden), {"model_type": "internvl_chat", "llm_config": text}


def _mm_projector(hidden: int, vision: int = 1024) -> Shapes:
    shapes: Shapes = {"model.mm_projector.0.weight": (hidden, vision)}
    shapes["model.mm_projector.2.weight"] = (hidden, hidden)
    return shapes | {f"model.mm_projector.{n}.bias": (hidden,) for n in (0, 2)}


def llava_1_5() -> tuple[Shapes, dict[str, Any]]:
    """LLaVA-1.5-7B; the tower is taken from CLIP and is not in the files."""
    shapes = decoder(LLAMA_7B, 32000) | _mm_projector(4096)
    return shapes, {**LLAMA_7B, "model_type": "llava", "vocab_size": 32000}


def sharegpt4v() -> tuple[Shapes, dict[str, Any]]:
    """ShareGPT4V-7B: as LLaVA-1.5, with the tower that it tuned."""
    shapes, config = llava_1_5()
    shapes |= _siglip("model.vision_tower.vision_tower.vision_model.", 1024, 24)
    return shapes, {**config, "model_type": "share4v"}


def cogvlm() -> tuple[Shapes, dict[str, Any]]:
    """CogVLM-Chat: every matrix twice, the norms once."""
    plain = decoder(LLAMA_7B, 32000)
    shapes = {name: shape for name, shape in plain.items() if "self_attn" not in name}
    shapes = {name: shape for name, shape in shapes.items() if ".mlp." not in name}
    for i in range(32):
        for branch in ("language", "vision"):
            at = f"model.layers.{i}."
            shapes[f"{at}self_attn.{branch}_expert_query_key_value.weight"] = (3 * 4096, 4096)
            shapes[f"{at}self_attn.{branch}_expert_dense.weight"] = (4096, 4096)
            for name in ("gate_proj", "up_proj", "down_proj"):
                shape = plain[f"{at}mlp.{name}.weight"]
                shapes[f"{at}mlp.{branch}_mlp.{name}.weight"] = shape
    for i in range(63):
        at = f"model.vision.transformer.layers.{i}."
        shapes |= {f"{at}attention.query_key_value.weight": (5376, 1792)}
    shapes |= {"model.vision.boi": (1, 1, 4096), "model.vision.eoi": (1, 1, 4096)}
    shapes["model.vision.linear_proj.linear_proj.weight"] = (4096, 1792)
    # CogVLM's configuration names neither key-value heads nor the RoPE base.
    told = {k: v for k, v in LLAMA_7B.items() if k not in ("num_key_value_heads", "rope_theta")}
    return shapes, {**told, "vocab_size": 32000}


def mplug_owl2() -> tuple[Shapes, dict[str, Any]]:
    """mPLUG-Owl2: keys, values and norms twice ("multiway")."""
    shapes: Shapes = {}
    for name, shape in decoder(LLAMA_7B, 32000).items():
        twice = any(part in name for part in (".k_proj.", ".v_proj.", "_layernorm."))
        stem = name.removesuffix("weight")
        shapes |= {f"{stem}multiway.{n}.weight": shape for n in (0, 1)} if twice else {name: shape}
    for i in range(32):
        shapes[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = (64,)
    at = "model.visual_abstractor.encoder.layers.0.crossattention.output.mlp."
    shapes |= {f"{at}w1.weight": (2816, 1024), f"{at}w3.weight": (1024, 2816)}
    for i in range(24):
        at = f"model.vision_model.encoder.layers.{i}.self_attn."
        shapes[f"{at}query_key_value.weight"] = (3072, 1024)
    return shapes, {**LLAMA_7B, "model_type": "mplug_owl2", "vocab_size": 32000}


def yi_vl_34b() -> tuple[Shapes, dict[str, Any]]:
    """Yi-VL-34B: LLaVA's naming, with norms in the projector."""
    shapes = decoder(YI_34B, 64000) | _mm_projector(7168, 1280)
    return shapes, {**YI_34B, "model_type": "llava", "vocab_size": 64000}


def cambrian_34b() -> tuple[Shapes, dict[str, Any]]:
    """Cambrian-34B: several towers, a sampler of its own."""
    shapes = decoder(YI_34B, 64000)
    shapes["model.mm_projector_aux_0.0.weight"] = (1024, 1152)
    shapes["model.vision_sampler_0.layers.0.cross_attn.q_proj.1.weight"] = (1024, 1024)
    shapes["model.image_newline"] = (7168,)
    return shapes, {**YI_34B, "model_type": "cambrian_llama", "vocab_size": 64000}


# Hub id, as in the recipes -> how its files look.
CHECKPOINTS = {
    "OpenGVLab/InternVL2_5-1B": internvl2_5_1b,
    "Qwen/Qwen2-VL-7B": qwen2_vl,
    "Qwen/Qwen2-VL-7B-Instruct": qwen2_vl,
    "lmms-lab/llava-onevision-qwen2-7b-si": llava_onevision_original,
    "liuhaotian/llava-v1.5-7b": llava_1_5,
    "Lin-Chen/ShareGPT4V-7B": sharegpt4v,
    "THUDM/cogvlm-chat-hf": cogvlm,
    "MAGAer13/mplug-owl2-llama2-7b": mplug_owl2,
    "01-ai/Yi-VL-34B": yi_vl_34b,
    "nyu-visionx/cambrian-34b": cambrian_34b,
}
for _skill in ("OCR", "VQA", "Geometry", "Chart", "Grounding"):
    CHECKPOINTS[f"yongxianwei/InternVL2_5-1B_{_skill}"] = internvl2_5_1b
    CHECKPOINTS[f"yongxianwei/Qwen2-VL-7B-{_skill}"] = qwen2_vl


def write(hub: str, root: Path) -> Path:
    """Write a checkpoint's headers, once; the data are holes."""
    folder = root / hub.replace("/", "--")
    if folder.exists():
        return folder
    save(folder, *CHECKPOINTS[hub]())
    return folder


def save(folder: Path, shapes: Shapes, config: Mapping[str, Any]) -> None:
    """Write a folder of these tensors; the data are holes."""
    tensors = [OutputTensor(name, "BF16", shape) for name, shape in shapes.items()]
    reserve = shard._reserve
    shard._reserve = lambda descriptor, size: shard.os.ftruncate(descriptor, size)
    try:
        with CheckpointWriter(folder, shard_by_size(tensors, 5 * 10**9)) as out:
            (out.folder / "config.json").write_text(json.dumps(config))
    finally:
        shard._reserve = reserve

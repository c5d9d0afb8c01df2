"""One decoder in the published layouts of remote-code families, written by hand.

`decoder` gives weights by neutral names; each function here lays them out as the family's files
have them. The expected results of tests come from the same functions, so that splitting and fusing
is done here with torch alone.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import torch
from safetensors.torch import save_file

LAYERS, HEADS, KV_HEADS, HEAD, HIDDEN, MLP, VOCAB = 3, 4, 2, 8, 32, 48, 60
CONFIG = {
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "tie_word_embeddings": False,
}


def draw(key: str, *shape: int) -> torch.Tensor:
    """Random numbers that depend on nothing but the key."""
    seed = zlib.crc32(key.encode())
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def decoder(own: str, *, bias: bool = False, vocab: int = VOCAB, ancestor: str = "ancestor"):
    """A decoder with grouped queries: an ancestor's weights plus noise of its own."""
    kv = KV_HEADS * HEAD
    shapes = {"q": (HEADS * HEAD, HIDDEN), "k": (kv, HIDDEN), "v": (kv, HIDDEN)}
    shapes |= {"o": (HIDDEN, HEADS * HEAD), "gate": (MLP, HIDDEN), "up": (MLP, HIDDEN)}
    shapes |= {"down": (HIDDEN, MLP), "norm1": (HIDDEN,), "norm2": (HIDDEN,)}
    if bias:
        shapes |= {f"{name}_bias": (shapes[name][0],) for name in "qkv"}
    whole = {"embed": (vocab, HIDDEN), "head": (vocab, HIDDEN), "norm": (HIDDEN,)}
    whole |= {f"{i}.{name}": shape for i in range(LAYERS) for name, shape in shapes.items()}
    return {
        name: draw(f"{ancestor}/{name}", *shape) + 0.1 * draw(f"{own}/{name}", *shape)
        for name, shape in whole.items()
    }


def llama(w, prefix="model.", head="lm_head", numbers=None):
    """Split matrices; `numbers` moves layers apart."""
    words = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"}
    words |= {"o": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj"}
    words |= {"down": "mlp.down_proj", "norm1": "input_layernorm"}
    words |= {"norm2": "post_attention_layernorm"}
    out = {f"{prefix}embed_tokens.weight": w["embed"], f"{prefix}norm.weight": w["norm"]}
    out[f"{head}.weight"] = w["head"]
    for i in range(LAYERS):
        for short, word in words.items():
            name = f"{prefix}layers.{(numbers or range(LAYERS))[i]}.{word}"
            out[f"{name}.weight"] = w[f"{i}.{short}"]
            if f"{i}.{short}_bias" in w:
                out[f"{name}.bias"] = w[f"{i}.{short}_bias"]
    return out


def internlm2(w, prefix="language_model.model.", head="language_model.output"):
    """wqkv: for each key/value head its queries, its key, its value."""
    out = {f"{prefix}tok_embeddings.weight": w["embed"], f"{prefix}norm.weight": w["norm"]}
    out[f"{head}.weight"] = w["head"]
    words = {"o": "attention.wo", "gate": "feed_forward.w1", "up": "feed_forward.w3"}
    words |= {"down": "feed_forward.w2", "norm1": "attention_norm", "norm2": "ffn_norm"}
    for i in range(LAYERS):
        at = f"{prefix}layers.{i}."
        q = w[f"{i}.q"].reshape(KV_HEADS, HEADS // KV_HEADS, HEAD, HIDDEN)
        k, v = (w[f"{i}.{name}"].reshape(KV_HEADS, 1, HEAD, HIDDEN) for name in "kv")
        out[f"{at}attention.wqkv.weight"] = torch.cat([q, k, v], dim=1).reshape(-1, HIDDEN)
        for short, word in words.items():
            out[f"{at}{word}.weight"] = w[f"{i}.{short}"]
    return out


def phi3(w, base_layer=""):
    """qkv_proj and gate_up_proj, one after the other."""
    out = {"model.embed_tokens.weight": w["embed"], "model.norm.weight": w["norm"]}
    out["lm_head.weight"] = w["head"]
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        qkv = torch.cat([w[f"{i}.{name}"] for name in "qkv"])
        gate_up = torch.cat([w[f"{i}.gate"], w[f"{i}.up"]])
        matrices = {"self_attn.qkv_proj": qkv, "self_attn.o_proj": w[f"{i}.o"]}
        matrices |= {"mlp.gate_up_proj": gate_up, "mlp.down_proj": w[f"{i}.down"]}
        out |= {f"{at}{name}{base_layer}.weight": matrix for name, matrix in matrices.items()}
        out[f"{at}input_layernorm.weight"] = w[f"{i}.norm1"]
        out[f"{at}post_attention_layernorm.weight"] = w[f"{i}.norm2"]
    return out


def cogvlm2(text, vision):
    """CogVLM2: grouped queries; the vision expert's fused matrix has a bias, the other none."""
    out = {"model.embed_tokens.weight": text["embed"], "model.norm.weight": text["norm"]}
    out["lm_head.weight"] = text["head"]
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        out[f"{at}input_layernorm.weight"] = text[f"{i}.norm1"]
        out[f"{at}post_attention_layernorm.weight"] = text[f"{i}.norm2"]
        for branch, w in (("language", text), ("vision", vision)):
            qkv = torch.cat([w[f"{i}.{name}"] for name in "qkv"])
            out[f"{at}self_attn.{branch}_expert_query_key_value.weight"] = qkv
            out[f"{at}self_attn.{branch}_expert_dense.weight"] = w[f"{i}.o"]
            for name in ("gate", "up", "down"):
                out[f"{at}mlp.{branch}_mlp.{name}_proj.weight"] = w[f"{i}.{name}"]
        bias = draw(f"bias/{i}", (HEADS + 2 * KV_HEADS) * HEAD)
        out[f"{at}self_attn.vision_expert_query_key_value.bias"] = bias
    return out


def qwen_vl(w):
    """First Qwen: c_attn fused; c_proj(w1(x) · silu(w2(x)))."""
    out = {"transformer.wte.weight": w["embed"], "transformer.ln_f.weight": w["norm"]}
    out["lm_head.weight"] = w["head"]
    words = {"o": "attn.c_proj", "gate": "mlp.w2", "up": "mlp.w1", "down": "mlp.c_proj"}
    words |= {"norm1": "ln_1", "norm2": "ln_2"}
    for i in range(LAYERS):
        at = f"transformer.h.{i}."
        out[f"{at}attn.c_attn.weight"] = torch.cat([w[f"{i}.{name}"] for name in "qkv"])
        out |= {f"{at}{word}.weight": w[f"{i}.{short}"] for short, word in words.items()}
    return out


def mllama(w):
    """Mllama: cross-attention layers between the language model's own (after its second)."""
    out = llama(w, "language_model.model.", "language_model.lm_head", numbers=(0, 1, 3))
    extra = draw("special rows", 8, HIDDEN)
    embed = "language_model.model.embed_tokens.weight"
    out[embed] = torch.cat([w["embed"], extra])
    for name, shape in {
        "cross_attn.q_proj.weight": (HEADS * HEAD, HIDDEN),
        "cross_attn.k_norm.weight": (HEAD,),
        "cross_attn_attn_gate": (1,),
        "mlp.up_proj.weight": (MLP, HIDDEN),
        "input_layernorm.weight": (HIDDEN,),
    }.items():
        out[f"language_model.model.layers.2.{name}"] = draw(f"cross/{name}", *shape)
    return out


def write(folder: Path, tensors, *, tokens=None, shards: int = 1, **config) -> Path:
    """Save as safetensors with a config, and a tokenizer of the given token -> id."""
    folder.mkdir(parents=True)
    names = list(tensors)
    step = -(-len(names) // shards)
    weight_map = {}
    for number in range(shards):
        part = {name: tensors[name].clone().contiguous() for name in names[number * step :][:step]}
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    if tokens is not None:
        content = {"model": {"vocab": tokens}, "added_tokens": []}
        (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder

"""The language model's geometry: what its config says, checked against what its tensors show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from omnimerge.arch.layout import SlotMap
from omnimerge.checkpoint import Checkpoint

_TEXT_CONFIGS = ("text_config", "llm_config", "language_config")


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes and constants of a language model; None where neither config nor tensors tell.

    Attributes:
        model_type: the text model's type, for example ``qwen2``.
        hidden_size: width of the residual stream.
        layers: number of decoder layers.
        heads: attention heads.
        kv_heads: key/value heads.
        head_dim: size of one head.
        intermediate_size: width of the MLP.
        vocab_size: rows of the embedding on disk.
        tied: whether the head is the embedding (no tensor of its own on disk).
        rope_theta: base of the rotary frequencies.
        activation: activation of the MLP.
    """

    model_type: str | None
    hidden_size: int | None
    layers: int | None
    heads: int | None
    kv_heads: int | None
    head_dim: int | None
    intermediate_size: int | None
    vocab_size: int | None
    tied: bool
    rope_theta: float | None
    activation: str | None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary, for JSON."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a config that describes the language model.

    Published configs nest it (`text_config`, `thinker_config.text_config`, ...) or keep it at the
    top (Qwen2-VL as published); top-level values fill what the nested part leaves out, except
    those that name the whole model.

    Args:
        config: ``config.json``.

    Returns:
        One flat mapping.
    """
    inner = config.get("thinker_config", config)
    outer = {k: v for k, v in inner.items() if not isinstance(v, Mapping) or k in _ROPE}
    for key in _TEXT_CONFIGS:
        nested = inner.get(key)
        if isinstance(nested, Mapping):
            outer.pop("model_type", None)
            return {**_only_shared(outer), **nested}
    return outer


_ROPE = ("rope_parameters", "rope_scaling")


def _only_shared(outer: dict[str, Any]) -> dict[str, Any]:
    """Top-level entries that speak of the language model when a nested config is there too."""
    shared = ("tie_word_embeddings",)
    return {key: outer[key] for key in shared if key in outer}


def geometry(checkpoint: Checkpoint, slots: SlotMap) -> Geometry:
    """Return the geometry of a checkpoint's language model.

    What shapes tell is taken from the shapes; heads, RoPE base and activation from the config.
    Where a nested config leaves out heads or RoPE base because they equal its class's defaults (as
    LLaVA-1.5's does), transformers is asked for them.

    Args:
        checkpoint: the opened checkpoint.
        slots: its slots.

    Returns:
        The geometry.
    """
    config = text_config(checkpoint.config)
    if config.get("num_attention_heads") is None or _rope_theta(config) is None:
        config = {**_class_defaults(config.get("model_type")), **config}

    def shape(slot: str) -> tuple[int, ...]:
        name = slots.by_slot.get(slot)
        return checkpoint.tensors[name].shape if name else ()

    embed, query = shape("llm.embed.weight"), shape("llm.layers.0.attn.q.weight")
    key, gate = shape("llm.layers.0.attn.k.weight"), shape("llm.layers.0.mlp.gate.weight")
    heads = config.get("num_attention_heads")
    head_dim = config.get("head_dim") or (query[0] // heads if query and heads else None)
    return Geometry(
        model_type=config.get("model_type"),
        hidden_size=embed[1] if embed else config.get("hidden_size"),
        layers=slots.layer_count,
        heads=query[0] // head_dim if query and head_dim else heads,
        kv_heads=key[0] // head_dim if key and head_dim else config.get("num_key_value_heads"),
        head_dim=head_dim,
        intermediate_size=gate[0] if gate else config.get("intermediate_size"),
        vocab_size=embed[0] if embed else config.get("vocab_size"),
        tied="llm.head.weight" not in slots.by_slot,
        rope_theta=_rope_theta(config),
        activation=config.get("hidden_act"),
    )


def _rope_theta(config: Mapping[str, Any]) -> float | None:
    if config.get("rope_theta") is not None:
        return float(config["rope_theta"])
    for key in _ROPE:
        nested = config.get(key)
        if isinstance(nested, Mapping) and nested.get("rope_theta") is not None:
            return float(nested["rope_theta"])
    return None


def _class_defaults(model_type: str | None) -> dict[str, Any]:
    from omnimerge.arch.hf_tables import config_defaults

    return config_defaults(model_type) if model_type else {}

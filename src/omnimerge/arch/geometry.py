"""The language model's geometry: what its config says, checked against what its tensors show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from omnimerge.arch.layout import SlotMap
from omnimerge.checkpoint import Checkpoint
from omnimerge.errors import CheckpointError

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
        rope_scaling: how the frequencies are scaled, or None for the plain kinds.
        activation: activation of the MLP.
        norm_eps: what the norms add to the variance.
        quantized: whether the weights are stored in a packed or scaled form.
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
    rope_scaling: str | None
    activation: str | None
    norm_eps: float | None
    quantized: bool

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary, for JSON."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def text_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the part of a checkpoint's config that describes the language model.

    Published configs nest it (`text_config`, `thinker_config.text_config`, ...) or keep it at the
    top (Qwen2-VL as published). Keys whose value is null count as left out.

    Args:
        checkpoint: the opened checkpoint.

    Returns:
        One flat mapping.
    """
    outer = checkpoint.config.get("thinker_config") or checkpoint.config
    if not isinstance(outer, Mapping):
        raise _bad(checkpoint, "thinker_config", outer)
    for key in _TEXT_CONFIGS:
        nested = outer.get(key)
        if nested is not None:
            if not isinstance(nested, Mapping):
                raise _bad(checkpoint, key, nested)
            shared = {k: outer[k] for k in _SHARED if k in outer}
            return {k: v for k, v in {**shared, **nested}.items() if v is not None}
    return {k: v for k, v in outer.items() if v is not None}


# Top-level keys that speak of the language model even where its config is nested.
_SHARED = ("tie_word_embeddings", "quantization_config")
_ROPE = ("rope_parameters", "rope_scaling")


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
    config = text_config(checkpoint)
    if "num_attention_heads" not in config or _rope_theta(checkpoint, config) is None:
        config = {**_class_defaults(config.get("model_type")), **config}

    def shape(slot: str) -> tuple[int, ...]:
        names = (slots.by_slot.get(f"{slot}{branch}") for branch in ("", "@text"))
        name = next((name for name in names if name), None)
        return checkpoint.tensors[name].shape if name else ()

    embed, query = shape("llm.embed.weight"), shape("llm.layers.0.attn.q.weight")
    key, gate = shape("llm.layers.0.attn.k.weight"), shape("llm.layers.0.mlp.gate.weight")
    hidden = embed[1] if len(embed) == 2 else None
    heads = _integer(checkpoint, config, "num_attention_heads")
    head_dim = _integer(checkpoint, config, "head_dim")
    kv_heads = next((n for key in _KV_HEADS if (n := _integer(checkpoint, config, key))), None)
    if not query:  # inside a fused matrix, whose rows do not tell
        head_dim = head_dim or (hidden // heads if hidden and heads else None)
    if fused := _fused_shape(checkpoint, slots, {"attn.q", "attn.k", "attn.v"}):
        kv_heads = (fused[0] // head_dim - heads) // 2 if heads and head_dim else kv_heads
    if pair := _fused_shape(checkpoint, slots, {"mlp.gate", "mlp.up"}):
        gate = (pair[0] // 2, *pair[1:])
    head_dim = head_dim or (query[0] // heads if query and heads else None)
    activation = config.get("hidden_act", config.get("hidden_activation"))
    return Geometry(
        model_type=config.get("model_type"),
        hidden_size=hidden,
        layers=slots.layer_count,
        heads=query[0] // head_dim if query and head_dim else heads,
        kv_heads=key[0] // head_dim if key and head_dim else kv_heads,
        head_dim=head_dim,
        intermediate_size=gate[0] if gate else _integer(checkpoint, config, "intermediate_size"),
        vocab_size=embed[0] if embed else None,
        tied=_tied(checkpoint, config, slots),
        rope_theta=_rope_theta(checkpoint, config),
        rope_scaling=_rope_scaling(config),
        activation=_SAME_ACTIVATION.get(str(activation), activation),
        norm_eps=_norm_eps(checkpoint, config),
        quantized="quantization_config" in config,
    )


def _fused_shape(checkpoint: Checkpoint, slots: SlotMap, parts: set[str]) -> tuple[int, ...]:
    """Shape of the first layer's matrix that holds these slots, in whatever order; or nothing."""
    for slot, name in slots.by_slot.items():
        inner = slot.removeprefix("llm.layers.0.").partition(".weight")[0]
        if slot.startswith("llm.layers.0.") and set(inner.split("+")) == parts:
            return checkpoint.tensors[name].shape
    return ()


# CogVLM2 calls its key/value heads so.
_KV_HEADS = ("num_key_value_heads", "num_multi_query_heads")
_NORM_EPS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")


def _norm_eps(checkpoint: Checkpoint, config: Mapping[str, Any]) -> float | None:
    for key in _NORM_EPS:
        if (value := config.get(key)) is not None:
            try:
                return float(value)
            except (TypeError, ValueError, OverflowError):
                raise _bad(checkpoint, key, value) from None
    return None


_SAME_ACTIVATION = {"swish": "silu"}
# Scalings that leave the frequencies of short contexts as they are, or are for images only.
_PLAIN_ROPE = ("default", "dynamic", "mrope", None)


def _tied(checkpoint: Checkpoint, config: Mapping[str, Any], slots: SlotMap) -> bool:
    """Whether the head is the embedding: the config says so, or it has no tensor of its own.

    A head that is missing although the config unties it is not tied, it is missing.
    """
    said = [config.get("tie_word_embeddings"), checkpoint.config.get("tie_word_embeddings")]
    if "llm.head.weight" in slots.by_slot:
        return config.get("tie_word_embeddings") is True
    return True in said or False not in said


def _rope_theta(checkpoint: Checkpoint, config: Mapping[str, Any]) -> float | None:
    ropes = [config.get(key) for key in _ROPE]
    # Where layers differ in kind, each kind has its own; full attention speaks for the model.
    ropes += [rope.get("full_attention") for rope in ropes if isinstance(rope, Mapping)]
    for place in (config, *ropes):
        value = place.get("rope_theta") if isinstance(place, Mapping) else None
        if value is not None:
            try:
                return float(value)
            except (TypeError, ValueError, OverflowError):
                raise _bad(checkpoint, "rope_theta", value) from None
    return None


def _rope_scaling(config: Mapping[str, Any]) -> str | None:
    for key in _ROPE:
        value = config.get(key)
        if isinstance(value, Mapping):
            nested = value.get("full_attention")
            value = nested if isinstance(nested, Mapping) else value
            kind = value.get("rope_type", value.get("type"))
            return None if kind in _PLAIN_ROPE else f"{kind} {value.get('factor', '')}".strip()
    return None


def _integer(checkpoint: Checkpoint, config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _bad(checkpoint, key, value)
    return value


def _bad(checkpoint: Checkpoint, key: str, value: Any) -> CheckpointError:
    file = checkpoint.folder / "config.json"
    return CheckpointError(f"{file}: {key} is {value!r}, which cannot be; repair the file")


def _class_defaults(model_type: Any) -> dict[str, Any]:
    from omnimerge.arch.hf_tables import config_defaults

    return config_defaults(model_type) if isinstance(model_type, str) else {}

"""The composed model: a text model, its head, and parts that put features among its embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from omnimerge.compose.configuration import OmniConfig
from omnimerge.compose.encoded import Encoded, fitted, put_together
from omnimerge.compose.part import Part
from omnimerge.compose.renaming import convert_text_like
from omnimerge.compose.text import text_model

NEED_IDS = "media need input_ids, which say where they belong"


class OmniPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """What `OmniModel` and `OmniForConditionalGeneration` have in common."""

    config_class = OmniConfig
    base_model_prefix = "model"
    input_modalities = ("image", "audio", "video", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012 - transformers' own form
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save the model; see transformers."""
        convert_text_like(self.config.text_conversions)
        super().save_pretrained(*args, **kwargs)


class OmniModel(OmniPreTrainedModel):
    """Text model and parts, without a head.

    Positions: a part with M-RoPE (Qwen2-VL) says by how much its tokens are away from where text
    would be; these shifts are added up over the parts, so that features of any other part count as
    text. Such a part needs a text model with M-RoPE.

    Args:
        config: the configuration.
    """

    def __init__(self, config: OmniConfig) -> None:
        super().__init__(config)
        convert_text_like(config.text_conversions)
        self.language_model = text_model(config.text_config, config.text_class)
        places = {
            name: {m: (int(p["id"]), int(p["native"])) for m, p in part["placeholders"].items()}
            for name, part in (config.parts or {}).items()
        }
        self.parts = nn.ModuleDict(
            {name: Part(name, config.part_config(name), placed) for name, placed in places.items()}
        )
        self.inputs = {f"{name}_{each}": (name, each) for name in places for each in self._of(name)}
        self.rope_deltas: Tensor | None = None
        self.post_init()

    def _of(self, name: str) -> tuple[str, ...]:
        part: Any = self.parts[name]
        found: tuple[str, ...] = part.inputs
        return found

    def get_input_embeddings(self) -> Any:
        """Return the token embedding of the text model."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the token embedding of the text model."""
        self.language_model.set_input_embeddings(value)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        encoded: Encoded | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the model.

        Args:
            input_ids: ``(batch, tokens)``; a placeholder per feature of images, sounds and videos.
            attention_mask: ``(batch, tokens seen so far)``, 0 for padding.
            position_ids: ``(batch, tokens)``, positions as if all were text.
            past_key_values: the cache.
            inputs_embeds: ``(batch, tokens, hidden)`` instead of `input_ids`; then without media.
            use_cache: whether to return a cache.
            encoded: what `encode` made of the media, instead of them.
            **kwargs: inputs of the parts, each with its part's name and an underscore before its
                own name (`inputs` lists them), and what the text model takes.

        Returns:
            The text model's output.

        Raises:
            ValueError: if media have no placeholders, or are given with `inputs_embeds`.
        """
        media = self.media(kwargs)
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("give input_ids or inputs_embeds")
            if encoded is None:
                encoded = self.encode(input_ids, attention_mask, media, past)
            inputs_embeds = self.get_input_embeddings()(input_ids)
            if encoded is not None:
                inputs_embeds = encoded.put(inputs_embeds, past)
        elif any(media.values()):
            raise ValueError(NEED_IDS)
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=self._positions(
                position_ids, encoded, inputs_embeds.shape, attention_mask, past
            ),
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )

    def media(self, kwargs: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Take the parts' inputs out of keywords.

        Args:
            kwargs: the keywords; those of the parts are removed.

        Returns:
            Part -> its input, by the name that the original gives it -> value.
        """
        found: dict[str, dict[str, Any]] = {name: {} for name in self.parts}
        for key in [key for key in kwargs if key in self.inputs]:
            part, name = self.inputs[key]
            value = kwargs.pop(key)
            if value is not None:
                found[part][name] = value
        return found

    def encode(
        self, ids: Tensor, mask: Tensor | None, media: dict[str, dict[str, Any]], past: int = 0
    ) -> Encoded | None:
        """Run the towers.

        Args:
            ids: ``(batch, tokens)``, with the placeholders of all the media.
            mask: the attention mask of these tokens, and of those before them.
            media: what `media` returned.
            past: how many tokens are before them, in a cache.

        Returns:
            What the text model gets; None if there are no media.

        Raises:
            ValueError: if media have no placeholders.
        """
        whole = mask[:, -ids.shape[1] :] if _is_plain(mask) else None
        found = []
        for name, part in self.parts.items():
            fed = part(ids, whole, media[name])
            if fed is None and media[name] and not past:
                raise ValueError(f"inputs of the part {name!r} are given, but no placeholder of it")
            found += [fed] if fed is not None else []
        before = self.rope_deltas if past else None
        before = None if before is None else fitted(before, ids.shape[0])
        return put_together(found, whole, past, before)

    def _positions(
        self,
        given: Tensor | None,
        encoded: Encoded | None,
        shape: Sequence[int],
        mask: Tensor | None,
        past: int,
    ) -> Tensor | None:
        """Positions with the shifts of the parts that have M-RoPE."""
        batch, tokens = int(shape[0]), int(shape[1])
        shifts = None if encoded is None else encoded.shifts_of(past, tokens)
        if encoded is not None and shifts is not None:
            self.rope_deltas = encoded.after
        elif past == 0:
            self.rope_deltas = None
        if self.rope_deltas is None:
            return given
        if shifts is None:
            shifts = fitted(self.rope_deltas, batch).expand(3, -1, -1)
        if mask is not None and not _is_plain(mask) and given is not None:
            text = given  # a static cache has masks of its own, and `generate` gives positions
        else:
            seen = mask if _is_plain(mask) else torch.ones(batch, past + tokens)
            text = (seen.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens:]
        moved: Tensor = text.to(shifts.device) + shifts
        return moved


class OmniForConditionalGeneration(OmniPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """The composed model with its head; generates as any model of transformers does.

    Args:
        config: the configuration.
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: OmniConfig) -> None:
        super().__init__(config)
        self.model = OmniModel(config)
        text: Any = config.get_text_config(decoder=True)
        self.vocab_size = text.vocab_size
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=config.head_bias)
        self.post_init()

    @property
    def media_inputs(self) -> tuple[str, ...]:
        """Names of the inputs that the parts take."""
        return tuple(self.model.inputs)

    def get_decoder(self) -> Any:
        """Return the text model."""
        return self.model.language_model

    def get_input_embeddings(self) -> Any:
        """Return the token embedding."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the token embedding."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.lm_head

    def set_output_embeddings(self, value: Any) -> None:
        """Replace the head."""
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run the model.

        Args:
            input_ids: see `OmniModel.forward`.
            attention_mask: see there.
            position_ids: see there.
            past_key_values: see there.
            inputs_embeds: see there.
            labels: ``(batch, tokens)``, -100 where no loss is taken.
            use_cache: see there.
            logits_to_keep: logits of this many last tokens only; 0 for all. Or their indices.
            **kwargs: see there.

        Returns:
            ``logits`` of shape ``(batch, tokens, vocabulary)``, the cache, and a loss.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Any, dict[str, Any]]:
        """Repeat prompts for beams and several answers; run the towers before, once per prompt."""
        media = self.model.media(model_kwargs)
        encoded = model_kwargs.pop("encoded", None)
        if any(media.values()):
            if input_ids is None or model_kwargs.get("inputs_embeds") is not None:
                raise ValueError(NEED_IDS)
            mask, cache = model_kwargs.get("attention_mask"), model_kwargs.get("past_key_values")
            past = 0 if cache is None else int(cache.get_seq_length())
            positions = model_kwargs.get("position_ids")
            known = next((each.shape[-1] for each in (mask, positions) if each is not None), None)
            # With a cache, the prompt may be what is new, or all.
            new = input_ids[:, past:] if known in (None, input_ids.shape[1]) else input_ids
            encoded = self.model.encode(new, mask, media, past)
        ids, kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        if encoded is not None:
            kwargs["encoded"] = encoded.repeated(expand_size)
        return ids, kwargs

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Prepare a step; what the towers gave plays no part once it is in the cache."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)
        encoded, cache = inputs.get("encoded"), inputs.get("past_key_values")
        if encoded is not None and cache is not None and cache.get_seq_length() >= encoded.stop:
            del inputs["encoded"]
        return inputs

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """Check keywords of `generate`; the parts' inputs depend on the configuration."""
        known = self.model.inputs
        super()._validate_model_kwargs({k: v for k, v in model_kwargs.items() if k not in known})


def _is_plain(mask: Any) -> TypeGuard[Tensor]:
    """Whether a mask is one of tokens, and not what a static cache makes of it."""
    return isinstance(mask, Tensor) and mask.ndim == 2


def _register() -> None:
    AutoModel.register(OmniConfig, OmniModel, exist_ok=True)
    for name in ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"):
        auto = getattr(transformers, name, None)  # the last is younger than the others
        if auto is not None:
            auto.register(OmniConfig, OmniForConditionalGeneration, exist_ok=True)


_register()

"""The composed model: a text model, its head, and parts that put features among its embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from omnimerge.compose.configuration import OmniConfig
from omnimerge.compose.part import Fed, Part


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
        self.language_model = AutoModel.from_config(config.text_config)
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
            **kwargs: inputs of the parts, each with its part's name and an underscore before its
                own name (`inputs` lists them), and what the text model takes.

        Returns:
            The text model's output.

        Raises:
            ValueError: if media have no placeholders, or are given with `inputs_embeds`.
        """
        media = self._media(kwargs)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        fed: list[Fed] = []
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("give input_ids or inputs_embeds")
            inputs_embeds = self.get_input_embeddings()(input_ids)
            fed = self._feed(input_ids, attention_mask, media, past)
        elif any(media.values()):
            raise ValueError("media need input_ids, which say where they belong")
        for each in fed:
            embeds = each.embeds.to(inputs_embeds.device, inputs_embeds.dtype)
            place = each.mask.unsqueeze(-1).to(embeds.device)
            inputs_embeds = torch.where(place, embeds, inputs_embeds)
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=self._positions(
                position_ids, fed, inputs_embeds.shape, attention_mask, past
            ),
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )

    def _media(self, kwargs: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Take the parts' inputs out of the keywords."""
        found: dict[str, dict[str, Any]] = {name: {} for name in self.parts}
        for key in [key for key in kwargs if key in self.inputs]:
            part, name = self.inputs[key]
            value = kwargs.pop(key)
            if value is not None:
                found[part][name] = value
        return found

    def _feed(
        self, ids: Tensor, mask: Tensor | None, media: dict[str, dict[str, Any]], past: int
    ) -> list[Fed]:
        whole = mask[:, -ids.shape[1] :] if mask is not None and mask.ndim == 2 else None
        found = []
        for name, part in self.parts.items():
            fed = part(ids, whole, media[name])
            if fed is None and media[name] and not past:
                raise ValueError(f"inputs of the part {name!r} are given, but no placeholder of it")
            found += [fed] if fed is not None else []
        return found

    def _positions(
        self,
        given: Tensor | None,
        fed: Sequence[Fed],
        shape: Sequence[int],
        mask: Tensor | None,
        past: int,
    ) -> Tensor | None:
        """Positions with the shifts of the parts that have M-RoPE."""
        shifted = [each.positions for each in fed if each.positions is not None]
        if past == 0:
            self.rope_deltas = None
        if not shifted and self.rope_deltas is None:
            return given
        batch, tokens = int(shape[0]), int(shape[1])
        device = shifted[0].device if shifted else self.rope_deltas.device  # type: ignore[union-attr]
        seen = torch.ones(batch, past + tokens, device=device).long() if mask is None else mask
        text = (seen.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens:].to(device)
        if not shifted:
            deltas: Any = self.rope_deltas
            repeated = deltas.repeat_interleave(batch // deltas.shape[0], dim=0)
            moved: Tensor = (text + repeated).expand(3, -1, -1)
            return moved
        real = seen[:, -tokens:].bool().to(device)
        where = text[None] + sum(torch.where(real, each - text[None], 0) for each in shifted)
        highest = where.masked_fill(~real[None], -1).amax(dim=(0, 2))
        self.rope_deltas = (highest + 1 - real.sum(-1)).unsqueeze(-1)
        return where


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

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """Check keywords of `generate`; the parts' inputs depend on the configuration."""
        known = self.model.inputs
        super()._validate_model_kwargs({k: v for k, v in model_kwargs.items() if k not in known})


def _register() -> None:
    AutoModel.register(OmniConfig, OmniModel, exist_ok=True)
    for name in ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"):
        auto = getattr(transformers, name, None)  # the last is younger than the others
        if auto is not None:
            auto.register(OmniConfig, OmniForConditionalGeneration, exist_ok=True)


_register()

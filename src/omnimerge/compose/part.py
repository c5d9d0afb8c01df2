"""A part: a multimodal model without its language model, asked what it would have given that.

The original's own code puts features in place of placeholders, packs patches, computes positions.
Instead of doing that again for every architecture, a part runs the original base model with a
collector in the language model's place, which keeps what it is called with.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from omnimerge.errors import OmnimergeError

_OF_THE_TEXT = frozenset({
    "input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache",
    "labels", "cache_position", "logits_to_keep", "return_dict", "output_attentions",
    "output_hidden_states", "mm_encoder_outputs", "mm_token_type_ids", "token_type_ids", "kwargs",
    "rope_deltas",
})  # fmt: skip
_TYPES = {"image": 1, "video": 2, "audio": 3}  # of mm_token_type_ids
_UNDERSTOOD = frozenset({
    "input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache",
    "cache_position", "return_dict", "output_attentions", "output_hidden_states",
})  # fmt: skip


class PartError(OmnimergeError):
    """A part gives its language model more than embeddings and positions."""


@dataclass(frozen=True)
class Fed:
    """What a part gives the language model.

    Attributes:
        embeds: ``(batch, tokens, hidden)``; meaningful where `mask` is True.
        mask: ``(batch, tokens)``, True where features stand.
        positions: ``(3, batch, tokens)`` where the architecture has M-RoPE, else None.
    """

    embeds: Tensor
    mask: Tensor
    positions: Tensor | None


class _Words(nn.Module):
    """Stands in for the token embedding: every token is zero."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.embedding_dim = hidden
        # A buffer that moves with the model tells dtype and device.
        self.register_buffer("place", torch.zeros(()), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Return zeros of shape ``(*ids.shape, hidden)``."""
        place: Any = self.place
        return torch.zeros(*ids.shape, self.embedding_dim, dtype=place.dtype, device=ids.device)


class _Collector(nn.Module):
    """Stands in for a language model: keeps its arguments and computes nothing."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = _Words(config.hidden_size)
        self.caught: dict[str, Any] = {}

    def get_input_embeddings(self) -> nn.Module:
        """Return what turns tokens into zeros."""
        return self.embed_tokens

    def forward(self, input_ids: Any = None, **given: Any) -> Any:
        """Keep the arguments; give the embeddings back as if they were the last layer's."""
        self.caught = {"input_ids": input_ids, **given}
        return BaseModelOutputWithPast(last_hidden_state=given.get("inputs_embeds"))


class Part(nn.Module):
    """The towers and projectors of one multimodal model.

    Args:
        name: what inputs of this part begin with.
        config: the original's configuration.
        placeholders: modality -> (token id in the composed model, in the original).
    """

    def __init__(self, name: str, config: Any, placeholders: dict[str, tuple[int, int]]) -> None:
        super().__init__()
        self.name = name
        self.placeholders = placeholders
        self.model = AutoModel.from_config(config)
        self.collector = [_Collector(config.get_text_config(decoder=True))]  # no submodule twice
        self.model.set_submodule(decoder_path(self.model), self.collector[0])
        self._takes = frozenset(inspect.signature(self.model.forward).parameters)
        taken = {each for _, each in placeholders.values()}
        self._neutral = next(i for i in range(len(taken) + 1) if i not in taken)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the original's inputs that are none of the text's."""
        return tuple(sorted(self._takes - _OF_THE_TEXT))

    def forward(self, ids: Tensor, mask: Tensor | None, given: dict[str, Any]) -> Fed | None:
        """Compute the features of a batch.

        Args:
            ids: ``(batch, tokens)``, of the composed model.
            mask: the attention mask, ``(batch, tokens)``.
            given: the original's own inputs, by their own names.

        Returns:
            What goes into the language model; None where the batch has no place for it.

        Raises:
            PartError: if the architecture gives its language model more than that.
        """
        native = torch.full_like(ids, self._neutral)
        types = torch.zeros_like(ids)
        for modality, (ours, theirs) in self.placeholders.items():
            native[ids == ours] = theirs
            types[ids == ours] = _TYPES[modality]
        places = types > 0
        if not given or not bool(places.any()):
            return None
        extra = {"mm_token_type_ids": types} if "mm_token_type_ids" in self._takes else {}
        if mask is not None:
            extra["attention_mask"] = mask
        self.model(input_ids=native, use_cache=False, **extra, **given)
        caught, self.collector[0].caught = self.collector[0].caught, {}
        return Fed(caught["inputs_embeds"], places, self._positions(caught))

    def _positions(self, caught: dict[str, Any]) -> Tensor | None:
        odd = [n for n, v in caught.items() if v is not None and n not in _UNDERSTOOD]
        odd += ["attention_mask"] if isinstance(caught.get("attention_mask"), dict) else []
        if odd:
            raise PartError(
                f"the part {self.name!r} ({self.model.config.model_type}) gives its language model "
                f"{', '.join(sorted(odd))} beside embeddings; such a model cannot be composed"
            )
        found = caught.get("position_ids")
        return found[-3:] if isinstance(found, Tensor) and found.ndim == 3 else None


def decoder_path(model: Any) -> str:
    """Return where the language model lies in a multimodal base model.

    Args:
        model: the base model.

    Returns:
        The module's dotted name.

    Raises:
        PartError: if transformers cannot tell.
    """
    decoder = model.get_decoder()
    for name, module in model.named_modules():
        if module is decoder and name:
            return str(name)
    raise PartError(f"transformers does not say where {type(model).__name__} has its LLM")

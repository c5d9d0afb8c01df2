"""Verify answers that are known from a neighbouring point instead of decoding them anew.

Two forward passes see a whole batch: the prompts, just as plain decoding begins, then all tokens of
their drafts at once. Where the model's own choices are the draft's, up to the token that ends the
answer, the sample is done. The others keep the prefix that agrees and the model's own next token;
their keys and values are cut out of the batch's cache, and rows of several batches are decoded on
together.

Positions, masks and whatever else a model keeps per token are advanced by the model's own methods,
token by token, as `generate` does. Logits of many tokens at once differ in their last bits from
those of one token after the other, so that a choice between two tokens that are closer than
`tolerance` is not taken from them: the sample is decoded from that token on. (The first token of an
answer comes from the same pass as in plain decoding.)

In 16 bits those differences are in the keys and values too, and make long answers that were decoded
on from them part from plain ones more often than another batch size does (10 % and 3 % of answers
of 32 tokens, miniature pair, endless answers). There a sample is decoded on from its first token.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omnimerge.generate.greedy import Tokens

SHORTEST_MEAN = 8.0
"""Drafts that are shorter than this on average are not worth a pass more: those of 8 tokens took
0.7 to 0.9 of the time of decoding, those of 6 tokens 0.9 to 1.1, those of 2 tokens 1.2 (see
benchmarks/search.py)."""

PRECISE = (torch.float32, torch.float64)

_PRECISE_ULPS, _COARSE_ULPS = 256.0, 4.0


@dataclass(frozen=True)
class Choices:
    """What a model would say next along some tokens.

    Attributes:
        tokens: its choice in place of each token, and after the last.
        close: whether that choice is too close to the second best to be relied on.
    """

    tokens: tuple[int, ...]
    close: tuple[bool, ...]


@dataclass
class Row:
    """A sample that has to be decoded on.

    Attributes:
        prefix: the tokens that are known to be the model's.
        next: the token that is fed next: the last of `prefix`.
        cached: per layer, keys and values of everything before it; None if the cache is of a kind
            that cannot be cut, and the sample has to be decoded from the beginning.
        position: the position of `next`, one number per axis of the model's rotary embedding.
    """

    prefix: tuple[int, ...]
    next: int = 0
    cached: list[tuple[Tensor, Tensor]] | None = None
    position: Tensor | None = None


@dataclass(frozen=True)
class Followed:
    """A batch after its drafts were fed to the model.

    Attributes:
        choices: per sample.
        cache: the model's cache, with prompts and drafts in it.
        mask: which of the prompts' tokens are no padding, ``(samples, tokens)``.
        positions: of all tokens, ``(..., samples, tokens)``; None if the model makes its own.
    """

    choices: list[Choices]
    cache: Any
    mask: Tensor
    positions: Tensor | None


def follow(model: Any, inputs: dict[str, Any], drafts: Sequence[Tokens]) -> Followed:
    """Feed prompts, and then all of their drafts at once.

    Args:
        model: a transformers model.
        inputs: of a batch, as for its ``generate``, padded on the left.
        drafts: tokens per sample; may be empty.

    Returns:
        The model's choices along each draft.
    """

    def decode(model: Any, input_ids: Tensor, **kwargs: Any) -> Followed:
        kwargs = {name: value for name, value in kwargs.items() if name not in _OF_GENERATE}
        return _follow(model, input_ids, kwargs, drafts)

    found: Followed = model.generate(**inputs, max_new_tokens=1, custom_generate=decode)
    return found


_OF_GENERATE = (
    "generation_config",
    "logits_processor",
    "stopping_criteria",
    "synced_gpus",
    "streamer",
    "tokenizer",
)


def _follow(
    model: Any, prompt: Tensor, kwargs: dict[str, Any], drafts: Sequence[Tokens]
) -> Followed:
    mask = kwargs.get("attention_mask")  # None where nothing is padded
    mask = torch.ones_like(prompt) if mask is None else mask
    given = model.prepare_inputs_for_generation(prompt, is_first_iteration=True, **kwargs)
    outputs = model(**given, return_dict=True)
    tops = [_top_two(outputs.logits[:, -1:].float())]  # as plain decoding takes its first token
    longest = max(map(len, drafts))
    for _ in range(longest):  # one by one: some models' own version does no more than one
        kwargs = model._update_model_kwargs_for_generation(
            outputs, kwargs, is_encoder_decoder=False
        )
    if longest:
        fed = prompt.new_zeros((len(prompt), longest))
        for row, draft in zip(fed, drafts, strict=True):
            row[: len(draft)] = prompt.new_tensor(draft)
        if "logits_to_keep" in kwargs:
            kwargs["logits_to_keep"] = longest
        given = model.prepare_inputs_for_generation(
            torch.cat([prompt, fed], dim=1), next_sequence_length=longest, **kwargs
        )
        outputs = model(**given, return_dict=True)
        tops.append(_top_two(outputs.logits[:, -longest:]))
    kwargs = model._update_model_kwargs_for_generation(outputs, kwargs, is_encoder_decoder=False)
    values, tokens = (torch.cat(parts, dim=1) for parts in zip(*tops, strict=True))
    close = values[..., 0] - values[..., 1] <= tolerance(values[..., 0], model.dtype)
    close[:, 0] = False
    choices = [
        Choices(tuple(t[: len(draft) + 1]), tuple(c[: len(draft) + 1]))
        for t, c, draft in zip(tokens[..., 0].tolist(), close.tolist(), drafts, strict=True)
    ]
    cache = outputs.get("past_key_values")
    return Followed(choices, cache, mask, kwargs.get("position_ids"))


def tolerance(best: Tensor, dtype: torch.dtype) -> Tensor:
    """Return how much better than the second best a choice has to be to be relied on.

    Measured on the miniature and on random weights, the two ways to compute the logits of a step
    differ by at most 50 units in the last place of the largest one in float32 (12 on average), and
    by 7 in bfloat16 (2 on average). There 2, 8 and 32 gave the same answers; a unit is 0.8 % of the
    logit, and more of them would leave few choices.

    Args:
        best: the largest logits.
        dtype: what the model computes in.

    Returns:
        A number per logit.
    """
    ulps = _PRECISE_ULPS if dtype in PRECISE else _COARSE_ULPS
    return ulps * torch.finfo(dtype).eps * best.abs().clamp(min=1.0)


def judge(
    followed: Followed,
    drafts: Sequence[Tokens],
    stops: Collection[int],
    longest: int,
    *,
    precise: bool = True,
) -> list[Row | tuple[int, ...]]:
    """Tell the samples that are done from those that have to be decoded on.

    Args:
        followed: from `follow`.
        drafts: the same as there, of at most `longest` tokens each.
        stops: the tokens that end an answer.
        longest: the most tokens of an answer.
        precise: whether a sample may go on from the keys and values of many tokens at once. If
            not, it goes on after its first token, where they are those of plain decoding.

    Returns:
        Per sample its answer, or how to go on.
    """
    cuttable = is_cuttable(followed)
    found: list[Row | tuple[int, ...]] = []
    for number, (draft, choices) in enumerate(zip(drafts, followed.choices, strict=True)):
        agreed, own = _agreed(tuple(draft), choices, stops)
        known = (*draft[:agreed], *own)
        if len(known) >= longest or (own and own[0] in stops):
            found.append(tuple(draft[:agreed]) if own and own[0] in stops else known[:longest])
            continue
        row = Row(known if precise else choices.tokens[:1])
        if cuttable:
            end = followed.mask.shape[1] + len(row.prefix) - 1
            row.next = row.prefix[-1]
            row.cached = _cut(followed, number, end)
            row.position = _position(followed, number, end)
        found.append(row)
    return found


def _agreed(
    draft: tuple[int, ...], choices: Choices, stops: Collection[int]
) -> tuple[int, tuple[int, ...]]:
    """How many tokens of the draft are the model's, and its own token after them, if it is sure."""
    for place, (token, close) in enumerate(zip(choices.tokens, choices.close, strict=True)):
        if close:
            return place, ()
        if place == len(draft) or token != draft[place] or token in stops:
            return place, (token,)
    raise AssertionError("there is one choice more than there are tokens")


def is_cuttable(followed: Followed) -> bool:
    """Return whether rows of the cache can be cut and put together anew.

    Args:
        followed: from `follow`.

    Returns:
        True for keys and values of all tokens in every layer; False for sliding windows that have
        already dropped some, recurrent states and cross-attention.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    cache = followed.cache
    if type(cache) is not DynamicCache or followed.positions is None:
        return False
    return all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)
        and layer.keys is not None
        and layer.keys.shape[-2] == followed.positions.shape[-1] - 1
        for layer in cache.layers
    )


def resume(model: Any, rows: Sequence[Row], longest: int) -> list[list[int]]:
    """Decode several samples on from where each of them stands.

    Args:
        model: a transformers model.
        rows: samples whose caches were cut.
        longest: the most tokens of an answer.

    Returns:
        Per sample the tokens after its prefix; what comes after the end of an answer is not cut.
    """
    from transformers.cache_utils import DynamicCache

    caches = [row.cached or [] for row in rows]
    lengths = [layers[0][0].shape[1] for layers in caches]
    width, device = max(lengths), model.device
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    for number in range(len(caches[0])):
        parts = ([layers[number][part] for layers in caches] for part in (0, 1))
        keys, values = (_stack(part, width).to(device) for part in parts)
        cache.update(keys, values, number)
    ids = torch.zeros((len(rows), width + 1), dtype=torch.long, device=device)
    mask = torch.zeros_like(ids)
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        ids[i, -1] = row.next
        mask[i, width - length :] = 1
    last = torch.stack([row.position for row in rows if row.position is not None], dim=-1)
    last = last.to(device)
    positions = last.new_zeros((*last.shape, width + 1))
    positions[..., -1] = last
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        max_new_tokens=longest - min(len(row.prefix) for row in rows),
    )
    tokens: list[list[int]] = output[:, width + 1 :].tolist()
    return tokens


def _top_two(logits: Tensor) -> tuple[Tensor, Tensor]:
    values, tokens = logits.topk(2, dim=-1)
    # `topk` may give either of two equal logits; plain decoding takes what `argmax` gives
    tokens[..., 0] = logits.argmax(dim=-1)
    return values.float(), tokens


def _cut(followed: Followed, number: int, end: int) -> list[tuple[Tensor, Tensor]]:
    """One sample's keys and values up to a token, without the padding before it."""
    start = int(followed.mask[number].argmax())
    return [
        (_kept(layer.keys[number, :, start:end]), _kept(layer.values[number, :, start:end]))
        for layer in followed.cache.layers
    ]


def _kept(part: Tensor) -> Tensor:
    """A copy in the host's memory, since the rows wait for others there."""
    return part.to("cpu", copy=True, memory_format=torch.contiguous_format)


def _position(followed: Followed, number: int, index: int) -> Tensor:
    positions = followed.positions
    assert positions is not None
    return positions[..., min(number, positions.shape[-2] - 1), index].clone()


def _stack(parts: Sequence[Tensor], width: int) -> Tensor:
    """Put ``(heads, tokens, size)`` tensors on top of each other, aligned at their last token."""
    first = parts[0]
    whole = first.new_zeros((len(parts), first.shape[0], width, first.shape[2]))
    for row, part in zip(whole, parts, strict=True):
        row[:, width - part.shape[1] :] = part
    return whole

"""Batches of prompts through one model: decoded, or verified, or followed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from omnimerge.errors import GenerationError
from omnimerge.generate.batching import BatchLimit, batches, in_batches, tokens_that_fit
from omnimerge.generate.drafting import Drafter, Fresh
from omnimerge.generate.drafts import Row
from omnimerge.generate.encoding import Encoder, Inputs
from omnimerge.generate.features import FeatureMemo
from omnimerge.generate.greedy import Tokens, make_greedy, stop_tokens, until_stop
from omnimerge.generate.memory import ByteStore
from omnimerge.generate.processor import InputProcessor
from omnimerge.generate.quiet import quiet
from omnimerge.generate.response import GenerationStats, Response

if TYPE_CHECKING:
    from torch import Tensor

    from omnimerge.generate.prompts import Prompt

T = TypeVar("T")
Answered = list[tuple[int, Response]]

POOLED_BATCHES = 4
"""Samples wait to be decoded on until there are this many batches of them."""

RESUMED_TOGETHER = 2
"""Batches of samples that are decoded on together: without prompts, twice as many fit."""


class Answering:
    """Takes prompts through a model, batch by batch.

    Args:
        model: the transformers model.
        processor: what turns prompts into its inputs.
        store: where inputs and features are kept.
        stats: where to count.
    """

    def __init__(
        self, model: Any, processor: InputProcessor, store: ByteStore, stats: GenerationStats
    ) -> None:
        self.memo = FeatureMemo(model, store, stats)
        self.encoder = Encoder(processor, model, store, stats)
        self._model = model
        self._processor = processor
        self._stats = stats
        self._stops = stop_tokens(model, processor.tokenizer)
        make_greedy(model, processor.tokenizer, self._stops)
        self._drafter = Drafter(model, self._stops, stats)
        self._room: int | None = None
        self._limit, self._resumed = BatchLimit(stats), BatchLimit(stats)
        model.register_forward_pre_hook(self._count_pass)

    def decoded(
        self, prompts: Sequence[Prompt], longest: int, batch_size: int | None
    ) -> Iterator[Answered]:
        """Decode.

        Args:
            prompts: the prompts.
            longest: the most tokens of an answer.
            batch_size: the most prompts in one batch, or None.

        Yields:
            Positions in `prompts` and their answers, batch by batch.
        """

        def work(batch: list[int]) -> list[Tokens]:
            return self._decode(*self._open([prompts[i] for i in batch]), longest)

        groups = self._groups(prompts, batch_size)
        for batch, tokens in self._in_batches(groups, prompts, work):
            yield self._responses(prompts, batch, tokens)

    def drafted(
        self,
        prompts: Sequence[Prompt],
        longest: int,
        batch_size: int | None,
        drafts: Sequence[Response],
    ) -> Iterator[Answered]:
        """Verify drafts where that is worth it; what has to be decoded on waits for company.

        Args:
            prompts: the prompts.
            longest: the most tokens of an answer.
            batch_size: the most prompts in one batch, or None.
            drafts: one per prompt.

        Yields:
            Positions in `prompts` and their answers.
        """
        if not self._drafter.takes(drafts, longest):
            yield from self.decoded(prompts, longest, batch_size)
            return
        pool: list[tuple[int, Row]] = []
        groups = self._groups(prompts, batch_size)
        size = max(map(len, groups), default=1)

        def work(batch: list[int]) -> Sequence[Row | Tokens]:
            inputs, fresh = self._open([prompts[i] for i in batch])
            if self._drafter.doubt(inputs, fresh):
                return self._decode(inputs, fresh, longest)
            return self._drafter.verify(inputs, [drafts[i] for i in batch], longest, fresh)

        with self._drafter.weighed(longest) as plain:
            for batch, found in self._in_batches(groups, prompts, work):
                plain.append([len(drafts[i].tokens) for i in batch])
                done = [(i, f) for i, f in zip(batch, found, strict=True) if not isinstance(f, Row)]
                pool += [(i, f) for i, f in zip(batch, found, strict=True) if isinstance(f, Row)]
                if done:
                    yield self._responses(prompts, *zip(*done, strict=True))
                if len(pool) >= POOLED_BATCHES * self._limit.size(size):
                    yield from self._redone(prompts, pool, longest, size)
                    pool = []
            yield from self._redone(prompts, pool, longest, size)

    def followed(
        self, prompts: Sequence[Prompt], batch_size: int | None, answers: Sequence[Response]
    ) -> Iterator[tuple[list[int], list[tuple[int, ...]]]]:
        """Feed answers, and give what the model would say at each of their tokens.

        Args:
            prompts: the prompts.
            batch_size: the most prompts in one batch, or None.
            answers: one per prompt.

        Yields:
            Positions in `prompts`, and the model's choices along their answers.

        Raises:
            GenerationError: if the model's architecture does not allow it.
        """

        def work(batch: list[int]) -> list[tuple[int, ...]]:
            inputs, fresh = self._open([prompts[i] for i in batch])
            if doubt := self._drafter.doubt(inputs, fresh):
                raise GenerationError(
                    f"this model cannot follow given answers ({doubt}); compare answers instead "
                    "of next tokens"
                )
            followed = self._drafter.follow(inputs, [answers[i].tokens for i in batch], fresh)
            return [choices.tokens for choices in followed.choices]

        yield from self._in_batches(self._groups(prompts, batch_size), prompts, work)

    def logits(self, prompt: Prompt) -> Tensor:
        """Return the logits of the first token of one prompt's answer.

        Args:
            prompt: the prompt.

        Returns:
            ``(1, words)``.
        """

        def work(_: list[int]) -> Tensor:
            inputs, fresh = self._open([prompt])
            with torch.inference_mode(), fresh():
                output = self._model.generate(
                    **inputs, max_new_tokens=1, output_logits=True, return_dict_in_generate=True
                )
            first: Tensor = output.logits[0]
            return first

        [(_, found)] = self._in_batches([[0]], [prompt], work)
        return found

    def _redone(
        self, prompts: Sequence[Prompt], pool: Sequence[tuple[int, Row]], longest: int, size: int
    ) -> Iterator[Answered]:
        """The answers of samples that left their drafts, in batches of about `size`."""
        # Those that have most of their answer together: a batch is done when its last sample is.
        rows = dict(sorted(pool, key=lambda entry: len(entry[1].prefix)))
        size = self._limit.size(size)

        def resume(batch: list[int]) -> list[Tokens]:
            return self._drafter.resume([rows[i] for i in batch], longest)

        def restart(batch: list[int]) -> list[Tokens]:
            return self._decode(*self._open([prompts[i] for i in batch], keep=False), longest)

        cut = [i for i, row in rows.items() if row.cached is not None]
        whole = [i for i, row in rows.items() if row.cached is None]
        for groups, work, limit in (
            (_chunks(cut, RESUMED_TOGETHER * size), resume, self._resumed),
            (_chunks(whole, size), restart, self._limit),
        ):
            for batch, tokens in self._in_batches(groups, prompts, work, limit):
                yield self._responses(prompts, batch, tokens)

    def _groups(self, prompts: Sequence[Prompt], batch_size: int | None) -> list[list[int]]:
        with quiet():
            sizes = [self.encoder.size(prompt) for prompt in prompts]
        if self._room is None:  # once, so that the batches are the same at every point
            self._room = tokens_that_fit(self._model)
        return batches(sizes, batch_size, self._room)

    def _in_batches(
        self,
        groups: Sequence[Sequence[int]],
        prompts: Sequence[Prompt],
        work: Callable[[list[int]], T],
        limit: BatchLimit | None = None,
    ) -> Iterator[tuple[list[int], T]]:
        def name(position: int) -> str:
            return f"prompt {prompts[position].id!r}"

        return in_batches(groups, limit or self._limit, work, name)

    def _open(self, prompts: Sequence[Prompt], *, keep: bool = True) -> tuple[Inputs, Fresh]:
        """A batch's inputs, and what opens it for a pass from its beginning."""
        key = tuple(prompts) if keep else None
        return self.encoder.batch(prompts, keep=keep), lambda: self.memo.batch(key)

    def _decode(self, inputs: Inputs, fresh: Fresh, longest: int) -> list[Tokens]:
        """New tokens of each row, cut before the token that ends the answer."""
        with torch.inference_mode(), fresh():
            output = self._model.generate(**inputs, max_new_tokens=longest)
        seen = 0 if self._model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        found = [until_stop(row[seen:].tolist(), self._stops) for row in output]
        self._stats.tokens_decoded += sum(map(len, found))
        return found

    def _responses(
        self, prompts: Sequence[Prompt], batch: Sequence[int], tokens: Sequence[Tokens]
    ) -> Answered:
        self._stats.samples_answered += len(batch)
        return [
            (i, Response(prompts[i].id, self._processor.decode(t), tuple(t)))
            for i, t in zip(batch, tokens, strict=True)
        ]

    def _count_pass(self, *_: Any) -> None:
        self._stats.forward_passes += 1


def _chunks(positions: Sequence[int], size: int) -> list[Sequence[int]]:
    return [positions[i : i + size] for i in range(0, len(positions), size)]

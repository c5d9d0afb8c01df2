"""When drafts are worth verifying, and whether this architecture can be trusted to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from omnimerge.errors import one_line
from omnimerge.generate.batching import is_out_of_memory
from omnimerge.generate.drafts import (
    PRECISE,
    SHORTEST_MEAN,
    Choices,
    Followed,
    Row,
    follow,
    judge,
    resume,
)
from omnimerge.generate.encoding import Inputs
from omnimerge.generate.greedy import Tokens, until_stop
from omnimerge.generate.response import GenerationStats, Response

Fresh = Callable[[], "AbstractContextManager[None]"]
"""Opens a block in which a batch is seen from its beginning; see `FeatureMemo.batch`."""

_PROOF_TOKENS = 8
_WORTH_IT = 0.8


class Drafter:
    """Verifies drafts with one model, after it has proven that this gives what decoding gives.

    The proof is made once, with the first batch: some tokens are decoded plainly, then fed at once,
    then half of them are given as a draft and the rest decoded on.

    Args:
        model: the model.
        stops: the tokens that end an answer.
        stats: where to count.
    """

    def __init__(self, model: Any, stops: frozenset[int], stats: GenerationStats) -> None:
        self._model = model
        self._stops = stops
        self._stats = stats
        self._precise = model.dtype in PRECISE
        self._proven = False
        self._resumes = True
        self._doubt = "it is an encoder-decoder model" if model.config.is_encoder_decoder else ""
        self._proof_passes = 0
        self._pause = False

    def takes(self, drafts: Sequence[Response], longest: int) -> bool:
        """Return whether drafts are worth looking at; if not, `stats` says why.

        Args:
            drafts: one per prompt.
            longest: the most tokens of an answer.

        Returns:
            True if they should be verified.
        """
        mean = sum(min(longest, len(draft.tokens)) for draft in drafts) / max(1, len(drafts))
        reason = self._doubt
        if mean < SHORTEST_MEAN:
            reason = f"drafts of {mean:.1f} tokens on average are decoded as fast as verified"
        elif self._pause:
            self._pause = False  # the next points may lie closer together
            reason = "the drafts before saved too little"
        if reason:
            self._stats.drafts_refused += 1
            self._stats.refusal = reason
        else:
            self._stats.drafts_taken += 1
            self._stats.drafts_in_16_bits += not self._precise
        return not reason

    def doubt(self, inputs: Inputs, fresh: Fresh) -> str:
        """Return why this model's drafts cannot be verified, or an empty text.

        Args:
            inputs: of any batch, for the proof.
            fresh: opens that batch.

        Returns:
            The reason.
        """
        if not self._proven and not self._doubt:
            before = self._stats.forward_passes
            try:
                with torch.inference_mode(), self._endless():
                    self._doubt = self._prove(inputs, fresh)
            except Exception as error:  # whatever an architecture does not support
                if is_out_of_memory(error):
                    raise
                self._doubt = f"the model does not take several tokens at once ({one_line(error)})"
            self._proof_passes = self._stats.forward_passes - before
            self._proven = True
            self._stats.refusal = self._doubt or self._stats.refusal
        return self._doubt

    def follow(self, inputs: Inputs, drafts: Sequence[Tokens], fresh: Fresh) -> Followed:
        """Feed a batch with drafts; see `drafts.follow`.

        Args:
            inputs: of the batch.
            drafts: tokens per sample.
            fresh: opens the batch.

        Returns:
            The model's choices along the drafts.
        """
        with torch.inference_mode(), fresh():
            return follow(self._model, inputs, drafts)

    def verify(
        self, inputs: Inputs, drafts: Sequence[Response], longest: int, fresh: Fresh
    ) -> list[Row | tuple[int, ...]]:
        """Verify the drafts of a batch.

        Args:
            inputs: of the batch.
            drafts: one per sample.
            longest: the most tokens of an answer.
            fresh: opens the batch.

        Returns:
            Per sample its answer, or how to go on.
        """
        tokens = [draft.tokens[:longest] for draft in drafts]
        followed = self.follow(inputs, tokens, fresh)
        judged = judge(followed, tokens, self._stops, longest, precise=self._precise)
        for draft, found in zip(tokens, judged, strict=True):
            if isinstance(found, Row):
                self._stats.samples_redone += 1
                if not self._resumes:
                    found.cached = None
                if found.cached is None:
                    continue  # its tokens count when they are decoded
            known = found.prefix if isinstance(found, Row) else found
            same = sum(a == b for a, b in zip(draft, known, strict=False))
            self._stats.tokens_verified += same
            self._stats.tokens_decoded += len(known) - same
            self._stats.samples_verified += not isinstance(found, Row)
        return judged

    def resume(self, rows: Sequence[Row], longest: int) -> list[Tokens]:
        """Decode samples on; see `drafts.resume`.

        Args:
            rows: samples whose caches were cut.
            longest: the most tokens of an answer.

        Returns:
            Per sample its whole answer.
        """
        with torch.inference_mode():
            found = resume(self._model, rows, longest)
        answers: list[Tokens] = []
        for row, more in zip(rows, found, strict=True):
            ended = until_stop(more[: longest - len(row.prefix)], self._stops)
            self._stats.tokens_decoded += len(ended)
            answers.append([*row.prefix, *ended])
        return answers

    @contextmanager
    def weighed(self, longest: int) -> Iterator[list[list[int]]]:
        """Compare what drafts cost with what plain decoding would have cost.

        Args:
            longest: the most tokens of an answer.

        Yields:
            A list to which the lengths of the drafts are added, batch by batch.
        """
        plain: list[list[int]] = []
        before = self._stats.forward_passes
        self._proof_passes = 0
        yield plain
        passes = self._stats.forward_passes - before - self._proof_passes
        expected = sum(min(longest, 1 + max(lengths)) for lengths in plain)
        self._pause = passes > _WORTH_IT * expected
        if self._doubt:
            self._stats.drafts_taken -= 1
            self._stats.drafts_refused += 1

    def _prove(self, inputs: Inputs, fresh: Fresh) -> str:
        with fresh():
            output = self._model.generate(**inputs, max_new_tokens=_PROOF_TOKENS)
        plain: list[list[int]] = output[:, -_PROOF_TOKENS:].tolist()
        # Rounding to 16 bits makes plain decoding differ from itself now and then.
        allowed = 0 if self._precise else len(plain) // 8
        followed = self.follow(inputs, plain, fresh)
        if sum(map(_contradicts, followed.choices, plain)) > allowed:
            return "the model's answers differ when several tokens are fed at once"
        half = _PROOF_TOKENS // 2
        drafts = [[*tokens[:half], tokens[half] ^ 1] for tokens in plain]
        followed = self.follow(inputs, drafts, fresh)
        judged = judge(followed, drafts, (), _PROOF_TOKENS, precise=self._precise)
        kept = [(row, t) for row, t in zip(judged, plain, strict=True) if isinstance(row, Row)]
        self._resumes = all(row.cached is not None for row, _ in kept)
        if self._resumes and kept:
            more = resume(self._model, [row for row, _ in kept], _PROOF_TOKENS)
            found = [[*row.prefix, *m] for (row, _), m in zip(kept, more, strict=True)]
            pairs = zip(found, kept, strict=True)
            self._resumes = sum(f[:_PROOF_TOKENS] != t for f, (_, t) in pairs) <= allowed
        return ""

    @contextmanager
    def _endless(self) -> Iterator[None]:
        """Let no answer end, so that every sample has its part in the proof."""
        from transformers import GenerationConfig

        config = self._model.generation_config
        self._model.generation_config = GenerationConfig(
            do_sample=False, num_beams=1, pad_token_id=config.pad_token_id
        )
        try:
            yield
        finally:
            self._model.generation_config = config


def _contradicts(choices: Choices, tokens: Tokens) -> bool:
    """Whether tokens that were decoded are not what was chosen along them, but for ties."""
    for own, chosen, close in zip(tokens, choices.tokens, choices.close, strict=False):
        if own != chosen:
            return not close  # after a tie, what follows has no meaning
    return False

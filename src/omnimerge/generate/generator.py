"""One loaded model that answers prompts and takes new weights in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omnimerge.errors import GenerationError
from omnimerge.generate.answering import Answered, Answering
from omnimerge.generate.canary import Canary
from omnimerge.generate.loading import LoadedModel, load_model
from omnimerge.generate.memory import CACHE_BYTES, ByteStore
from omnimerge.generate.processor import InputProcessor
from omnimerge.generate.quiet import quiet
from omnimerge.generate.response import GenerationStats, Response
from omnimerge.generate.weights import WeightSlots

if TYPE_CHECKING:
    from torch import Tensor

    from omnimerge.generate.prompts import Prompt

Progress = Callable[[int, int], None]


class Generator:
    """Answers prompts with one model: greedy, deterministic, in batches of similar length.

    Greedy means the most probable token at every step. Sampling settings and repetition penalties
    of the checkpoint's generation_config.json are not used: a penalty also counts padding, so that
    an answer would depend on the batch it is in. The tokens that end an answer are.

    The same prompts are answered faster after `set_weights`: what does not depend on the weights
    that changed is not computed again, and drafts are verified instead of decoded. Neither changes
    an answer, except where two tokens are equally probable up to rounding.

    Args:
        folder: the checkpoint's folder.
        loaded: the transformers model, as `load_model` gives it.
        processor: what turns prompts into its inputs.
        cache_bytes: the most bytes of the host's memory for inputs and features; 0 for none.
        stats: where to count on; None for new ones.

    Attributes:
        stats: what was done since the model was loaded, added to what was given.
    """

    def __init__(
        self,
        folder: Path,
        loaded: LoadedModel,
        processor: InputProcessor,
        *,
        cache_bytes: int = CACHE_BYTES,
        stats: GenerationStats | None = None,
    ) -> None:
        self.folder = folder
        self.model = loaded.model
        self.processor = processor
        self.stats = GenerationStats() if stats is None else stats
        self._prefix = loaded.prefix
        self._slots: WeightSlots | None = None
        self._store = ByteStore(cache_bytes)
        self._answering = Answering(self.model, processor, self._store, self.stats)
        self._canary = Canary.of(self.model)
        self._canary_prompt: Prompt | None = None

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        device: str = "cpu",
        dtype: str = "auto",
        trust_remote_code: bool = False,
        cache_bytes: int = CACHE_BYTES,
        stats: GenerationStats | None = None,
    ) -> Generator:
        """Load model and processor of a checkpoint folder.

        Args:
            folder: the checkpoint, as transformers reads it.
            device: a torch device, such as ``cpu`` or ``cuda:0``.
            dtype: ``auto`` (float32 on a CPU, the checkpoint's dtype elsewhere), ``float32``,
                ``bfloat16`` or ``float16``.
            trust_remote_code: whether Python code in the folder may run.
            cache_bytes: the most bytes of the host's memory that are used to keep inputs and
                features for the next point; 0 for none.
            stats: where to count on; None for new ones.

        Returns:
            The generator.

        Raises:
            GenerationError: if the model cannot be loaded completely, with the names of missing,
                unexpected and mismatched tensors, or if it has no processor or chat template.
        """
        with quiet():
            loaded = load_model(
                folder, device=device, dtype=dtype, trust_remote_code=trust_remote_code
            )
            processor = InputProcessor.load(
                folder, multimodal=loaded.multimodal, trust_remote_code=trust_remote_code
            )
            return cls(folder, loaded, processor, cache_bytes=cache_bytes, stats=stats)

    def responses(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = 32,
        batch_size: int | None = None,
        on_progress: Progress | None = None,
        drafts: Sequence[Response] | None = None,
    ) -> list[Response]:
        """Answer prompts.

        Args:
            prompts: the prompts; their `answer` is not looked at.
            max_new_tokens: the most tokens of an answer, at least 1.
            batch_size: the most prompts in one batch, at least 1; None for as many as seems right.
                A batch that does not fit into memory is halved. Answers do not depend on it,
                except where two tokens are equally probable up to rounding.
            on_progress: called with (answered, all) after every batch.
            drafts: answers to the same prompts that are likely to be right, such as those at a
                neighbouring point. They are verified where that is faster than decoding.

        Returns:
            One response per prompt, in the order of `prompts`.

        Raises:
            PromptError: if an image cannot be decoded.
            GenerationError: if the model cannot take the prompts, one of them does not fit into
                memory by itself, or the model computes with other weights than it was given.
        """
        answered: dict[int, Response] = {}
        for found in self._answer(prompts, max_new_tokens, batch_size, drafts):
            answered.update(found)
            if on_progress is not None:
                on_progress(len(answered), len(prompts))
        return [answered[position] for position in range(len(prompts))]

    def responses_iter(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = 32,
        batch_size: int | None = None,
        drafts: Sequence[Response] | None = None,
    ) -> Iterator[tuple[int, Response]]:
        """Answer prompts, giving each answer as soon as it is there; see `responses`.

        Args:
            prompts: the prompts.
            max_new_tokens: the most tokens of an answer, at least 1.
            batch_size: the most prompts in one batch, or None.
            drafts: answers that are likely to be right, or None.

        Yields:
            A position in `prompts` and its answer; each position once, in any order.

        Raises:
            PromptError: if an image cannot be decoded.
            GenerationError: see `responses`.
        """
        for found in self._answer(prompts, max_new_tokens, batch_size, drafts):
            yield from found

    def teacher_forced(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[Response],
        *,
        batch_size: int | None = None,
    ) -> list[tuple[int, ...]]:
        """Follow answers, and return what the model itself would say at each of their tokens.

        Nothing is decoded: the answers are fed at once.

        Args:
            prompts: the prompts.
            answers: the answer to follow, per prompt. Only its tokens are looked at.
            batch_size: the most prompts in one batch, or None.

        Returns:
            Per prompt the most probable token in place of each token of the answer, and after the
            last: one more than the answer has.

        Raises:
            PromptError: if an image cannot be decoded.
            GenerationError: see `responses`; also if the model's architecture does not allow it.
        """
        _check_pairs(prompts, answers)
        self._check_weights(prompts)

        found: dict[int, tuple[int, ...]] = {}
        for batch, choices in self._answering.followed(prompts, batch_size, answers):
            found.update(zip(batch, choices, strict=True))
        return [found[position] for position in range(len(prompts))]

    def set_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Put tensors into the model, in place.

        Args:
            tensors: pairs of a name, as in the checkpoint's files, and a tensor of the shape that
                it has there. Rounded to the dtype the model runs in. A later call must give at
                least the names given before.

        Raises:
            GenerationError: for an unknown name or a wrong shape, and if afterwards any of these
                parameters does not hold what was given.
            LayoutError: if the checkpoint's names cannot be matched to the model's.
        """
        state = self.model.state_dict()
        if self._slots is None:
            self._slots = WeightSlots(self.folder, state, self._prefix)
        try:
            change = self._slots.fill(tensors)
        except BaseException:  # nobody knows what it holds now
            self._answering.memo.forget()
            self._canary.forget()
            raise
        self._answering.memo.changed(change.given, state)
        self._canary.changed(change.changed)
        self._store.next_point()

    def _answer(
        self,
        prompts: Sequence[Prompt],
        longest: int,
        batch_size: int | None,
        drafts: Sequence[Response] | None,
    ) -> Iterator[Answered]:
        """The answers, batch by batch."""
        if longest < 1 or (batch_size is not None and batch_size < 1):
            raise GenerationError(
                f"max_new_tokens {longest} and batch_size {batch_size} must be at least 1"
            )
        if drafts is not None:
            _check_pairs(prompts, drafts)
        self._check_weights(prompts)
        if drafts is not None:
            return self._answering.drafted(prompts, longest, batch_size, drafts)
        return self._answering.decoded(prompts, longest, batch_size)

    def _check_weights(self, prompts: Sequence[Prompt]) -> None:
        """Ask the canary, where weights were set since it was last asked."""
        if not prompts or not self._canary.due:
            return
        with quiet():
            sizes = {prompt: self._answering.encoder.size(prompt) for prompt in prompts}
        self._canary_prompt = prompt = self._canary_prompt or min(sizes, key=sizes.__getitem__)
        self._canary.look(lambda: self._answering.logits(prompt), prompt.id)


def _check_pairs(prompts: Sequence[Prompt], answers: Sequence[Response]) -> None:
    """Refuse answers that are not those of the prompts, one by one."""
    if [prompt.id for prompt in prompts] != [answer.id for answer in answers]:
        raise GenerationError(
            f"{len(answers)} given answers do not match the {len(prompts)} prompts one by one; "
            "give one answer per prompt, in order"
        )

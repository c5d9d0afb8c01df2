"""Group prompts into batches of similar length, and make them smaller where memory ends."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

from omnimerge.errors import GenerationError, one_line
from omnimerge.generate.quiet import quiet
from omnimerge.generate.response import GenerationStats

T = TypeVar("T")

_MOST = 64
CPU_TOKENS = 4096
"""Of all prompts in a batch together."""

_TOKENS_ELSEWHERE = 32768
_SHARE = 0.5  # of the free memory: the rest is for towers, and for what an estimate leaves out
_PIXELS_A_TOKEN = 400  # between those of LLaVA 1.5 (196) and Qwen2-VL (784)

_FULL = ("DefaultCPUAllocator", "not enough memory", "out of memory")


class Size(NamedTuple):
    """How much a prompt is.

    Attributes:
        media: numbers of images, sounds and videos.
        volume: how large they are together: pixels of images, bytes of the rest.
        tokens: tokens of its text.
    """

    media: tuple[int, ...]
    volume: int
    tokens: int


class BatchLimit:
    """The most prompts in a batch, which only ever shrinks: what did not fit is not tried again.

    Args:
        stats: where to count.
    """

    def __init__(self, stats: GenerationStats) -> None:
        self._stats = stats
        self._fits: int | None = None

    def size(self, wanted: int) -> int:
        """Return how many prompts to batch.

        Args:
            wanted: the most that the caller wants.

        Returns:
            A number of 1 or more.
        """
        return wanted if self._fits is None else min(wanted, self._fits)

    def halve(self, tried: int) -> None:
        """Note that a batch did not fit.

        Args:
            tried: how many prompts it had, 2 or more.
        """
        self._fits = tried // 2
        self._stats.batches_halved += 1


def tokens_that_fit(model: Any) -> int:
    """Return how many tokens of prompts a batch may have, from the memory that is free now.

    Args:
        model: the transformers model, where it is going to answer.

    Returns:
        A number for a CPU, and one for accelerators other than CUDA; there, half of the free memory
        over what a token takes: its keys and values in all layers, and its part of the widest
        layer's activations and of the logits.
    """
    device = model.device
    if device.type != "cuda":
        return CPU_TOKENS if device.type == "cpu" else _TOKENS_ELSEWHERE
    try:
        taken = _token_bytes(model)
    except (AttributeError, TypeError, ValueError):  # a config of another kind
        return _TOKENS_ELSEWHERE
    free = torch.cuda.mem_get_info(device)[0]
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(1, int(_SHARE * free / taken))


def _token_bytes(model: Any) -> int:
    text = model.config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // heads
    kept = 2 * text.num_hidden_layers * (getattr(text, "num_key_value_heads", None) or heads) * head
    passing = 8 * text.hidden_size + 3 * (getattr(text, "intermediate_size", None) or 0)
    return int((kept + passing) * model.dtype.itemsize + 4 * text.vocab_size)


def batches(
    sizes: Sequence[Size], batch_size: int | None, tokens: int = CPU_TOKENS
) -> list[list[int]]:
    """Return the positions of the prompts, batch by batch.

    Prompts with different numbers of images, sounds or videos never share a batch, since some
    processors refuse that. Longer ones come first, so that a batch that does not fit fails at once.

    Args:
        sizes: how much each prompt is.
        batch_size: the most prompts in a batch, at least 1, of as many as are likely to fit; None
            for 64.
        tokens: the most tokens of all prompts in a batch together; a single one may have more.

    Returns:
        Lists of positions in `sizes`; each position occurs once.
    """
    order = sorted(range(len(sizes)), key=lambda i: sizes[i], reverse=True)  # stable
    found: list[list[int]] = []
    room = 0
    for position in order:
        if room and sizes[found[-1][0]].media == sizes[position].media:
            found[-1].append(position)
        else:
            found.append([position])
            room = max(1, min(batch_size or _MOST, tokens // _tokens(sizes[position])))
        room -= 1
    return found


def _tokens(size: Size) -> int:
    """About how many tokens a prompt has."""
    return 1 + size.tokens + size.volume // _PIXELS_A_TOKEN


def in_batches(
    groups: Iterable[Sequence[int]],
    limit: BatchLimit,
    work: Callable[[list[int]], T],
    name: Callable[[int], str],
) -> Iterator[tuple[list[int], T]]:
    """Work through batches; one that does not fit into memory is halved, and so are all after it.

    Args:
        groups: positions, batch by batch.
        limit: how many fit; learns from failures.
        work: what to do with the positions of one batch.
        name: position -> what to call it in a message.

    Yields:
        The positions of a batch, and what `work` made of it.

    Raises:
        GenerationError: if a batch of one does not fit.
    """
    todo = deque(list(group) for group in groups)
    while todo:
        batch = todo.popleft()
        size = limit.size(len(batch))
        if len(batch) > size:
            todo.extendleft(batch[i : i + size] for i in reversed(range(0, len(batch), size)))
            continue
        failure = ""
        try:
            with quiet():  # not around the yield: the caller's terminal is his own
                result = work(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failure = one_line(error)
        if not failure:
            yield batch, result
            continue
        _release()  # here and not above: the error holds on to the tensors of the failed batch
        if len(batch) == 1:
            raise GenerationError(
                f"{name(batch[0])} does not fit into memory by itself ({failure}); make its images "
                "smaller, shorten it, lower max_new_tokens, or use a device with more memory"
            )
        limit.halve(len(batch))
        todo.appendleft(batch)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory has run out.

    Args:
        error: any error.

    Returns:
        True for Python's, a CUDA device's, and those of torch's CPU allocator, which are plain
        `RuntimeError`s.
    """
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _FULL)


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

"""Group prompts into batches of similar length, and make them smaller where memory ends."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch

from omnimerge.errors import GenerationError
from omnimerge.generate.processor import one_line
from omnimerge.generate.quiet import quiet
from omnimerge.generate.response import GenerationStats

T = TypeVar("T")

_MOST = 64
_TOKENS = {"cpu": 4096}  # of all prompts in a batch together
_TOKENS_ELSEWHERE = 32768
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


def batches(sizes: Sequence[Size], batch_size: int | None, device: str = "cpu") -> list[list[int]]:
    """Return the positions of the prompts, batch by batch.

    Prompts with different numbers of images, sounds or videos never share a batch, since some
    processors refuse that. Longer ones come first, so that a batch that does not fit fails at once.

    Args:
        sizes: how much each prompt is.
        batch_size: the most prompts in a batch, at least 1; None for as many as are likely to fit.
        device: the kind of device, such as ``cpu``.

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
            room = _guess(sizes[position], device) if batch_size is None else batch_size
        room -= 1
    return found


def _guess(size: Size, device: str) -> int:
    """How many prompts of a size are likely to fit, and enough of them to be fast."""
    tokens = _TOKENS.get(device, _TOKENS_ELSEWHERE)
    return max(1, min(_MOST, tokens // (1 + size.tokens + size.volume // _PIXELS_A_TOKEN)))


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

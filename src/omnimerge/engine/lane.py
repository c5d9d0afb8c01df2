"""The way to a device and back: buffers of fixed size, a stream, copies that nobody waits for.

A lane belongs to one thread. While one of its buffers is on the way, the next is filled; while it
waits, the lanes of other threads read, compute and write. What is CUDA's is in `CudaCopies`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from omnimerge.checkpoint import Checkpoint
from omnimerge.checkpoint.dtypes import torch_dtype

_LOADING = threading.Lock()

BUFFERS = 4
"""Of a lane: two on the way there, two on the way back."""

Wait = Callable[[], object]
"""Returns when a copy is done."""

Fill = Callable[[Tensor, int], None]
"""(Flat tensor on the host, number of its first element) -> None; fills the tensor."""


class Copies:
    """How bytes move between the host and a device: at once, as to any device but CUDA's."""

    def buffer(self, nbytes: int) -> Tensor:
        """Make a buffer on the host.

        Args:
            nbytes: its size.

        Returns:
            Bytes.
        """
        return torch.empty(nbytes, dtype=torch.uint8)

    def stream(self) -> AbstractContextManager[object]:
        """Return a block in which everything that is asked of the device happens in order."""
        return nullcontext()

    def copy(self, into: Tensor, source: Tensor) -> Wait:
        """Begin to copy.

        Args:
            into: bytes; on the host or the device.
            source: as many bytes, on the other one.

        Returns:
            What waits until it is done: only then is a host's `into` there, and may a host's
            `source` be written to.
        """
        into.copy_(source)
        return _at_once


class CudaCopies(Copies):
    """Copies of a CUDA device, between pinned buffers and a stream of its own.

    Args:
        device: the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # Torch loads its CUDA linear algebra at the first call, and fails where two are the first.
        with _LOADING, torch.cuda.device(device):
            torch.linalg.eigh(torch.eye(2, device=device))

    def buffer(self, nbytes: int) -> Tensor:
        """Make a pinned buffer, which the device reads and writes by itself."""
        with torch.cuda.device(self._stream.device):  # else the first GPU would be set up too
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Return a block on the stream."""
        # The device too: else the stream of the first GPU follows at the end, which sets it up.
        with torch.cuda.device(self._stream.device), torch.cuda.stream(self._stream):
            yield

    def copy(self, into: Tensor, source: Tensor) -> Wait:
        """Begin to copy, behind what the stream has to do already."""
        into.copy_(source, non_blocking=True)
        # Blocking: the thread that waits leaves its core to the others.
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        done.record(self._stream)
        return done.synchronize


class Lane:
    """The way of one thread to a device and back.

    Args:
        device: a torch device.
        piece: bytes of each of its `BUFFERS` buffers.
        copies: how bytes move; default: the device's own way.

    Attributes:
        device: the torch device.
    """

    def __init__(self, device: str, piece: int, copies: Copies | None = None) -> None:
        self.device = torch.device(device)
        on_cuda = self.device.type == "cuda"
        self._copies = copies or (CudaCopies(self.device) if on_cuda else Copies())
        self._piece = piece
        self._there: deque[tuple[Tensor, Wait]] = deque(
            (self._copies.buffer(piece), _at_once) for _ in range(BUFFERS // 2)
        )
        self._back = deque(self._copies.buffer(piece) for _ in range(BUFFERS // 2))

    def active(self) -> AbstractContextManager[object]:
        """Return the block that everything on this lane, computing too, has to be in."""
        return self._copies.stream()

    def read(self, checkpoint: Checkpoint, name: str, start: int, stop: int) -> Tensor:
        """Read elements of a tensor onto the device.

        Args:
            checkpoint: where from.
            name: the tensor's name.
            start: first element.
            stop: one past the last.

        Returns:
            A flat tensor on the device, in the dtype it is stored in.

        Raises:
            CheckpointError: if the file cannot be read.
        """
        dtype = torch_dtype(checkpoint.meta(name).dtype)

        def fill(part: Tensor, first: int) -> None:
            checkpoint.read_into(part, name, start + first)

        return self.upload(dtype, stop - start, fill)

    def upload(self, dtype: torch.dtype, count: int, fill: Fill) -> Tensor:
        """Bring a tensor to the device, piece by piece; the last ones may still be on the way.

        Args:
            dtype: of the tensor.
            count: its elements.
            fill: called for one piece after the other.

        Returns:
            The tensor, flat, for those who compute on this lane.
        """
        found = torch.empty(count, dtype=dtype, device=self.device)
        step = max(1, self._piece // dtype.itemsize)
        for start in range(0, count, step):
            part = found[start : start + step]
            buffer, wait = self._there.popleft()
            wait()
            held = buffer[: part.numel() * dtype.itemsize]
            fill(held.view(dtype), start)
            self._there.append((buffer, self._copies.copy(part.view(torch.uint8), held)))
        return found

    def download(self, tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Bring the bytes of a tensor back, piece by piece; the next one comes meanwhile.

        Args:
            tensor: flat, on the device.

        Yields:
            (Number of the first byte, bytes on the host), which are valid until the next.
        """
        data = tensor.view(torch.uint8)
        coming: deque[tuple[int, Tensor, Wait]] = deque()
        for start in range(0, data.numel(), self._piece):
            if len(coming) == len(self._back):
                yield _arrived(*coming.popleft())
            part = data[start : start + self._piece]
            held = self._back[0][: part.numel()]
            self._back.rotate(-1)
            coming.append((start, held, self._copies.copy(held, part)))
        while coming:
            yield _arrived(*coming.popleft())


def _arrived(start: int, held: Tensor, wait: Wait) -> tuple[int, Tensor]:
    wait()
    return start, held


def _at_once() -> None:
    """Nothing to wait for."""

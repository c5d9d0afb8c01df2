"""A base checkpoint seen with the changes of a PEFT LoRA adapter."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from omnimerge.checkpoint.adapter import CONFIG_NAME, Adapter, Change
from omnimerge.checkpoint.dtypes import item_size
from omnimerge.checkpoint.headers import TensorMeta
from omnimerge.checkpoint.reader import Checkpoint
from omnimerge.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

# Elements that are computed at once, whatever is asked for: what they take beside is bounded.
_BLOCK = 1 << 18
# Tensors that threads are at, at a time, as a rule: they go forward through the files.
_RECENT = 2


class AdaptedCheckpoint(Checkpoint):
    """A base checkpoint with an adapter's changes applied as it is read, slice by slice.

    Tensors that the adapter changes are float32; the others are as the base stores them.

    Args:
        base: the checkpoint under the adapter.
        adapter: the adapter.
        names: parameter in the adapter's words -> tensor name of the base.

    Raises:
        CheckpointError: if shapes do not fit.
    """

    def __init__(self, base: Checkpoint, adapter: Adapter, names: Mapping[str, str]) -> None:
        files = (*base.files, *adapter.store.files, adapter.store.folder / CONFIG_NAME)
        reference = f"{base.reference} + {adapter.reference}"
        super().__init__(reference, base.folder, base.config, dict(base.tensors), files)
        self.stamps = {**base.stamps, **adapter.store.stamps}
        self.base = base
        self.adapter = adapter
        self._changes = {names[name]: change for name, change in adapter.changes.items()}
        for name, change in self._changes.items():
            self._check_shape(base.tensors[name], change)
        self.tensors = {
            name: replace(meta, dtype="F32", nbytes=4 * meta.numel)
            if name in self._changes
            else meta
            for name, meta in base.tensors.items()
        }
        self._gains = _Kept(len(self._changes))  # a number per output: small
        self._rights = _Kept(_RECENT)

    @property
    def location(self) -> str:
        """Where the weights lie, for people."""
        return f"{self.base.location} + {self.adapter.store.location}"

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Return what the adapter adds to a tensor, as two factors.

        Args:
            name: a tensor name of this checkpoint.

        Returns:
            (m, r) and (r, n), float32, for a tensor of m rows with n elements each; r is 0 where
            the adapter changes nothing. None where the change is not of low rank.
        """
        import torch

        meta, change = self.meta(name), self._changes.get(name)
        rows = meta.shape[0] if meta.shape else 1
        columns = meta.numel // max(1, rows)
        if change is None:
            return torch.zeros(rows, 0), torch.zeros(0, columns)
        if not change.low_rank or change.a is None or change.b is None:
            return None
        return self._oriented(change)

    def read_into(self, buffer: Tensor, name: str, start: int = 0) -> None:
        """Fill a flat tensor with elements of `name` from `start` on. Safe from several threads.

        Args:
            buffer: contiguous; float32 for tensors that the adapter changes, else of the dtype that
                the base stores.
            name: a tensor name of this checkpoint.
            start: first element.

        Raises:
            CheckpointError: if a file cannot be read.
        """
        change = self._changes.get(name)
        if change is None:
            self.base.read_into(buffer, name, start)
            return
        for begin in range(0, buffer.numel(), _BLOCK):
            part = buffer[begin : begin + _BLOCK]
            self._fill(part, name, change, start + begin)
            if change.magnitude:
                gain = self._gains.get(name, partial(self._gain, name, change))
                part.mul_(_spread(gain, self._columns(name), start + begin, part.numel(), change))

    def memory_of(self, name: str) -> int:
        """Estimate from above what reading any part of a tensor takes beside the buffer.

        Args:
            name: a tensor name of this checkpoint.

        Returns:
            Bytes.
        """
        change = self._changes.get(name)
        if change is None:
            return self.base.memory_of(name)
        meta, columns = self.meta(name), self._columns(name)
        elements = min(meta.numel, _BLOCK) + 2 * columns  # whole rows
        nbytes = 12 * elements
        if change.a:
            rank, rows = self.adapter.store.tensors[change.a].shape[0], elements // columns
            nbytes += 4 * rank * (4 * rows + (4 + _RECENT) * columns)  # the factors' parts
        if change.magnitude:
            nbytes += 24 * (columns if change.transposed else meta.shape[0])
        return nbytes

    def _columns(self, name: str) -> int:
        meta = self.meta(name)
        return meta.numel // max(1, meta.shape[0] if meta.shape else 1)

    def _fill(self, buffer: Tensor, name: str, change: Change, start: int) -> None:
        """Fill a float32 buffer with elements from `start` on, DoRA's gains left out."""
        stop = start + buffer.numel()
        if change.whole:
            buffer.copy_(self.adapter.store.read(change.whole, start, stop))
        else:
            buffer.copy_(self.base.read(name, start, stop))
        if change.shift:
            shift = self.adapter.store.read(change.shift, start, stop)
            buffer.add_(shift.float(), alpha=change.scale)
        if change.a:
            columns = self._columns(name)
            first, last = start // columns, -(-stop // columns)
            right = self._rights.get(name, partial(self._right, change))
            product = (self._left(change, first, last) @ right).flatten()
            buffer.add_(product[start - first * columns :][: stop - start])

    def _oriented(self, change: Change) -> tuple[Tensor, Tensor]:
        """The factors for the tensor as it is stored, the scale in B."""
        of_rows = self.adapter.store.tensors[str(change.a if change.transposed else change.b)]
        rows = of_rows.numel // self.adapter.store.tensors[str(change.a)].shape[0]
        return self._left(change, 0, rows), self._right(change)

    def _left(self, change: Change, first: int, last: int) -> Tensor:
        """Rows of the left factor, of which a slice needs few; (last - first, rank)."""
        import torch

        store, a, b = self.adapter.store, str(change.a), str(change.b)
        rank = store.tensors[a].shape[0]
        if not change.transposed:
            rows = store.read(b, first * rank, last * rank)
            return rows.float().view(-1, rank) * change.scale
        width = store.tensors[a].numel // rank
        parts = [store.read(a, n * width + first, n * width + last) for n in range(rank)]
        return torch.stack(parts).float().T.contiguous()

    def _right(self, change: Change) -> Tensor:
        """The right factor; (rank, columns)."""
        right = self.adapter.store.read_tensor(str(change.b if change.transposed else change.a))
        flat = right.float().flatten(1)
        return (flat * change.scale).T.contiguous() if change.transposed else flat

    def _gain(self, name: str, change: Change) -> Tensor:
        """DoRA: magnitude / norm, per output; (outputs,). In blocks of rows that never vary."""
        import torch

        meta, columns = self.meta(name), self._columns(name)
        rows = max(1, _BLOCK // max(1, columns))
        outputs = columns if change.transposed else meta.shape[0]
        squares = torch.zeros(outputs, dtype=torch.float64)
        for first in range(0, meta.shape[0], rows):
            block = torch.empty(min(rows, meta.shape[0] - first), columns)
            self._fill(block.view(-1), name, change, first * columns)
            if change.transposed:
                squares += block.double().square_().sum(dim=0)
            else:
                squares[first : first + rows] = block.double().square_().sum(dim=1)
        magnitude = self.adapter.store.read_tensor(str(change.magnitude)).float().flatten()
        return magnitude / squares.sqrt_().float()

    def _check_shape(self, meta: TensorMeta, change: Change) -> None:
        tensors = self.adapter.store.tensors
        for part in (change.a, change.b, change.whole, change.shift, change.magnitude):
            if part:
                item_size(tensors[part].dtype)  # refuses what cannot be read
        where = f"{self.adapter.store.folder}: what it holds for {meta.name!r}"
        for part in (change.whole, change.shift):
            if part and tensors[part].shape != meta.shape:
                raise CheckpointError(
                    f"{where} has shape {tensors[part].shape}, the base's {meta.shape}; is it an "
                    "adapter for another model?"
                )
        if change.a and change.b:
            a, b = tensors[change.a].shape, tensors[change.b].shape
            inner, outer = (b[0], math.prod(a[1:])), (math.prod(a[1:]), b[0])
            rows = meta.shape[0] if meta.shape else 1
            found = outer if change.transposed else inner
            if a[0] != b[1] or found != (rows, meta.numel // max(1, rows)):
                raise CheckpointError(
                    f"{where} has factors of {b} and {a}, which do not make the base's "
                    f"{meta.shape}; is it an adapter for another model?"
                )
            if change.magnitude and tensors[change.magnitude].numel != b[0]:
                raise CheckpointError(
                    f"{where} has {tensors[change.magnitude].numel} magnitudes for {b[0]} outputs"
                )


def _spread(gain: Tensor, columns: int, start: int, count: int, change: Change) -> Tensor:
    """DoRA's gains for elements from `start` on, one per row, or per column where transposed."""
    first, last = start // columns, -(-(start + count) // columns)
    rows = last - first
    spread = gain.repeat(rows) if change.transposed else gain[first:last].repeat_interleave(columns)
    return spread[start - first * columns :][:count]


class _Kept:
    """The last few tensors that were computed, each by one thread while the others wait.

    Args:
        count: how many.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._lock = threading.Lock()
        self._found: dict[str, Tensor] = {}

    def get(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """Return what is kept under a name; compute it if there is nothing."""
        found = self._found.get(name)
        if found is None:
            with self._lock:
                found = self._found.get(name)
                if found is None:
                    found = compute()
                    while len(self._found) >= self._count:
                        del self._found[next(iter(self._found))]
                    self._found[name] = found
        return found

"""A base checkpoint seen with the changes of a PEFT LoRA adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from omnimerge.checkpoint.adapter import CONFIG_NAME, Adapter, Change
from omnimerge.checkpoint.dtypes import item_size
from omnimerge.checkpoint.headers import TensorMeta
from omnimerge.checkpoint.reader import Checkpoint
from omnimerge.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor


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
        self._gains: dict[str, Tensor] = {}

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
        stop = start + buffer.numel()
        if change.whole:
            buffer.copy_(self.adapter.store.read(change.whole, start, stop))
        else:
            buffer.copy_(self.base.read(name, start, stop))
        if change.shift:
            shift = self.adapter.store.read(change.shift, start, stop)
            buffer.add_(shift.float(), alpha=change.scale)
        if change.a:
            meta = self.meta(name)
            buffer.add_(_slice_of_product(*self._oriented(change), start, stop))
            if change.magnitude:
                columns = meta.numel // max(1, meta.shape[0])
                buffer.mul_(_spread(self._gain(name, change), columns, start, stop, change))

    def _oriented(self, change: Change) -> tuple[Tensor, Tensor]:
        """The factors for the tensor as it is stored, the scale in the left one."""
        store = self.adapter.store
        a = store.read_tensor(str(change.a)).float().flatten(1)
        b = store.read_tensor(str(change.b)).float().flatten(1) * change.scale
        return (a.T.contiguous(), b.T.contiguous()) if change.transposed else (b, a)

    def _gain(self, name: str, change: Change) -> Tensor:
        """DoRA: magnitude / norm, per output; (outputs,)."""
        found = self._gains.get(name)
        if found is None:
            left, right = self._oriented(change)
            base = self.adapter.store.read_tensor(change.whole) if change.whole else None
            stored = self.base.read_tensor(name) if base is None else base
            merged = stored.float().flatten(1) + left @ right
            norms = merged.norm(dim=0 if change.transposed else 1)
            magnitude = self.adapter.store.read_tensor(str(change.magnitude)).float().flatten()
            found = self._gains[name] = magnitude / norms
        return found

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


def _slice_of_product(left: Tensor, right: Tensor, start: int, stop: int) -> Tensor:
    """Elements start:stop of left · right, flattened, from the rows that hold them."""
    columns = right.shape[1]
    first, last = start // columns, -(-stop // columns)
    return (left[first:last] @ right).flatten()[start - first * columns : stop - first * columns]


def _spread(gain: Tensor, columns: int, start: int, stop: int, change: Change) -> Tensor:
    """DoRA's gains for elements start:stop, one per row, or per column where transposed."""
    import torch

    position = torch.arange(start, stop)
    return gain[position % columns if change.transposed else position // columns]

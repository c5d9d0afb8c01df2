"""A checkpoint seen through another one's names: its tensors cut, joined and reordered by rows."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from omnimerge.checkpoint.dtypes import item_size
from omnimerge.checkpoint.headers import TensorMeta
from omnimerge.checkpoint.reader import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of elements of a mapped tensor, and where it is read from.

    Attributes:
        start: first element in the mapped tensor.
        count: number of elements.
        name: tensor of the donor; None for the target's tensor of the mapped name, same elements.
        offset: first element in that tensor.
    """

    start: int
    count: int
    name: str | None
    offset: int


class MappedCheckpoint(Checkpoint):
    """A donor's tensors under the target's names and in the target's shapes, read piece by piece.

    Nothing is computed: every element is one of the donor's, or, where the donor has none for it,
    the target's own. A tensor whose pieces are stored in one dtype keeps it, else it is float32.

    Args:
        donor: the checkpoint that is mapped.
        target: the checkpoint that it is mapped onto.
        pieces: target tensor -> segments that cover it without gaps, in order.
    """

    def __init__(
        self, donor: Checkpoint, target: Checkpoint, pieces: Mapping[str, Sequence[Segment]]
    ) -> None:
        super().__init__(donor.reference, donor.folder, donor.config, {}, donor.files)
        self.donor = donor
        self.target = target
        self._pieces = {name: tuple(segments) for name, segments in pieces.items()}
        self._starts = {name: [s.start for s in segments] for name, segments in pieces.items()}
        self.tensors = {name: self._meta(name) for name in pieces}

    @property
    def location(self) -> str:
        """Where the weights lie, for people."""
        return self.donor.location

    def read_into(self, buffer: Tensor, name: str, start: int = 0) -> None:
        """Fill a flat tensor with elements of `name` from `start` on. Safe from several threads.

        Args:
            buffer: contiguous, of the dtype that `tensors` names.
            name: a tensor name of the target.
            start: first element.

        Raises:
            CheckpointError: if a file cannot be read.
        """
        meta, stop = self.meta(name), start + buffer.numel()
        segments = self._pieces[name]
        number = bisect_right(self._starts[name], start) - 1
        while start < stop:
            segment = segments[number]
            count = min(stop, segment.start + segment.count) - start
            part = buffer[buffer.numel() - (stop - start) :][:count]
            self._read_piece(part, meta, segment, start)
            start, number = start + count, number + 1

    def memory_of(self, name: str) -> int:
        """Estimate from above what reading any part of a tensor takes beside the buffer.

        Args:
            name: a tensor name of the target.

        Returns:
            Bytes.
        """
        sources = {self._source(name, each) for each in self._pieces[name]}
        return max((checkpoint.memory_of(source) for checkpoint, source in sources), default=0)

    def _read_piece(self, part: Tensor, meta: TensorMeta, segment: Segment, start: int) -> None:
        checkpoint, name = self._source(meta.name, segment)
        offset = segment.offset + start - segment.start
        if checkpoint.tensors[name].dtype == meta.dtype:
            checkpoint.read_into(part, name, offset)
        else:
            part.copy_(checkpoint.read(name, offset, offset + part.numel()))

    def _source(self, name: str, segment: Segment) -> tuple[Checkpoint, str]:
        return (self.target, name) if segment.name is None else (self.donor, segment.name)

    def _meta(self, name: str) -> TensorMeta:
        sources = dict.fromkeys(self._source(name, each) for each in self._pieces[name])
        stored = [checkpoint.tensors[source] for checkpoint, source in sources]
        dtypes = {meta.dtype for meta in stored}
        dtype = dtypes.pop() if len(dtypes) == 1 else "F32"
        shape, numel = self.target.tensors[name].shape, self.target.tensors[name].numel
        return TensorMeta(name, dtype, shape, stored[0].file, -1, numel * item_size(dtype))

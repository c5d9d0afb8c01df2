"""What a weight file holds, from its header alone. No tensor data is read here."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omnimerge.checkpoint.dtypes import is_known, item_size
from omnimerge.errors import CheckpointError

# The format's own limit (safetensors, `MAX_HEADER_SIZE`).
MAX_HEADER_BYTES = 100_000_000
# Torch's limits.
_MAX_DIMENSIONS, _MAX_SIZE = 64, 2**63


@dataclass(frozen=True, slots=True)
class TensorMeta:
    """Where one tensor lies on disk and how it is stored.

    Attributes:
        name: the tensor's name in its checkpoint.
        dtype: safetensors dtype name, for example ``"BF16"``.
        shape: sizes of the dimensions; ``()`` for a scalar.
        file: the weight file.
        offset: absolute position of the first byte in the file.
        nbytes: bytes that the tensor takes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def read_safetensors_header(file: Path, size: int | None = None) -> list[TensorMeta]:
    """List the tensors of a safetensors file, in file order.

    Args:
        file: path of the file.
        size: bytes of the whole file, where `file` holds its header alone.

    Returns:
        One entry per tensor, sorted by offset.

    Raises:
        CheckpointError: if the file is missing, truncated, or its header is not valid.
    """
    try:
        size = file.stat().st_size if size is None else size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{file} is truncated or no safetensors file: it has {size:,} bytes and claims "
                    f"a header of {length:,}; download or copy it again"
                )
            raw = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    return _parse(raw, file, data_start=8 + length, size=size)


def _parse(raw: bytes, file: Path, *, data_start: int, size: int) -> list[TensorMeta]:
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} has a corrupt safetensors header: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file} has a corrupt safetensors header: not a JSON object")
    header.pop("__metadata__", None)
    metas = sorted(
        (_tensor(name, entry, file, data_start) for name, entry in header.items()),
        key=lambda meta: (meta.offset, meta.nbytes),
    )
    _check_extents(metas, file, data_start, size)
    return metas


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen = dict(pairs)
    if len(seen) != len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {twice!r} appears twice")
    return seen


def _tensor(name: str, entry: Any, file: Path, data_start: int) -> TensorMeta:
    if not isinstance(entry, Mapping) or {"dtype", "shape", "data_offsets"} - set(entry):
        raise CheckpointError(f"{file} has a corrupt safetensors header at tensor {name!r}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    whole = isinstance(dtype, str) and isinstance(shape, list)
    whole = whole and isinstance(offsets, list) and len(offsets) == 2
    whole = whole and len(shape) <= _MAX_DIMENSIONS
    if not whole or not all(type(n) is int and 0 <= n < _MAX_SIZE for n in [*shape, *offsets]):
        raise CheckpointError(f"{file} has a corrupt safetensors header at tensor {name!r}")
    begin, end = offsets
    # Unknown types stay listed (`inspect` shows them); they fail when something reads them.
    if is_known(dtype) and math.prod(shape) * item_size(dtype) != end - begin:
        raise CheckpointError(
            f"{file} has a corrupt safetensors header at tensor {name!r}: {dtype} {tuple(shape)} "
            f"does not take {end - begin} bytes"
        )
    return TensorMeta(name, dtype, tuple(shape), file, data_start + begin, end - begin)


def _check_extents(metas: list[TensorMeta], file: Path, data_start: int, size: int) -> None:
    position = data_start
    for meta in metas:
        if meta.offset != position:
            raise CheckpointError(
                f"{file} has a corrupt safetensors header: tensor {meta.name!r} starts at byte "
                f"{meta.offset}, where {position} was expected (overlap or gap)"
            )
        position += meta.nbytes
    if position > size:
        raise CheckpointError(
            f"{file} is truncated: it has {size:,} bytes and its header promises {position:,}; "
            "download or copy it again"
        )

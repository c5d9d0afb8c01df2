"""Legacy ``.bin`` weight files: the sole place where `torch.load` appears, weights only."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch

from omnimerge.checkpoint.dtypes import dtype_name
from omnimerge.checkpoint.headers import TensorMeta
from omnimerge.errors import CheckpointError


def read_pickle_header(file: Path) -> list[TensorMeta]:
    """List the tensors of a ``torch.save`` file with their byte positions, in file order.

    The file is memory-mapped and only its pickle is interpreted (`weights_only=True`, so no code
    runs). The position of each tensor is the position of its storage's record in the zip archive;
    later reads go there directly, as for safetensors.

    Args:
        file: path of the file.

    Returns:
        One entry per tensor, sorted by offset. Tensors that share storage share positions.

    Raises:
        CheckpointError: if the file is missing, truncated, in the pre-1.6 format, holds anything
            but tensors, is big-endian, or holds a tensor that is not contiguous.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)  # noqa: TID251
        records = _record_offsets(file)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    except Exception as error:  # torch raises many types here, UnpicklingError among them
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise CheckpointError(
            f"{file} cannot be read as torch weights ({first_line}); it may be truncated, hold "
            "code instead of weights, or be older than torch 1.6: load and save it again"
        ) from error
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{file} does not hold a mapping of names to tensors")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"{file}: entry {name!r} is no named tensor")
        if not tensor.is_contiguous() or tensor.is_neg() or tensor.is_conj():
            raise CheckpointError(f"{file}: {name!r} is a view; load and save the file again")
    return _locate(dict(state), records, file)


def _record_offsets(file: Path) -> list[int]:
    """Byte positions of the storage records that are not empty, in file order."""
    offsets = []
    with zipfile.ZipFile(file) as archive, file.open("rb") as stream:
        for info in archive.infolist():
            if info.filename.endswith("/byteorder") and archive.read(info) != b"little":
                raise ValueError("its bytes are in big-endian order")
            if "/data/" in info.filename and info.file_size:
                # The local header's extra field (alignment padding) differs from the central one.
                stream.seek(info.header_offset + 26)
                lengths = stream.read(4)
                name_length = int.from_bytes(lengths[:2], "little")
                extra_length = int.from_bytes(lengths[2:], "little")
                offsets.append(info.header_offset + 30 + name_length + extra_length)
    return sorted(offsets)


def _locate(state: dict[str, torch.Tensor], records: list[int], file: Path) -> list[TensorMeta]:
    storages = sorted({t.untyped_storage().data_ptr() for t in state.values() if t.numel()})
    # Mapped storages are slices of one mapping, so distances in memory are distances in the file.
    # Records of storages that no tensor uses (rare) would break the pairing, which this detects.
    if len(storages) != len(records) or any(
        pointer - storages[0] != record - records[0]
        for pointer, record in zip(storages, records, strict=True)
    ):
        raise CheckpointError(f"{file} has an unusual torch layout; load and save it again")
    at = dict(zip(storages, records, strict=True))
    metas = []
    for name, tensor in state.items():
        start = at.get(tensor.untyped_storage().data_ptr(), 0)
        offset = start + int(tensor.storage_offset()) * tensor.element_size()
        nbytes = tensor.numel() * tensor.element_size()
        dtype = dtype_name(tensor.dtype)
        metas.append(TensorMeta(name, dtype, tuple(tensor.shape), file, offset, nbytes))
    return sorted(metas, key=lambda meta: meta.offset)

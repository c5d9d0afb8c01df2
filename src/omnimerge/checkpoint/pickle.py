"""Legacy ``.bin`` weight files: the sole place where `torch.load` appears, weights only."""

from __future__ import annotations

import pickletools
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
        records = _record_offsets(file)
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)  # noqa: TID251
        _check_state(state, file)
        return _locate(dict(state), records, file)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    except CheckpointError:
        raise
    except Exception as error:  # torch raises many types here, UnpicklingError among them
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise CheckpointError(
            f"{file} cannot be read as torch weights ({first_line}); it may be truncated, hold "
            "code instead of weights, or be older than torch 1.6: load and save it again"
        ) from error


def _check_state(state: Any, file: Path) -> None:
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{file} does not hold a mapping of names to tensors")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            shown = repr(name) if isinstance(name, str) else f"of type {type(name).__name__}"
            raise CheckpointError(f"{file}: entry {shown} is no named tensor")
        if tensor.layout is not torch.strided or tensor.device.type != "cpu":
            raise CheckpointError(f"{file}: {name!r} is sparse, or has no data")
        if not tensor.is_contiguous() or tensor.is_neg() or tensor.is_conj():
            raise CheckpointError(f"{file}: {name!r} is a view; load and save the file again")


# What torch.save calls to rebuild plain tensors; torch itself lets more pass, such as bytearray,
# which allocates whatever size a file claims.
_CALLS = re.compile(
    r"collections OrderedDict|torch\.(_utils _rebuild_(tensor(_v[23])?|parameter)"
    r"|_tensor _rebuild_from_type_v2|nn\.parameter Parameter|storage (Unt|T)ypedStorage)"
    r"|torch (\w+Storage|Tensor|Size|b?float\w+|u?int\d+|bool|complex\d+)"
)
_DEEPEST = 100


def _check_pickle(raw: bytes) -> None:
    """Refuse a pickle that calls anything but what rebuilds tensors, or nests deeply.

    A key of some 100,000 nested tuples ends the process when it is hashed.
    """
    depths: list[int | None] = []  # per value on the stack; None for a mark
    memo: dict[Any, int] = {}
    for code, argument, _ in pickletools.genops(raw):
        if code.name == "GLOBAL" and not _CALLS.fullmatch(str(argument)):
            raise ValueError(f"it calls {str(argument).replace(' ', '.')}")
        if code.name.endswith("PUT"):
            memo[argument] = depths[-1] or 0
        elif code.name.endswith("GET"):
            depths.append(memo.get(argument, 0))
        else:
            _step(code, depths)


def _step(code: pickletools.OpcodeInfo, depths: list[int | None]) -> None:
    """Do to the depths what an instruction does to the stack."""
    if code.name == "MARK":
        depths.append(None)
        return
    taken, wanted = [0], code.stack_before
    if pickletools.markobject in wanted:
        wanted = wanted[: wanted.index(pickletools.markobject)]
        while (depth := depths.pop()) is not None:
            taken.append(depth)
    taken += [depths.pop() or 0 for _ in wanted]
    deeper = max(taken) + (code.name.startswith("TUPLE") or code.name == "REDUCE")
    if deeper > _DEEPEST:
        raise ValueError("it nests too deeply")
    depths.extend([deeper] * len(code.stack_after))


def _record_offsets(file: Path) -> list[int]:
    """Byte positions of the storage records that are not empty, in file order."""
    offsets = []
    with zipfile.ZipFile(file) as archive, file.open("rb") as stream:
        if archive.comment:
            raise ValueError("it has a comment")
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise ValueError("it is compressed")
            if info.filename.endswith("data.pkl"):
                _check_pickle(archive.read(info))
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
    size = file.stat().st_size
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
        if tensor.storage_offset() < 0 or offset + nbytes > size:
            raise CheckpointError(f"{file} is truncated or corrupt at tensor {name!r}")
        dtype = dtype_name(tensor.dtype)
        metas.append(TensorMeta(name, dtype, tuple(tensor.shape), file, offset, nbytes))
    return sorted(metas, key=lambda meta: meta.offset)

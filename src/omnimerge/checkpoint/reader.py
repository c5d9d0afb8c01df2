"""A checkpoint on disk: its config, its tensors by name, and reads of any part of a tensor."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omnimerge.checkpoint.dtypes import item_size, torch_dtype
from omnimerge.checkpoint.headers import TensorMeta, read_safetensors_header
from omnimerge.checkpoint.links import check_inside
from omnimerge.checkpoint.locate import locate
from omnimerge.checkpoint.openfile import OpenFile
from omnimerge.checkpoint.other_files import other_files
from omnimerge.checkpoint.remote import Remote
from omnimerge.checkpoint.small_file import read_json
from omnimerge.errors import CheckpointError, suggestion

if TYPE_CHECKING:
    from torch import Tensor

# In the order in which transformers looks for them.
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


class Checkpoint:
    """A checkpoint folder, opened: headers are read, tensor data is not. See `Checkpoint.open`.

    The arguments are attributes too.

    Args:
        reference: what the user wrote (path, Hub id or URL).
        folder: the local folder; for a URL, one with headers in place of the weights.
        config: ``config.json``.
        tensors: where every tensor lies, by name, in file order.
        files: the weight files, in order.

    Attributes:
        stamps: bytes and time of the last change of weight files, from before they were read.
    """

    def __init__(
        self,
        reference: str,
        folder: Path,
        config: dict[str, Any],
        tensors: dict[str, TensorMeta],
        files: tuple[Path, ...],
    ) -> None:
        self.reference = reference
        self.folder = folder
        self.config = config
        self.tensors: Mapping[str, TensorMeta] = tensors
        self.files = files
        self.stamps: Mapping[Path, tuple[int, int]] = {}
        self._opened: dict[Path, OpenFile] = {}
        self._remote = Remote.of(folder)

    @classmethod
    def open(cls, reference: str | Path) -> Checkpoint:
        """Open a checkpoint: config, index and headers.

        Args:
            reference: folder, Hub id with an optional ``@revision``, or URL.

        Returns:
            The opened checkpoint.

        Raises:
            CheckpointError: if anything is missing, truncated or inconsistent.
        """
        folder = locate(reference)
        try:
            config_file = folder / "config.json"
            if not config_file.is_file():
                raise CheckpointError(_without_config(folder))
            config = read_json(config_file)
            files, promised = _weight_files(folder)
            check_inside(folder, *files)
            stamps = _stamps(folder, files)
            tensors = _collect(files)
        except OSError as error:
            raise CheckpointError(f"cannot read {folder}: {error.strerror}") from error
        for name, file in promised.items():
            if name not in tensors or tensors[name].file.name != file:
                raise CheckpointError(
                    f"the index of {folder} places tensor {name!r} in {file}, which does not hold "
                    "it; download or copy the checkpoint again"
                )
        opened = cls(str(reference), folder, config, tensors, files)
        opened.stamps = stamps
        return opened

    @property
    def location(self) -> str:
        """Where the weights lie, for people: a folder or a URL."""
        return self._remote.url if self._remote else str(self.folder)

    def meta(self, name: str) -> TensorMeta:
        """Return where the tensor `name` lies.

        Args:
            name: a tensor name of this checkpoint.

        Returns:
            Its entry.

        Raises:
            CheckpointError: if there is no such tensor.
        """
        try:
            return self.tensors[name]
        except KeyError:
            hint = suggestion(name, self.tensors)
            raise CheckpointError(f"{self.folder} has no tensor {name!r}{hint}") from None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Read elements ``start:stop`` of a tensor, flattened. Safe to call from several threads.

        Args:
            name: a tensor name of this checkpoint.
            start: first element, in ``[0, numel]``.
            stop: one past the last element; default: the end.

        Returns:
            A one-dimensional tensor in the dtype it is stored in.

        Raises:
            CheckpointError: if the file cannot be read.
        """
        import torch

        meta = self.meta(name)
        count = (meta.numel if stop is None else stop) - start
        buffer = torch.empty(count, dtype=torch_dtype(meta.dtype))
        self.read_into(buffer, name, start)
        return buffer

    def read_into(self, buffer: Tensor, name: str, start: int = 0) -> None:
        """Fill a flat tensor with elements of `name` from `start` on. Safe from several threads.

        Args:
            buffer: contiguous, of the dtype that the tensor is stored in; its length decides how
                many elements are read.
            name: a tensor name of this checkpoint.
            start: first element.

        Raises:
            CheckpointError: if the file cannot be read.
        """
        import torch

        meta = self.meta(name)
        if buffer.numel():
            view = buffer.view(torch.uint8).numpy().data
            self._read_into(view, meta, meta.offset + start * item_size(meta.dtype))

    def read_tensor(self, name: str) -> Tensor:
        """Read a whole tensor in its shape and stored dtype.

        Args:
            name: a tensor name of this checkpoint.

        Returns:
            The tensor.
        """
        return self.read(name).reshape(self.meta(name).shape)

    def memory_of(self, name: str) -> int:  # noqa: ARG002 (there are others)
        """Estimate from above what reading any part of a tensor takes beside the buffer.

        Args:
            name: a tensor name of this checkpoint.

        Returns:
            Bytes.
        """
        return 0

    def other_files(self) -> list[Path]:
        """List the files that belong to the model and are not weights.

        Left out are hidden files, other forms of the weights, what training leaves behind, and
        folders that hold a merge.

        Returns:
            Paths relative to `folder`, sorted.

        Raises:
            CheckpointError: if a subfolder cannot be read or is a link, or a file is a link that
                leaves the folder, or no regular file, such as a pipe.
        """
        return other_files(self.folder, {file.name for file in self.files})

    def total_bytes(self) -> int:
        """Return the bytes of all tensors together."""
        return sum(meta.nbytes for meta in self.tensors.values())

    def close(self) -> None:
        """Close the files. Reading afterwards opens them again."""
        if self._remote:
            self._remote.close()
        while self._opened:
            self._opened.popitem()[1].close()

    def __del__(self) -> None:
        self.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _read_into(self, view: memoryview, meta: TensorMeta, offset: int) -> None:
        if self._remote and meta.file.name in self._remote.stamps:
            self._remote.read_into(view, meta.file.name, offset)
            return
        try:
            file = self._opened.get(meta.file) or self._opened.setdefault(
                meta.file, OpenFile(meta.file)
            )
            with file.used() as descriptor:
                while view.nbytes:
                    count = os.preadv(descriptor, [view], offset)
                    if count == 0:
                        raise CheckpointError(
                            f"{meta.file} ended while tensor {meta.name!r} was read; it changed or "
                            "is truncated"
                        )
                    view, offset = view[count:], offset + count
        except OSError as error:
            raise CheckpointError(
                f"cannot read tensor {meta.name!r} of {meta.file}: {error.strerror}"
            ) from error


def place_of(file: Path) -> str:
    """Return where a weight file lies.

    Args:
        file: as in `Checkpoint.files`.

    Returns:
        Its path, or its URL.
    """
    remote = Remote.of(file.parent)
    return f"{remote.url}/{file.name}" if remote and file.name in remote.stamps else str(file)


def stamp(file: Path) -> tuple[int, int]:
    """Return what tells whether a file has changed.

    Args:
        file: the file.

    Returns:
        Its bytes, and the time of its last change in nanoseconds.

    Raises:
        OSError: if it cannot be looked at.
        CheckpointError: if it lies at a URL, and cannot be looked at.
    """
    remote = Remote.of(file.parent)
    if remote and file.name in remote.stamps:
        return remote.look(file.name)
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def _stamps(folder: Path, files: Sequence[Path]) -> dict[Path, tuple[int, int]]:
    """What files were before their headers were read, which at a URL happened earlier."""
    remote = Remote.of(folder)
    known = remote.stamps if remote else {}
    return {file: known.get(file.name) or stamp(file) for file in files}


def _without_config(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return f"{folder} is a PEFT adapter; give it as `adapter: {folder}`"
    return f"{folder} has no config.json; is it a checkpoint's folder?"


def _weight_files(folder: Path) -> tuple[tuple[Path, ...], dict[str, str]]:
    """Return the weight files and, where there is an index, what it promises."""
    for name in _WEIGHTS:
        file = folder / name
        if file.is_file():
            return _indexed_files(folder, file) if file.suffix == ".json" else ((file,), {})
    others = sorted(file for file in folder.glob("*.safetensors") if file.is_file())
    if len(others) == 1:
        return (others[0],), {}
    if others:
        raise CheckpointError(
            f"{folder} holds {len(others)} safetensors files and no {_WEIGHTS[1]}; "
            "download or copy the index too"
        )
    if pickles := len(list(folder.glob("pytorch_model*.bin"))):
        raise CheckpointError(
            f"{folder} holds {pickles} pytorch_model*.bin files and no {_WEIGHTS[3]}; "
            "download or copy the index too"
        )
    raise CheckpointError(
        f"{folder} holds no weights: neither *.safetensors nor pytorch_model*.bin"
    )


def _indexed_files(folder: Path, index: Path) -> tuple[tuple[Path, ...], dict[str, str]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    wrong = [name for name in weight_map.values() if not isinstance(name, str)]
    names = list(dict.fromkeys(weight_map.values())) if not wrong else []
    wrong += [name for name in names if Path(name).name != name]
    if wrong:
        raise CheckpointError(f"{index} points outside its folder: {wrong[0]!r}")
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(f"{index} names {name}, which is missing; download it too")
    return tuple(folder / name for name in names), weight_map


def _collect(files: tuple[Path, ...]) -> dict[str, TensorMeta]:
    tensors: dict[str, TensorMeta] = {}
    for file in files:
        for meta in read_header(file):
            if meta.name in tensors:
                raise CheckpointError(
                    f"tensor {meta.name!r} is both in {tensors[meta.name].file} and in {file}"
                )
            tensors[meta.name] = meta
    return tensors


def read_header(file: Path) -> list[TensorMeta]:
    """List the tensors of a weight file, safetensors or pickle.

    Args:
        file: path of the file.

    Returns:
        One entry per tensor, in file order.

    Raises:
        CheckpointError: if the file is missing, truncated or corrupt.
    """
    if file.suffix == ".safetensors":
        remote = Remote.of(file.parent)
        known = remote.stamps.get(file.name) if remote else None
        return read_safetensors_header(file, known[0] if known else None)
    from omnimerge.checkpoint.pickle import read_pickle_header

    return read_pickle_header(file)

"""What the folder of a merge is by its manifest alone; no input is opened."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omnimerge.checkpoint import Adapter, Checkpoint, TensorMeta
from omnimerge.checkpoint.dtypes import is_floating, is_known, item_size
from omnimerge.checkpoint.links import check_inside
from omnimerge.engine.manifest import file_hash, output_files, stored
from omnimerge.errors import CheckpointError

_BLOCK = 1 << 22
# (First, one past the last) element of runs.
Runs = Sequence[tuple[int, int]]


class CannotLookError(Exception):
    """A check needs what is not there."""


class WrittenFolder:
    """A folder beside its manifest; each check yields what is wrong.

    Args:
        out: the folder.
        described: its manifest.
    """

    def __init__(self, out: Path, described: Mapping[str, Any]) -> None:
        self.out = out
        self.described = described
        self._opened: Checkpoint | None = None
        self._reason = ""
        try:
            if "adapter" in described:
                self._opened = Adapter.open(out).store
            else:
                self._opened = Checkpoint.open(out)
        except CheckpointError as error:
            self._reason = str(error)

    @property
    def weights(self) -> Checkpoint:
        """The opened weights; `CannotLookError` where `headers` says that they cannot be."""
        if self._opened is None:
            raise CannotLookError("the weights cannot be opened")
        return self._opened

    @property
    def says_shapes(self) -> bool:
        """Whether the manifest is of a version that wrote how each tensor is stored."""
        return any("stored" in entry for entry in self.described.get("tensors", {}).values())

    def close(self) -> None:
        """Close the weight files."""
        if self._opened is not None:
            self._opened.close()

    def checksums(self) -> Iterator[str]:
        """Hold every file of the folder against the manifest's `files`, in both directions."""
        listed = self.described.get("files")
        if listed is None and "key" not in self.described:
            raise CannotLookError(
                "the manifest has none, it is of an older version; merge again to have them"
            )
        if not listed:
            yield "the manifest has lost the checksums of the files"
        listed = listed or {}
        read = [file.name for file in self._opened.files] if self._opened else []
        for name in dict.fromkeys([*output_files(self.out), *read]):
            if name not in listed:
                yield f"{name} was added: the manifest does not name it"
        for name, expected in listed.items():
            yield from self._differs(name, expected)

    def headers(self) -> Iterator[str]:
        """Hold the tensors against those of the manifest."""
        if self._opened is None:
            yield self._reason
            return
        known, written = self.described.get("tensors", {}), self._opened.tensors
        if "adapter" in self.described and not self.says_shapes:
            raise CannotLookError(
                "the manifest does not name them, it is of an older version; merge again to have it"
            )
        for name in known.keys() - written.keys():
            yield f"tensor {name!r} is missing"
        for name, meta in written.items():
            expected = known.get(name, {}).get("stored")
            if name not in known:
                yield f"tensor {name!r} should not be there"
            elif self.says_shapes and stored(meta) != expected:
                yield f"tensor {name!r} is {stored(meta)} instead of {expected}"

    def finite(self, copied: Callable[[str], Runs]) -> Iterator[str]:
        """Look for NaN and infinity, as the merge does.

        It copies infinity, which masks are made of, and with ``--force finite`` NaN as well.

        Args:
            copied: the elements of a merged tensor that were copied; asked for where it matters.

        Yields:
            What is wrong.

        Raises:
            CannotLookError: where it cannot be told whether an element was copied.
        """
        known, forced = self.described.get("tensors", {}), self.described.get("forced", ())
        unknown: CannotLookError | None = None
        for name, meta in self.weights.tensors.items():
            if not is_known(meta.dtype) or not is_floating(meta.dtype):
                continue
            whole = not {"kept", "part"}.isdisjoint(known.get(name, ()))
            if whole and "finite" in forced:
                continue
            try:
                found = any(self._not_finite(meta, None if whole else copied))
            except CannotLookError as reason:
                unknown = unknown or CannotLookError(
                    f"tensor {name!r} holds NaN or infinity, where it may be the target's: {reason}"
                )
                continue
            if found:
                yield f"tensor {name!r} holds NaN{'' if whole else ' or infinity'}"
        if unknown:
            raise unknown

    def _not_finite(self, meta: TensorMeta, copied: Callable[[str], Runs] | None) -> Iterator[bool]:
        """Whether each block of a tensor holds NaN; or infinity, where it was merged."""
        step = max(1, _BLOCK // item_size(meta.dtype))
        for start in range(0, meta.numel, step):
            stop = min(start + step, meta.numel)
            block = self.weights.read(meta.name, start, stop).float()
            wrong = ~block.isfinite()
            if wrong.any():
                for first, last in copied(meta.name) if copied else [(start, stop)]:
                    part = slice(max(first - start, 0), max(last - start, 0))
                    wrong[part] = block[part].isnan()
            yield bool(wrong.any())

    def _differs(self, name: str, expected: Any) -> Iterator[str]:
        file = self.out / name
        try:
            if not file.is_file():
                yield f"{name} is missing"
                return
            check_inside(self.out, file)
            if file_hash(file) != expected:
                yield f"{name} is not what was written"
        except CheckpointError as error:
            yield str(error)
        except OSError as error:
            yield f"{name[:200]} cannot be read: {error.strerror}"

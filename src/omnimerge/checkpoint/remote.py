"""Checkpoints at a URL: small files are copied, weights are read where they lie, by ranges.

A URL becomes a folder of the cache that holds the checkpoint's small files and, in place of each
weight file, its header alone: whatever takes such a stub for the whole file fails.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any
from urllib.parse import urlsplit

from omnimerge.checkpoint.headers import MAX_HEADER_BYTES
from omnimerge.checkpoint.hub import NEVER, SMALL_FILES
from omnimerge.errors import CheckpointError, one_line

MARK = ".omnimerge-url.json"
ADAPTER_NAME = "adapter_model.safetensors"
_MAX_SMALL_BYTES = 500_000_000
_BLOCK_BYTES = 8 << 20
_BLOCKS = 8
# Files that are asked about at once.
_QUESTIONS = 8
# What storages tell of a file that changes when it is written again.
_IDENTITY = (
    *("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created"),
    *("VersionId", "generation", "md5Hash", "content_md5", "checksum"),
)


def is_url(text: str) -> bool:
    """Return whether a text is a URL.

    Args:
        text: what a user wrote.

    Returns:
        Whether it has a protocol.
    """
    return "://" in text


def mirror(url: str) -> Path:
    """Copy what is small of a checkpoint at a URL, and the headers of its weights.

    Args:
        url: of the folder, with any protocol of fsspec: ``s3://bucket/model``. Credentials are the
            storage's own (environment, configuration files).

    Returns:
        A folder of the cache; the same one as long as nothing changes at the URL.

    Raises:
        CheckpointError: if the storage does not give it, or it holds weights in another format
            than safetensors.
    """
    parts = urlsplit(url)
    if parts.username or parts.password or parts.query:
        raise CheckpointError(
            "a URL with a user, a password or a query would be written into manifests; give the "
            "credentials as the storage's own settings or environment variables"
        )
    url = url.rstrip("/")
    with _told(url):
        fs, root = _storage(url)
        listed = dict(_listing(fs, root))
    copied, weights = _chosen(url, listed)
    stamps = _stamps(fs, root, url, weights)
    seen = json.dumps([url, stamps, [[name, *listed[name]] for name in (*copied, *weights)]])
    home = _cache() / hashlib.sha256(seen.encode()).hexdigest()[:20]
    folder = home / (PurePosixPath(root).name or "root")
    if not (folder / MARK).is_file():
        try:
            home.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=home) as made:
                fresh = Path(made) / "files"
                fresh.mkdir()
                _fill(fresh, fs, root, url, copied, stamps)
                if not (folder / MARK).is_file():  # another process can be first
                    fresh.rename(folder)
        except OSError as error:
            if not (folder / MARK).is_file():
                raise CheckpointError(
                    f"cannot keep the small files of {url} in {home}: {error.strerror}; set "
                    "OMNIMERGE_CACHE to a folder that can be written"
                ) from error
    return folder


def _chosen(
    url: str, listed: dict[str, tuple[int, str]]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Which files are copied, and which are read where they lie; an adapter is copied whole."""
    weights = [name for name in listed if _is_weight(name)]
    small = [
        name
        for name, (size, _) in listed.items()
        if _is_small(name) and size <= _MAX_SMALL_BYTES and name not in weights
    ]
    if "adapter_config.json" in listed and "config.json" not in listed:
        return (*small, *(name for name in weights if name == ADAPTER_NAME)), ()
    if "config.json" not in listed:
        raise CheckpointError(f"{url} holds no config.json, or cannot be listed; check the address")
    if not weights:
        raise CheckpointError(
            f"{url} holds no *.safetensors; other formats cannot be read from a URL: download it, "
            "and give the folder"
        )
    return tuple(small), tuple(weights)


def _stamps(fs: Any, root: str, url: str, weights: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """What every weight file is now, asked for as it will be asked for again."""

    def look(name: str) -> tuple[int, int]:
        with _told(f"{url}/{name}"):
            return _look(fs, f"{root}/{name}")

    with ThreadPoolExecutor(_QUESTIONS, "omnimerge-look") as pool:
        return dict(zip(weights, pool.map(look, weights), strict=True))


def _fill(
    folder: Path,
    fs: Any,
    root: str,
    url: str,
    copied: tuple[str, ...],
    stamps: Mapping[str, tuple[int, int]],
) -> None:
    """Copy files and the headers of weights; the mark tells what the weights were before that."""
    for name in copied:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with _told(f"{url}/{name}"):
            content = fs.cat_file(f"{root}/{name}")
        (folder / name).write_bytes(content)
    for name, (size, _) in stamps.items():
        with _told(f"{url}/{name}"):
            header = _header(fs, f"{root}/{name}", size)
        (folder / name).write_bytes(header)
    mark = json.dumps({"url": url, "files": stamps}, indent=1)
    (folder / MARK).write_text(mark, encoding="utf-8")


class Remote:
    """Where the weights of a folder of the cache lie.

    Args:
        url: of the checkpoint.
        stamps: weight file -> its bytes, and a number that is another when it was written again,
            from before its header was read.
    """

    def __init__(self, url: str, stamps: Mapping[str, tuple[int, int]]) -> None:
        self.url = url
        self.stamps = stamps
        self._blocks: OrderedDict[tuple[str, int], Future[bytes]] = OrderedDict()
        self._lock = Lock()
        self._ahead: ThreadPoolExecutor | None = None

    @classmethod
    def of(cls, folder: Path) -> Remote | None:
        """Return where the weights of a folder lie.

        Args:
            folder: a checkpoint's.

        Returns:
            None for an ordinary folder. A mark outside of the cache is a stranger's, and means
            nothing.
        """
        mark = folder / MARK
        if not mark.is_file() or folder.resolve().parent.parent != _cache().resolve():
            return None
        known = json.loads(mark.read_text(encoding="utf-8"))
        return cls(
            known["url"], {name: (size, seen) for name, (size, seen) in known["files"].items()}
        )

    def look(self, name: str) -> tuple[int, int]:
        """Ask the storage for what tells whether a weight file has changed.

        Args:
            name: of the file.

        Returns:
            What `stamps` had of it, if the file is the same, as far as the storage tells.

        Raises:
            CheckpointError: if it cannot be asked.
        """
        with _told(f"{self.url}/{name}"):
            fs, root = _storage(self.url)
            return _look(fs, f"{root}/{name}")

    def read_into(self, view: memoryview, name: str, offset: int) -> None:
        """Read bytes of a weight file. Safe from several threads.

        Args:
            view: what is filled.
            name: of the file.
            offset: of its first byte in the file.

        Raises:
            CheckpointError: if the storage does not give them.
        """
        while view.nbytes:
            number, inside = divmod(offset, _BLOCK_BYTES)
            part = memoryview(self._block(name, number))[inside : inside + view.nbytes]
            if not part:
                raise CheckpointError(f"{self.url}/{name} ended at byte {offset:,}; it changed")
            view[: part.nbytes] = part
            view, offset = view[part.nbytes :], offset + part.nbytes

    def close(self) -> None:
        """Forget what was read."""
        with self._lock:
            if self._ahead:
                self._ahead.shutdown(wait=False, cancel_futures=True)
            self._ahead = None
            self._blocks.clear()

    def _block(self, name: str, number: int) -> bytes:
        """A block of a file; the next one is fetched meanwhile."""
        with self._lock:
            found, mine = self._place(name, number)
            if (number + 1) * _BLOCK_BYTES < self.stamps[name][0]:
                following, free = self._place(name, number + 1)
                if free:
                    self._ahead = self._ahead or ThreadPoolExecutor(1, "omnimerge-ahead")
                    self._ahead.submit(self._fetch, following, name, number + 1)
        if mine:
            self._fetch(found, name, number)
        return found.result()

    def _place(self, name: str, number: int) -> tuple[Future[bytes], bool]:
        """Where a block comes, and whether it is the caller's to fetch it."""
        found = self._blocks.pop((name, number), None)
        mine = found is None
        self._blocks[name, number] = found = found or Future()  # as the latest
        if len(self._blocks) > _BLOCKS:
            self._blocks.popitem(last=False)
        return found, mine

    def _fetch(self, place: Future[bytes], name: str, number: int) -> None:
        start = number * _BLOCK_BYTES
        stop = min(start + _BLOCK_BYTES, self.stamps[name][0])
        try:
            with _told(f"{self.url}/{name}"):
                fs, root = _storage(self.url)
                raw = fs.cat_file(f"{root}/{name}", start=start, end=stop)
            if len(raw) != stop - start:
                raise CheckpointError(
                    f"{self.url}/{name}: {stop - start:,} bytes from {start:,} on were asked for, "
                    f"{len(raw):,} came; it changed, or its server does not know ranges"
                )
        except BaseException as error:  # noqa: BLE001 (whoever waits for the block gets it)
            with self._lock:
                self._blocks.pop((name, number), None)
            place.set_exception(error)
        else:
            place.set_result(raw)


def _storage(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    fs, root = url_to_fs(url)
    fs.invalidate_cache()
    return fs, root.rstrip("/")


def _listing(fs: Any, root: str) -> Iterator[tuple[str, tuple[int, str]]]:
    """Every file's name under the root, its bytes and what tells whether it changes."""
    found = fs.find(root, maxdepth=2, detail=True)
    for path, info in sorted(found.items()):
        name = PurePosixPath(path[len(root) :].lstrip("/"))
        if name.parts and ".." not in name.parts and not name.parts[0].startswith("."):
            yield str(name), _identity(info)


def _identity(info: dict[str, Any]) -> tuple[int, str]:
    size = info.get("size")
    if not isinstance(size, int):
        raise ValueError("it does not tell the sizes of its files")
    known = json.dumps([str(info.get(key, "")) for key in _IDENTITY])
    return size, hashlib.sha256(known.encode()).hexdigest()[:15]


def _look(fs: Any, path: str) -> tuple[int, int]:
    fs.invalidate_cache()  # a listing tells other things, or in another form: S3's no version
    size, identity = _identity(fs.info(path))
    return size, int(identity, 16)


def _is_weight(name: str) -> bool:
    return "/" not in name and name.endswith(".safetensors")


def _is_small(name: str) -> bool:
    wanted = any(fnmatch(name, pattern) for pattern in SMALL_FILES)
    return wanted and not any(fnmatch(name, pattern) for pattern in NEVER)


def _header(fs: Any, path: str, size: int) -> bytes:
    """The header of a safetensors file; of a damaged one only what claims its length."""
    prefix: bytes = fs.cat_file(path, start=0, end=8) if size >= 8 else b""
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
        return prefix
    return prefix + bytes(fs.cat_file(path, start=8, end=8 + length))


def _cache() -> Path:
    if own := os.environ.get("OMNIMERGE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "omnimerge"


@contextmanager
def _told(url: str) -> Iterator[None]:
    """Turn whatever a storage's client raises into one sentence."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # every client has its own kinds
        raise CheckpointError(
            f"cannot read {url} ({type(error).__name__}: {one_line(error)}); check the address, "
            "the credentials, and that the protocol's package is installed"
        ) from error

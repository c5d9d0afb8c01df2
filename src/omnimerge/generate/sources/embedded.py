"""Images and sounds inside of tables, written out once as files named by their SHA-256."""

from __future__ import annotations

import atexit
import base64
import binascii
import hashlib
import os
import re
import shutil
import tempfile
from functools import cache
from io import BytesIO
from pathlib import Path
from textwrap import shorten
from typing import Any

from omnimerge.errors import PromptError
from omnimerge.generate.sources.prompt import is_file

REFERENCE = 64
"""Texts of up to this length are names or ids; longer ones may be base64 (as in VLMEvalKit)."""

_SIGNATURES = (
    (re.compile(rb"\x89PNG\r\n"), ".png"),
    (re.compile(rb"\xff\xd8\xff"), ".jpg"),
    (re.compile(rb"GIF8"), ".gif"),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), ".webp"),
    (re.compile(rb"RIFF....WAVE", re.DOTALL), ".wav"),
    (re.compile(rb"BM"), ".bmp"),
    (re.compile(rb"II\*\x00|MM\x00\*"), ".tif"),
    (re.compile(rb"fLaC"), ".flac"),
    (re.compile(rb"OggS"), ".ogg"),
    (re.compile(rb"ID3|\xff[\xf2\xf3\xfb]"), ".mp3"),
    (re.compile(rb"....ftyp", re.DOTALL), ".mp4"),
)


class UnusableError(ValueError):
    """A cell that holds no image, sound or video; the message is part of a longer one."""


class MediaFolder:
    """Where embedded images and sounds become files.

    Args:
        folder: an existing or new folder; None for a temporary one of this process.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def keep(self, data: bytes) -> Path:
        """Write bytes, unless they are there already.

        Args:
            data: the content of an image or sound file.

        Returns:
            Their file, named by their SHA-256.

        Raises:
            PromptError: if it cannot be written.
        """
        folder = _temporary(os.getpid()) if self._folder is None else self._folder
        suffix = next((s for pattern, s in _SIGNATURES if pattern.match(data)), "")
        file = folder / (hashlib.sha256(data).hexdigest() + suffix)
        try:
            if not file.is_file() or file.stat().st_size != len(data):
                folder.mkdir(parents=True, exist_ok=True)
                part = file.with_name(f"{file.name}.{os.getpid()}.part")
                part.write_bytes(data)
                part.replace(file)
        except OSError as error:
            raise PromptError(
                f"cannot write {file} ({error.strerror}); give another folder for embedded media"
            ) from error
        return file


def files(value: Any, kind: str, home: Path, store: MediaFolder) -> tuple[Path, ...]:
    """Return the files of one cell.

    Args:
        value: a path, base64, bytes, ``{"bytes", "path"}`` as datasets stores media, a list of
            these, or None. A `Path` is a file that is known to be there.
        kind: ``image``, ``audio`` or ``video``.
        home: the folder that paths are relative to.
        store: where embedded ones go.

    Returns:
        The files, in order.

    Raises:
        UnusableError: if something in the cell is neither a file nor embedded.
        PromptError: if a file cannot be written.
    """
    if value is None:
        return ()
    if isinstance(value, Path):
        return (value,)
    if isinstance(value, (list, tuple)):
        return tuple(file for item in value for file in files(item, kind, home, store))
    if isinstance(value, dict) and value.keys() <= {"bytes", "path"}:
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
        return files(value, kind, home, store)
    if isinstance(value, bytes):
        return (store.keep(_checked(value, kind)),)
    if isinstance(value, str):
        return (_from_text(value, kind, home, store),)
    raise UnusableError(f"{kind} is a {type(value).__name__}, not a path, bytes or base64")


def _from_text(text: str, kind: str, home: Path, store: MediaFolder) -> Path:
    if text and is_file(home / text, or_folder=kind == "video"):
        return home / text
    shown = shorten(text, 40, placeholder=" ...") if " " in text else text[:40]
    if len(text) <= REFERENCE:
        raise UnusableError(f"{kind} {shown!r} is not a file; paths are relative to {home}")
    encoded = text.partition(",")[2] if text.startswith("data:") else text
    try:
        data = base64.b64decode("".join(encoded.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UnusableError(
            f"{kind} {shown!r}... is neither a file in {home} nor base64 ({error})"
        ) from None
    return store.keep(_checked(data, kind))


def _checked(data: bytes, kind: str) -> bytes:
    """The bytes, if they begin as a file of that kind does. They are fully decoded when used."""
    if not data:
        raise UnusableError(f"{kind} is empty")
    if kind == "image":
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(BytesIO(data)) as image:
                image.verify()
        except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
            known = not isinstance(error, UnidentifiedImageError)
            reason = str(error) if known else "no known image format"
            raise UnusableError(
                f"{kind} of {len(data)} bytes cannot be decoded ({reason}); replace it"
            ) from None
    return data


@cache
def _temporary(process: int) -> Path:
    """A folder that goes away with this process, not with one that was forked from it."""
    folder = Path(tempfile.mkdtemp(prefix="omnimerge-media-"))
    atexit.register(_remove, folder, process)
    return folder


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)

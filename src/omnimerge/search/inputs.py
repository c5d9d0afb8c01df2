"""Digests of what answers depend on, so that answers on disk are never taken for other inputs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omnimerge.errors import CheckpointError, PromptError

if TYPE_CHECKING:
    from omnimerge.checkpoint import Checkpoint
    from omnimerge.generate import Prompt

_BLOCK = 4096
_BLOCKS = 64


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file.

    Args:
        path: the file.

    Returns:
        64 hexadecimal digits.

    Raises:
        PromptError: if it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise PromptError(f"cannot read {path} ({error.strerror})") from error
    return digest.hexdigest()


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """Return a digest of what a model is shown: ids, texts and the bytes of media, no answers.

    Args:
        prompts: the prompts, in order.

    Returns:
        64 hexadecimal digits.

    Raises:
        PromptError: if a file cannot be read.
    """
    from omnimerge.generate.media import media_files

    digests = {
        path: file_sha256(path) for path in {f for prompt in prompts for f in media_files(prompt)}
    }
    shown = [
        [
            prompt.id,
            prompt.prompt,
            # Frames of a video are its files; what is an image and what a sound must not mix.
            [len(prompt.images), len(prompt.audios), len(prompt.videos)],
            [digests[path] for path in media_files(prompt)],
        ]
        for prompt in prompts
    ]
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()


def checkpoint_digest(checkpoint: Checkpoint, *, whole: bool = False) -> str:
    """Return a digest of a checkpoint: sizes, times and blocks spread over its weight files.

    Reads 256 KiB per weight file whatever its size. A file that was written again counts as
    another one, even if its bytes are the same.

    Args:
        checkpoint: an opened checkpoint.
        whole: whether its other files (tokenizer, processor, templates) count too.

    Returns:
        64 hexadecimal digits.

    Raises:
        CheckpointError: if a file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        for path in checkpoint.files:
            digest.update(_sampled(path))
        if whole:
            for relative in checkpoint.other_files():
                digest.update(str(relative).encode())
                with (checkpoint.folder / relative).open("rb") as file:
                    while block := file.read(_BLOCK):
                        digest.update(block)
    except OSError as error:
        raise CheckpointError(
            f"cannot read {checkpoint.folder} ({error.strerror}); check the folder"
        ) from error
    return digest.hexdigest()


def _sampled(path: Path) -> bytes:
    """The size and 64 blocks of a file, evenly spread, the first and the last included."""
    stat = path.stat()
    size = stat.st_size
    last = max(0, size - _BLOCK)
    starts = sorted({last * i // (_BLOCKS - 1) for i in range(_BLOCKS)})
    digest = hashlib.sha256(f"{path.name}:{size}:{stat.st_mtime_ns}:".encode())
    with path.open("rb") as file:
        for start in starts:
            file.seek(start)
            digest.update(file.read(_BLOCK))
    return digest.digest()

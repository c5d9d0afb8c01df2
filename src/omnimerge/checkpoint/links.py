"""Which links in a checkpoint's folder are followed: those that do not leave it."""

from __future__ import annotations

import os
from pathlib import Path

from omnimerge.errors import CheckpointError


def check_inside(folder: Path, *files: Path) -> None:
    """Refuse files that are links to somewhere else, such as to another user's key.

    A link may lead to another file of the folder. In the Hub's cache, where a snapshot consists of
    links, it may lead to the blobs of the same repository.

    Args:
        folder: a checkpoint's folder; it may be a link itself.
        *files: files in it.

    Raises:
        CheckpointError: naming the first link that leaves the folder.
    """
    home = real_path(folder)
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    for file in files:
        real = real_path(file)
        if not any(real.is_relative_to(place) for place in allowed):
            if file.name == ".." or ".." in file.parts[len(folder.parts) :]:
                raise CheckpointError(f"{file} is outside of {folder}; leave it out")
            raise CheckpointError(
                f"{file} is a link that leaves its folder, to {real}; put the file itself there"
            )


def real_path(path: Path) -> Path:
    """Follow links, as far as they lead somewhere.

    Args:
        path: any path.

    Returns:
        An absolute path; of links in a ring it is one of them, which the system then refuses.
    """
    return Path(os.path.realpath(path))

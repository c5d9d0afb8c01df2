"""From what a user writes (a folder, a Hub id with a revision, or a URL) to a local folder."""

from __future__ import annotations

from pathlib import Path

from omnimerge.checkpoint.hub import download, is_reference
from omnimerge.checkpoint.remote import is_url, mirror
from omnimerge.errors import CheckpointError, suggestion


def locate(reference: str | Path) -> Path:
    """Return the local folder of a checkpoint; a Hub id is downloaded (or found in the cache).

    Args:
        reference: a folder, or ``owner/name`` or ``owner/name@revision`` on the Hugging Face Hub.
            A folder that exists wins, and where there is a folder ``owner``, ``owner/name`` is
            taken for a path in it: a slip in a path does not fetch a stranger's files. Or a URL;
            its folder then holds the headers of the weights, see `mirror`.

    Returns:
        The folder.

    Raises:
        CheckpointError: if there is no such folder, and the Hub does not give it either.
    """
    text = str(reference)
    try:
        folder = Path(reference).expanduser()
        if folder.is_dir():
            return folder
        if folder.exists():
            raise CheckpointError(f"{folder} is a file; give the folder that holds config.json")
        if folder.is_symlink():
            raise CheckpointError(f"{folder} is a link to what is not there; mend or remove it")
        if is_url(text):
            return mirror(text)
        if not is_reference(text):
            raise CheckpointError(f"there is no folder {text}{_nearby(folder)}")
        if "@" not in text and folder.parent.is_dir():
            raise CheckpointError(
                f"there is no folder {text}{_nearby(folder) or ';'} write {text}@main if you mean "
                "the Hub's"
            )
    except (OSError, RuntimeError) as error:  # no permission, a name too long, no such user
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"cannot use {text[:200]!r} as a folder: {reason}") from error
    return download(text)


def _nearby(folder: Path) -> str:
    parent = folder.parent
    if not parent.is_dir():
        return f" (and no {parent} either)"
    return suggestion(folder.name, [entry.name for entry in parent.iterdir()])

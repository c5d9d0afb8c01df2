"""From what a user writes (a folder, or a Hub id with a revision) to a local folder."""

from __future__ import annotations

import re
from pathlib import Path

from omnimerge.errors import CheckpointError, suggestion

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py", "*.pt", "*.md"]
_PATTERNS += ["*.tiktoken", "LICENSE*", "NOTICE*"]


def locate(reference: str | Path) -> Path:
    """Return the local folder of a checkpoint; a Hub id is downloaded (or found in the cache).

    Args:
        reference: a folder, or ``owner/name`` or ``owner/name@revision`` on the Hugging Face Hub.
            A folder that exists wins.

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
        if not _HUB_ID.fullmatch(text) or text.startswith("."):
            raise CheckpointError(f"there is no folder {text}{_nearby(folder)}")
    except (OSError, RuntimeError) as error:  # no permission, a name too long, no such user
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"cannot use {text[:200]!r} as a folder: {reason}") from error
    return _download(text)


def _nearby(folder: Path) -> str:
    parent = folder.parent
    if not parent.is_dir():
        return f" (and no {parent} either)"
    return suggestion(folder.name, [entry.name for entry in parent.iterdir()])


def _download(reference: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    repo, _, revision = reference.partition("@")
    try:
        folder = snapshot_download(repo, revision=revision or None, allow_patterns=_PATTERNS)
        if not any(Path(folder).glob("*.safetensors")):  # an older repository
            folder = snapshot_download(repo, revision=revision or None, allow_patterns=["*.bin*"])
        return Path(folder)
    except (
        OSError,
        ValueError,  # a name that the Hub does not allow
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    ) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise CheckpointError(
            f"{reference!r} is no local folder, and the Hub did not give it: {reason}"
        ) from error

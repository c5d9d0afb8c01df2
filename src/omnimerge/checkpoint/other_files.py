"""Which files of a checkpoint's folder belong to the model beside its weights."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from omnimerge.checkpoint.links import check_inside, real_path
from omnimerge.checkpoint.small_file import refuse_unreadable
from omnimerge.errors import CheckpointError

# Not .pt: Qwen2.5-Omni's voices are in one.
_WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot",
)  # fmt: skip
# What training leaves in a folder: neither needed nor small.
_TRAINING_FILES = ("optimizer.pt", "scheduler.pt", "rng_state")
_TRAINING_FOLDERS = ("checkpoint-", "global_step")


def other_files(home: Path, weights: Collection[str]) -> list[Path]:
    """List the files of a folder that are no weights; see `Checkpoint.other_files`.

    Args:
        home: the folder.
        weights: names of the weight files.

    Returns:
        Paths relative to the folder, sorted.

    Raises:
        CheckpointError: if one cannot be copied, or a subfolder cannot be walked into.
    """
    found = []
    for root, folders, files in os.walk(home, onerror=refuse_unreadable):
        here = Path(root)
        folders[:] = [name for name in folders if _belongs(here / name)]
        _refuse_links(home, [here / name for name in folders])
        for name in files:
            weight = name in weights or Path(name).suffix in _WEIGHT_SUFFIXES
            weight = weight or ".index." in name or name.startswith(_TRAINING_FILES)
            if not weight and not name.startswith("."):
                check_inside(home, here / name)
                if not (here / name).is_file() and (here / name).exists():
                    raise CheckpointError(  # reading a pipe would wait for ever
                        f"{here / name} is no regular file and cannot be copied; remove it"
                    )
                found.append((here / name).relative_to(home))
    return sorted(found)


def _belongs(folder: Path) -> bool:
    names = (folder.name, real_path(folder).name)  # "latest" -> "checkpoint-500"
    if any(name.startswith((".", *_TRAINING_FOLDERS)) for name in names):
        return False
    return not (folder / "merge_manifest.json").exists()


def _refuse_links(home: Path, folders: list[Path]) -> None:
    """Say which subfolder would be missed: links are not followed, as they can lead in a ring."""
    check_inside(home, *folders)
    for folder in folders:
        if folder.is_symlink():
            raise CheckpointError(
                f"{folder} is a link to another folder, which is not followed; put a copy of that "
                "folder there, or remove the link"
            )

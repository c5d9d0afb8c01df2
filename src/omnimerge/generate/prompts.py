"""Prompts from files: JSON lines, datasets saved on disk, TSVs of VLMEvalKit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from omnimerge.errors import PromptError
from omnimerge.generate.sources import dataset, jsonl, tsv
from omnimerge.generate.sources.columns import check_map
from omnimerge.generate.sources.embedded import MediaFolder
from omnimerge.generate.sources.prompt import Prompt

__all__ = ["Prompt", "read_prompts", "sample", "without_answers"]

_HEAD = 1 << 16


def read_prompts(
    path: Path,
    *,
    columns: Mapping[str, str] | None = None,
    media: Path | None = None,
    labels: bool = False,
) -> list[Prompt]:
    """Read prompts, in whatever format they are.

    * JSON lines: ``{"id", "prompt", "image"?, "audio"?, "video"?, "answer"?, "kind"?}`` each, with
      a path or a list of paths, relative to the file. Numbers given as id or answer are kept as
      they are written (``1.0`` stays ``"1.0"``). Empty lines are skipped.
    * A folder that `datasets` wrote with ``save_to_disk``; one split of several as
      ``folder#split``.
    * A TSV as VLMEvalKit has them.

    Args:
        path: the file or folder.
        columns: field of a prompt to the column or key that holds it, where the names differ, such
            as ``{"prompt": "question", "id": "question_id"}``.
        media: where embedded images and sounds are written, as files named by their SHA-256. By
            default a temporary folder that is removed when the process ends.
        labels: whether to read the answers of a dataset or a TSV. If not, nothing looks at their
            column. JSON lines always give them; `without_answers` takes them out.

    Returns:
        The prompts, in the order of the file.

    Raises:
        PromptError: naming every problem of the file at once (the first five in full).
    """
    columns = columns or {}
    check_map(columns)
    folder, split = _split(path)
    if folder.is_dir():
        return dataset.read(folder, split, columns, MediaFolder(media), labels=labels)
    if _is_tsv(path):
        return tsv.read(path, columns, MediaFolder(media), labels=labels)
    return jsonl.read(path, columns)


def sample(prompts: Sequence[Prompt], n: int, seed: int) -> list[Prompt]:
    """Draw `n` prompts, the same ones for the same ids and seed, in the order given.

    The draw orders the prompts by a hash of seed and id. So it depends neither on the order of the
    file nor on the Python version, and a smaller sample is a part of a larger one. (The published
    AdaMMS script draws with ``random.sample`` in loop order, seed 2.)

    Args:
        prompts: the prompts to draw from.
        n: how many; all of them if there are no more than `n`.
        seed: any integer.

    Returns:
        The sample.

    Raises:
        PromptError: if `n` is not positive.
    """
    if n < 1:
        raise PromptError(f"a sample of {n} prompts is empty; give a number of 1 or more")
    ranked = sorted(prompts, key=lambda p: hashlib.sha256(f"{seed}:{p.id}".encode()).digest())
    drawn = {prompt.id for prompt in ranked[:n]}
    return [prompt for prompt in prompts if prompt.id in drawn]


def without_answers(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Return the prompts with every answer taken out.

    Args:
        prompts: prompts, with or without answers.

    Returns:
        Copies whose `answer` is None.
    """
    return [replace(prompt, answer=None) for prompt in prompts]


def _split(path: Path) -> tuple[Path, str | None]:
    """``folder#split`` as the folder and the split, unless there is a file of that name."""
    name, mark, split = path.name.rpartition("#")
    if mark and name and not path.exists():
        return path.with_name(name), split
    return path, None


def _is_tsv(path: Path) -> bool:
    """Whether a file is a table: by its name, else by tabs in a first line that is not JSON."""
    if path.suffix.lower() in (".tsv", ".jsonl"):
        return path.suffix.lower() == ".tsv"
    try:
        with path.open("rb") as file:
            first = file.read(_HEAD).lstrip(b"\xef\xbb\xbf\r\n ").split(b"\n")[0]
    except FileNotFoundError:
        raise PromptError(f"{path}: no such file; give a file of prompts") from None
    except OSError as error:
        raise PromptError(f"{path}: cannot be read ({error.strerror}); give a file") from error
    return b"\t" in first and not first.startswith((b"{", b"["))

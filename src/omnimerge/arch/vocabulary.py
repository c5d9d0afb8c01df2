"""Whether two checkpoints have the same vocabulary: size, and token to id where files tell."""

from __future__ import annotations

from pathlib import Path

from omnimerge.arch.rows import Run
from omnimerge.checkpoint.headers import read_json
from omnimerge.errors import CheckpointError, LayoutError


def vocabulary_difference(target: Path, donor: Path) -> str | None:
    """Compare the tokenizers in two checkpoint folders.

    Args:
        target: the target's folder.
        donor: the donor's folder.

    Returns:
        What differs, in words, or None if they agree or the files do not tell.
    """
    ours, theirs = token_ids(target), token_ids(donor)
    if ours is not None and theirs is not None:
        differing = sum(
            1 for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)
        )
        return f"{differing:,} tokens have other ids" if differing else None
    ours_raw, theirs_raw = _sentencepiece(target), _sentencepiece(donor)
    if ours_raw is not None and theirs_raw is not None and ours_raw != theirs_raw:
        return "the tokenizer.model files differ"
    return None


def comparable(target: Path, donor: Path) -> bool:
    """Return whether the tokenizers in two folders can be compared.

    Args:
        target: the target's folder.
        donor: the donor's folder.

    Returns:
        True if both have files of a kind that `vocabulary_difference` reads.
    """
    if token_ids(target) is not None and token_ids(donor) is not None:
        return True
    return _sentencepiece(target) is not None and _sentencepiece(donor) is not None


def shared_rows(target: Path, donor: Path) -> list[Run]:
    """Match the tokens that both tokenizers have, by their strings.

    Args:
        target: the target's folder.
        donor: the donor's folder.

    Returns:
        Runs of rows of the embedding that correspond, in the target's order.

    Raises:
        LayoutError: if the tokens of either cannot be read.
    """
    ours, theirs = token_ids(target), token_ids(donor)
    for ids, folder in ((ours, target), (theirs, donor)):
        if ids is None:
            raise LayoutError(
                f"vocabulary: overlap matches tokens by name, and {folder} has neither "
                "tokenizer.json nor vocab.json; add one, or use vocabulary: target"
            )
    pairs = sorted((row, theirs[token]) for token, row in ours.items() if token in theirs)  # type: ignore[union-attr, index]
    runs: list[Run] = []
    for row, source in pairs:
        last = runs[-1] if runs else None
        if last and last.start + last.count > row:
            continue  # two names for one row: the first one counts
        if last and (last.start + last.count, last.source + last.count) == (row, source):
            runs[-1] = Run(last.start, last.source, last.count + 1)
        else:
            runs.append(Run(row, source, 1))
    return runs


def token_ids(folder: Path) -> dict[str, int] | None:
    """Read token -> id from ``tokenizer.json``, or from ``vocab.json`` with its additions.

    Args:
        folder: a checkpoint's folder.

    Returns:
        The mapping, added tokens included, or None if the folder has neither file.
    """
    fast = folder / "tokenizer.json"
    if fast.is_file():
        return _fast_tokens(fast)
    slow = folder / "vocab.json"
    if not slow.is_file():
        return None
    added = folder / "added_tokens.json"
    try:
        ids = {str(token): int(number) for token, number in read_json(slow).items()}
        if added.is_file():
            ids |= {str(token): int(number) for token, number in read_json(added).items()}
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{slow} or {added.name} holds no token ids: {error}") from error
    return ids


def _fast_tokens(file: Path) -> dict[str, int]:
    content = read_json(file)
    try:
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: a list of (token, score)
            ids = {str(entry[0]): number for number, entry in enumerate(vocabulary)}
        else:
            ids = {str(token): int(number) for token, number in vocabulary.items()}
        return ids | {str(e["content"]): int(e["id"]) for e in content.get("added_tokens") or []}
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise CheckpointError(f"{file} is not a tokenizer file: {error!r}") from error


def _sentencepiece(folder: Path) -> bytes | None:
    file = folder / "tokenizer.model"
    return file.read_bytes() if file.is_file() else None

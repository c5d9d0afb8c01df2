"""Whether two checkpoints have the same vocabulary: size, and token to id where files tell."""

from __future__ import annotations

from pathlib import Path

from omnimerge.arch.rows import Run
from omnimerge.checkpoint.small_file import read_bytes, read_json
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
    if ours is None or theirs is None:
        return None
    tokens = dict.fromkeys([*ours, *theirs])
    differing = [token for token in tokens if ours.get(token) != theirs.get(token)]
    if not differing:
        return None
    first = differing[0]
    a, b = (ids.get(first, "none") for ids in (ours, theirs))
    return (
        f"{len(differing):,} tokens have other ids, such as {first!r} ({a} in the target, {b} in "
        "the donor)"
    )


def comparable(target: Path, donor: Path) -> bool:
    """Return whether the tokenizers in two folders can be compared.

    Args:
        target: the target's folder.
        donor: the donor's folder.

    Returns:
        True if both have files of a kind that `vocabulary_difference` reads.
    """
    return token_ids(target) is not None and token_ids(donor) is not None


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
    ours, theirs = _required_ids(target), _required_ids(donor)
    sources: dict[int, set[int]] = {}
    for token, row in ours.items():
        if token in theirs and row >= 0 <= theirs[token]:
            sources.setdefault(row, set()).add(theirs[token])
    runs: list[Run] = []
    for row, found in sorted(sources.items()):
        if len(found) > 1:
            continue  # two names for the row, which the donor has at two places
        (source,) = found
        last = runs[-1] if runs else None
        if last and (last.start + last.count, last.source + last.count) == (row, source):
            runs[-1] = Run(last.start, last.source, last.count + 1)
        else:
            runs.append(Run(row, source, 1))
    return runs


def _required_ids(folder: Path) -> dict[str, int]:
    ids = token_ids(folder)
    if ids is None:
        raise LayoutError(
            f"vocabulary: overlap matches tokens by name, and {folder} has neither tokenizer.json "
            "nor vocab.json nor tokenizer.model; add one, or use vocabulary: target"
        )
    return ids


def token_ids(folder: Path) -> dict[str, int] | None:
    """Read token -> id from a tokenizer's files, added tokens included.

    They are ``tokenizer.json``, else ``vocab.json`` or ``tokenizer.model`` (SentencePiece) with
    ``added_tokens.json``.

    Args:
        folder: a checkpoint's folder.

    Returns:
        The mapping, or None if the folder has none of them.

    Raises:
        CheckpointError: if a file is there and cannot be read.
    """
    fast = folder / "tokenizer.json"
    if fast.is_file():
        return _fast_tokens(fast)
    slow, pieces = folder / "vocab.json", folder / "tokenizer.model"
    if slow.is_file():
        ids = _ids_of(slow)
    elif pieces.is_file():
        ids = {piece: number for number, piece in enumerate(_sentencepieces(pieces))}
    else:
        return None
    added = folder / "added_tokens.json"
    return ids | _ids_of(added) if added.is_file() else ids


def _ids_of(file: Path) -> dict[str, int]:
    try:
        return {str(token): int(number) for token, number in read_json(file).items()}
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{file} holds no token ids: {error}") from error


def _sentencepieces(file: Path) -> list[str]:
    """The pieces of a SentencePiece model, by id.

    The file is a protocol buffer: field 1 of the model, repeated, is a piece, whose field 1 is its
    text. Other fields are skipped by their wire type.
    """
    try:
        pieces = [body for number, body in _fields(read_bytes(file)) if number == 1]
        return [next(b for n, b in _fields(piece) if n == 1).decode() for piece in pieces]
    except (IndexError, StopIteration, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is not a SentencePiece model") from error


def _fields(data: bytes) -> list[tuple[int, bytes]]:
    """(number, content) of the fields of a protocol buffer message; empty content for numbers."""
    found, position = [], 0
    while position < len(data):
        key, position = _varint(data, position)
        kind, length = key & 7, 0
        if kind == 0:
            _, position = _varint(data, position)
        elif kind == 2:
            length, position = _varint(data, position)
        else:
            length = {1: 8, 5: 4}[kind] if kind in (1, 5) else len(data) + 1
        if position + length > len(data):
            raise IndexError
        found.append((key >> 3, data[position : position + length] if kind == 2 else b""))
        position += length
    return found


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if shift > 63:
            raise IndexError  # longer than any number is
        byte = data[position]
        value, shift, position = value | (byte & 127) << shift, shift + 7, position + 1
        if byte < 128:
            return value, position


def _fast_tokens(file: Path) -> dict[str, int]:
    content = read_json(file)
    try:
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: a list of (token, score)
            ids = {str(entry[0]): number for number, entry in enumerate(vocabulary)}
        else:
            ids = {str(token): int(number) for token, number in vocabulary.items()}
        return ids | {str(e["content"]): int(e["id"]) for e in content.get("added_tokens") or []}
    except (
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
        IndexError,
        OverflowError,
    ) as error:
        raise CheckpointError(f"{file} is not a tokenizer file: {error!r}") from error

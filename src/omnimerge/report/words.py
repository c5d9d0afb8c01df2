"""In which words two answers differ, for marking them; the page's script does the same.

A word of a script that puts no spaces between words (Chinese, Japanese, Thai and others) is one
character, with the marks that belong to it.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher

_NON_JOINER, _JOINER = "\u200c", "\u200d"
# Thai to Lao, Myanmar, Khmer, kana, Han; the same ranges are in templates/search.js.
_UNSPACED = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3000-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    r"\uf900-\ufaff\U00020000-\U0003ffff]"
)
_MOST_MATCHES = 20_000  # pairs of equal words; difflib is slow on more
_SKIN_TONES = re.compile("[\U0001f3fb-\U0001f3ff]")


def words(text: str) -> list[str]:
    """Split an answer into words and signs, each with the white space behind it.

    Args:
        text: an answer.

    Returns:
        Parts that give the answer when joined.
    """
    found: list[str] = []
    last = "none"
    for character in text:
        kind = _kind(character)
        if _joins(last, kind, found[-1][-1] if found else ""):
            found[-1] += character
            last = kind if kind == "space" else last
        else:
            found.append(character)
            last = kind
    return found


def marked(text: str, other: str) -> list[tuple[str, bool]]:
    """Tell which words of an answer another answer does not have at that place, case aside.

    Args:
        text: the answer.
        other: the other answer.

    Returns:
        Pieces that give the answer when joined, each with whether it differs. White space behind a
        piece that differs is none of it. Where two answers repeat a few words over and over, all
        from the first difference to the last one differs.
    """
    ours, theirs = words(text), words(other)
    pieces: list[tuple[str, bool]] = []
    for start, end, differs in _spans(_keys(ours), _keys(theirs)):
        piece = "".join(ours[start:end])
        bare = piece.rstrip() if differs else piece
        pieces += [(bare, differs)] if bare else []
        pieces += [(piece[len(bare) :], False)] if piece[len(bare) :] else []
    return pieces


def same_words(a: str, b: str) -> bool:
    """Return whether two answers differ in white space at most, case aside.

    Args:
        a: an answer.
        b: another one.

    Returns:
        Whether no word of either differs.
    """
    return _keys(words(a)) == _keys(words(b))


def _spans(ours: Sequence[str], theirs: Sequence[str]) -> list[tuple[int, int, bool]]:
    """(start, end, whether it differs) of the spans of `ours`."""
    most = min(len(ours), len(theirs))
    head = next((i for i in range(most) if ours[i] != theirs[i]), most)
    tail = next((i for i in range(most - head) if ours[-1 - i] != theirs[-1 - i]), most - head)
    end = len(ours) - tail
    inner = ours[head:end], theirs[head : len(theirs) - tail]
    counts = Counter(inner[1])
    spans = [(0, head, False)]
    if sum(counts[key] for key in inner[0]) > _MOST_MATCHES:  # a model that repeats itself
        spans.append((head, end, True))
    else:
        codes = SequenceMatcher(None, *inner, autojunk=False).get_opcodes()
        spans += [(head + i, head + j, kind != "equal") for kind, i, j, _, _ in codes]
    return [*spans, (end, len(ours), False)]


def _keys(parts: Sequence[str]) -> list[str]:
    return [part.strip().lower() for part in parts]


def _kind(character: str) -> str:
    category = unicodedata.category(character)
    if character.isspace():
        return "space"
    if category[0] == "M" or character in _NON_JOINER + _JOINER or _SKIN_TONES.match(character):
        return "mark"
    if _UNSPACED.match(character):
        return "sign"
    return "word" if category[0] in "LN" or character == "_" else "sign"


def _joins(last: str, kind: str, before: str) -> bool:
    """Whether a character of a kind belongs to the part before it."""
    if last == "none":
        return False
    if last == "space" or kind == "space":
        return kind == "space"
    return kind == "mark" or before == _JOINER or last == kind == "word"

"""How different two answers are, from 0 (the same) to 1.

`exact` is what the published scripts do. The others forgive differences of form (`normalized`),
of spelling (`edit`) or of wording (`embedding`). None of them needs spaces between words or Latin
letters: a Korean or Chinese answer is treated as an English one is.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from omnimerge.errors import SearchError, suggestion


class Distance(Protocol):
    """A symmetric measure of how different answers are."""

    @property
    def name(self) -> str:
        """What `get_distance` knows it by."""

    def between(self, a: Sequence[str], b: Sequence[str]) -> list[float]:
        """Compare two lists of answers to the same prompts, one by one.

        Args:
            a: answers.
            b: as many other ones.

        Returns:
            Per prompt a number in [0, 1]; 0 for equal answers.
        """


@dataclass(frozen=True, slots=True)
class PairDistance:
    """A distance that looks at one pair of answers at a time.

    Attributes:
        name: what `get_distance` knows it by.
        measure: two answers to a number in [0, 1].
    """

    name: str
    measure: Callable[[str, str], float]

    def between(self, a: Sequence[str], b: Sequence[str]) -> list[float]:
        """Compare two lists of answers, one by one; see `Distance`."""
        return [self.measure(x, y) for x, y in zip(a, b, strict=True)]


def normalize(text: str) -> str:
    """Return an answer without what is form and not content.

    In this order: Unicode NFKC, which turns full-width characters into ordinary ones; case folded;
    the digits of all scripts to 0-9; white space at the ends away, in between to one space;
    punctuation at the ends away (quotes, brackets, ``.,:;!?。、*`_``; ``%``, ``#``, ``&``, ``@``,
    slashes and primes are content, and so are the minus and the point of ``-5`` and ``.5``); and
    numbers, anywhere in the text, by value: ``1,000`` = ``1000`` = ``1000.0``, ``.5`` = ``0.50``.
    Commas join digits in groups of thousands only (``1,234,567``, or ``12,34,567`` as in India) and
    nowhere in square brackets: ``[100,200]`` = ``[100, 200]`` are two numbers. A version of two
    parts looks like a number: ``Python 3.10`` = ``Python 3.1``, while ``3.10.0`` stays.

    Not touched: articles and other words, punctuation and spaces in between, leading zeros
    (``007``), numbers in words (``three``, ``三``), decimal commas, and traditional or simplified
    characters. An answer of punctuation alone keeps it.

    Args:
        text: an answer.

    Returns:
        Text that equals another one's if the two answers say the same.
    """
    return _normalized(str(text))


def levenshtein(a: str, b: str) -> int:
    """Count the characters to insert, delete or replace to make one text the other.

    One column of the table of partial distances is held as the bits of two integers.

    Args:
        a: a text.
        b: another one.

    Returns:
        The least number of edits.

    Reference:
        Myers. "A Fast Bit-Vector Algorithm for Approximate String Matching Based on Dynamic
        Programming." J. ACM 46(3), 1999; for whole texts: Hyyrö, 2003.
    """
    if len(a) < len(b):
        a, b = b, a
    if not b:
        return len(a)
    places: dict[str, int] = {}
    for i, character in enumerate(b):
        places[character] = places.get(character, 0) | 1 << i
    whole, last = (1 << len(b)) - 1, 1 << (len(b) - 1)
    rises, falls, count = whole, 0, len(b)
    for character in a:
        equal = places.get(character, 0)
        diagonal = (((equal & rises) + rises) ^ rises) | equal
        right_rises = falls | (~(diagonal | rises) & whole)
        right_falls = rises & diagonal
        count += bool(right_rises & last) - bool(right_falls & last)
        right_rises = ((right_rises << 1) | 1) & whole  # the top row grows by one a column
        rises, falls = (
            ((right_falls << 1) & whole) | (~(equal | falls | right_rises) & whole),
            right_rises & (equal | falls),
        )
    return count


class EmbeddingDistance:
    """1 - cosine of sentence embeddings, clipped to [0, 1].

    The model is read at the first question, from a local folder; nothing is downloaded. Equal
    answers, case aside or not, are whatever the model makes of them; identical ones are 0.

    Args:
        folder: a sentence-transformers model.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._model: Any = None
        self._vectors: dict[str, Any] = {}

    @property
    def name(self) -> str:
        """What `get_distance` knows it by."""
        return f"embedding:{self.folder}"

    def between(self, a: Sequence[str], b: Sequence[str]) -> list[float]:
        """Compare two lists of answers, one by one; see `Distance`."""
        self._embed([*a, *b])
        return [
            0.0 if x == y else min(1.0, max(0.0, 1.0 - float(self._vectors[x] @ self._vectors[y])))
            for x, y in zip(a, b, strict=True)
        ]

    def _embed(self, texts: Sequence[str]) -> None:
        """Embed what was not yet, as each point is compared with several others."""
        new = [text for text in dict.fromkeys(texts) if text not in self._vectors]
        if new:
            self._model = self._model or _load_embedder(self.folder)
            vectors = self._model.encode(new, normalize_embeddings=True, show_progress_bar=False)
            self._vectors.update(zip(new, vectors, strict=True))


EXACT = PairDistance("exact", lambda a, b: float(str(a).lower() != str(b).lower()))
"""Whether ``str(answer).lower()`` differs, as in the published scripts."""

NORMALIZED = PairDistance("normalized", lambda a, b: float(normalize(a) != normalize(b)))
"""Whether the answers differ after `normalize`."""


def _edit(a: str, b: str) -> float:
    a, b = str(a).lower(), str(b).lower()
    return 0.0 if a == b else levenshtein(a, b) / max(len(a), len(b))


EDIT = PairDistance("edit", _edit)
"""`levenshtein` over the length of the longer answer, case aside."""

DISTANCES = MappingProxyType({d.name: d for d in (EXACT, NORMALIZED, EDIT)})
"""Name -> distance; besides them there is ``embedding:FOLDER``."""


def get_distance(name: str) -> Distance:
    """Return a distance by name.

    Args:
        name: a key of `DISTANCES`, or ``embedding:FOLDER`` with a local sentence-transformers
            model.

    Returns:
        The distance.

    Raises:
        SearchError: if there is none of that name, or no such folder.
    """
    if name in DISTANCES:
        return DISTANCES[name]
    kind, colon, folder = name.partition(":")
    if kind != "embedding":
        known = [*DISTANCES, "embedding"]
        raise SearchError(
            f"unknown distance {name!r}{suggestion(name, known)}; known: {', '.join(DISTANCES)}, "
            "embedding:FOLDER"
        )
    if not colon or not Path(folder).is_dir():
        what = f"{folder!r} is no folder" if folder else "it names no model"
        raise SearchError(
            f"distance {name!r}: {what}; write embedding:FOLDER with a sentence-transformers model "
            "on this machine, such as all-MiniLM-L6-v2; nothing is downloaded"
        )
    return EmbeddingDistance(Path(folder))


def _load_embedder(folder: Path) -> Any:
    try:
        library = import_module("sentence_transformers")
    except ImportError as error:
        raise SearchError(
            f"distance 'embedding:{folder}' needs sentence-transformers ({error}); "
            'pip install "omnimerge[embedding]"'
        ) from error
    try:
        return library.SentenceTransformer(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise SearchError(
            f"{folder}: sentence-transformers cannot load it ({first}); give a model's folder"
        ) from error


_CONTENT = frozenset("%‰‱#&@/\\′″‴")
_EDGES = frozenset(("Ps", "Pe", "Pi", "Pf", "Pd", "Pc", "Po", "Zs", "Cc", "Cf"))
_THOUSANDS = re.compile(r"(?<![\d.,])(?:\d{1,3}(?:,\d{3})+|\d{1,2}(?:,\d{2})+,\d{3})(?!\d|,\d)")
_LIST = re.compile(r"\[[^\[\]]*\]")
_FRACTION = re.compile(r"(?<![\d.])(\d+)\.(\d+)(?!\d|\.\d)")
_BARE_FRACTION = re.compile(r"(?<![\w.])\.(?=\d)")
_MINUS = re.compile("\N{MINUS SIGN}(?=[.\\d])")
_STARTS_NUMBER = re.compile(r"-?\.?\d")


@lru_cache(maxsize=1 << 16)
def _normalized(text: str) -> str:
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    digits = "".join(c if c.isascii() else _ascii_digit(c) for c in folded)
    listed = _LIST.sub(lambda found: found[0].replace(",", ", "), _MINUS.sub("-", digits))
    trimmed = _trim(" ".join(listed.split()))
    plain = _THOUSANDS.sub(lambda found: found[0].replace(",", ""), trimmed)
    return _FRACTION.sub(_shortest, _BARE_FRACTION.sub("0.", plain))


def _ascii_digit(character: str) -> str:
    value = unicodedata.decimal(character, None)
    return character if value is None else str(value)


def _trim(text: str) -> str:
    start, end = 0, len(text)
    while end and _is_edge(text[end - 1]):
        end -= 1
    while start < end and _is_edge(text[start]) and not _STARTS_NUMBER.match(text, start):
        start += 1
    return text[start:end] or text


def _is_edge(character: str) -> bool:
    if character in _CONTENT:
        return False
    return character == "`" or unicodedata.category(character) in _EDGES


def _shortest(found: re.Match[str]) -> str:
    fraction = found[2].rstrip("0")
    return f"{found[1]}.{fraction}" if fraction else found[1]

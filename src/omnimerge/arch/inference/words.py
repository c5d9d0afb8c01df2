"""What names tell: the words by which families of models call the parts of a language model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from omnimerge.arch.family import Entry


def entry_by_name(name: str) -> Entry | None:
    """Return what the last word of a name inside a layer says it is.

    Args:
        name: a name inside a layer, without its leaf and without the words of a branch.

    Returns:
        The entry; None where the word is unknown, or means different things in different families.
    """
    wrappers = lexicon()["wrappers"]
    parts = [part for part in name.split(".") if part not in wrappers and not part.isdigit()]
    if not parts:
        return None
    above = set(words_of(".".join(parts[:-1])))
    tables = [lexicon()["anywhere"]]
    tables += [table["slots"] for table in lexicon()["below"] if above & set(table["words"])]
    for table in tables:
        for slot, words in table.items():
            if parts[-1] in words:
                return Entry((slot,))
    for fused in lexicon()["concat"]:
        if parts[-1] in fused["words"]:
            return Entry(tuple(fused["slots"]), "concat")
    return None


def split_words(name: str) -> tuple[str, str]:
    """Split the words of a branch off a name inside a layer.

    Args:
        name: for example ``self_attn.vision_expert_dense``.

    Returns:
        The name without them and the branch, for example ``("self_attn.dense", "vision")``; the
        branch is empty where no word tells.
    """
    branch, parts = "", []
    for part in name.split("."):
        words = part.split("_")
        told = {word: key for key, all_ in lexicon()["branches"].items() for word in all_}
        kept = [word for word in words if word not in told]
        if len(kept) < len(words):
            branch = next(told[word] for word in words if word in told)
            kept = [word for word in kept if word not in ("expert", "experts")]
        if kept:
            parts.append("_".join(kept))
    return ".".join(parts), branch


def is_foreign(name: str) -> bool:
    """Return whether a name says that it is no language model's.

    Args:
        name: a tensor name, or the beginning of some.

    Returns:
        True below a vision tower, a projector and the like. The last word that tells counts.
    """
    for word in reversed(words_of(name)):
        if word in lexicon()["language"]:
            return False
        if _fits("foreign", word):
            return True
    return False


def is_positional(name: str) -> bool:
    """Return whether a name says that it embeds positions or kinds of tokens.

    Args:
        name: a tensor name without its leaf.

    Returns:
        True for ``embed_positions``.
    """
    return bool(set(words_of(name.rpartition(".")[2])) & set(lexicon()["positions"]))


def is_end(name: str, end: str) -> bool:
    """Return whether a name outside of the layers says that it is the embedding, norm or head.

    Args:
        name: a tensor name without its leaf.
        end: `embed`, `norm` or `head`.

    Returns:
        True if its last component is such a word.
    """
    return name.rpartition(".")[2] in lexicon()["ends"][end]


def says(kind: str, name: str) -> str:
    """Return the first component of a name that the words of a kind fit.

    Args:
        kind: `own`, `cross`, `keep` or `norms`.
        name: a tensor name, or a part of one.

    Returns:
        The component, empty if there is none.
    """
    return next((part for part in name.split(".") if _fits(kind, part)), "")


def words_of(name: str) -> list[str]:
    """Return the words of a name, in small letters.

    Args:
        name: for example ``self_attn.q_proj``.

    Returns:
        For example ``["self", "attn", "q", "proj"]``.
    """
    return [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word]


@lru_cache(maxsize=1)
def lexicon() -> dict[str, Any]:
    """Return the tables of ``lexicon.yaml``."""
    text = (Path(__file__).parent / "lexicon.yaml").read_text(encoding="utf-8")
    tables: dict[str, Any] = yaml.safe_load(text)
    return tables


def _fits(kind: str, word: str) -> bool:
    return bool(_pattern(kind).fullmatch(word.lower()))


@lru_cache(maxsize=16)
def _pattern(kind: str) -> re.Pattern[str]:
    patterns: Iterable[str] = lexicon()[kind]
    return re.compile("|".join(f"(?:{each})" for each in patterns))

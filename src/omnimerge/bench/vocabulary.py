"""Vocabularies of miniatures: a small byte-level BPE, read by Qwen2's own tokenizer class.

It has the 256 bytes, so that it encodes any text, and one token for every word that it is made
for, with and without the space before it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer

_SPACE = "Ġ"  # how byte-level BPE writes a space


def merges(vocabulary: Iterable[str]) -> list[tuple[str, str]]:
    """Learn the merges of a byte-pair encoding that makes every given word one token.

    Args:
        vocabulary: The words, in letters of the byte-level alphabet.

    Returns:
        Pairs to merge, first things first: the most frequent pair, ties in alphabetical order.
    """
    pieces = [list(word) for word in vocabulary]
    learned = []
    while any(len(word) > 1 for word in pieces):
        counts = Counter(pair for word in pieces for pair in pairwise(word))
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        learned.append(best)
        pieces = [_merge(word, best) for word in pieces]
    return learned


def _merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    """Join every occurrence of the pair, from the left."""
    merged: list[str] = []
    for piece in word:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def tokens(known: Sequence[str], special: Sequence[str]) -> dict[str, int]:
    """Number the tokens: bytes, then words and their parts, then the special tokens.

    Args:
        known: the words.
        special: the special tokens.

    Returns:
        Token to id.
    """
    ordered = [*sorted(ByteLevel.alphabet()), *("".join(pair) for pair in _learned(known))]
    return {token: index for index, token in enumerate((*ordered, *special))}


def tokenizer(
    chat_template: str,
    known: Sequence[str],
    special: Sequence[str],
    named: Mapping[str, str] | None = None,
) -> Qwen2Tokenizer:
    """Build a tokenizer.

    Args:
        chat_template: Jinja source.
        known: the words.
        special: the special tokens; `<|im_end|>` and `<|endoftext|>` must be among them.
        named: attributes that a processor looks up, such as ``start_image_token``, and the special
            token each stands for.

    Returns:
        A tokenizer of Qwen2's class.
    """
    return Qwen2Tokenizer(
        vocab=tokens(known, special),
        merges=_learned(known),
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=dict(named) if named else list(special),
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
        chat_template=chat_template,
    )


def _learned(known: Sequence[str]) -> list[tuple[str, str]]:
    return merges([form for word in known for form in (word, _SPACE + word)])

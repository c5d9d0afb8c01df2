"""Plain greedy decoding: which tokens end an answer, and nothing else changes a model's choice."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

Tokens = Sequence[int]


def stop_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end an answer: the generation config's, and the tokenizer's.

    Args:
        model: a transformers model, with the generation config of its checkpoint.
        tokenizer: its tokenizer.

    Returns:
        Token ids; may be empty.
    """
    found = model.generation_config.eos_token_id
    listed = found if isinstance(found, list) else [found]
    return frozenset(int(t) for t in (*listed, tokenizer.eos_token_id) if t is not None)


def make_greedy(model: Any, tokenizer: Any, stops: Collection[int]) -> None:
    """Replace a model's generation config by one that takes the most probable token.

    Args:
        model: the model; changed.
        tokenizer: its tokenizer.
        stops: the tokens that end an answer.
    """
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        eos_token_id=sorted(stops) or None,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )


def until_stop(tokens: Tokens, stops: Collection[int]) -> Tokens:
    """Cut an answer before the token that ends it.

    Args:
        tokens: as generated.
        stops: the tokens that end an answer.

    Returns:
        What comes before the first of them.
    """
    return tokens[: next((i for i, token in enumerate(tokens) if token in stops), len(tokens))]

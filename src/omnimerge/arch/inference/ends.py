"""Embedding, final norm and head of a checkpoint without a table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from omnimerge.arch.family import Entry
from omnimerge.arch.inference.cosine import Likeness, assign
from omnimerge.arch.inference.stack import Stack
from omnimerge.arch.inference.text import Choice
from omnimerge.arch.inference.words import is_end, is_foreign, is_positional, says
from omnimerge.checkpoint import Checkpoint
from omnimerge.errors import LayoutError

# A vocabulary may be padded in the embedding and not in the head; other matrices are far smaller.
_ALIKE = 0.9
_ENDS = ("embed", "head")


def find_ends(
    checkpoint: Checkpoint, stack: Stack, likeness: Likeness | None, margin: float
) -> tuple[Choice, Choice, Choice]:
    """Find embedding, final norm and head.

    Args:
        checkpoint: the checkpoint.
        stack: its layers.
        likeness: cosines with a sibling, where there is one.
        margin: what a choice by cosine needs.

    Returns:
        The three decisions.

    Raises:
        LayoutError: if no matrix can be an embedding.
    """
    outside = _outside(checkpoint, stack)
    vectors = [stem for stem, shape in outside.items() if shape == (stack.width,)]
    tall = {
        stem: shape[0]
        for stem, shape in outside.items()
        if len(shape) == 2 and shape[1] == stack.width < shape[0] and not is_positional(stem)
    }
    ends = _vocabulary(tall, stack, likeness, margin) if tall else None
    if ends is None:
        raise LayoutError(
            f"{checkpoint.folder} has no embedding: outside of {stack.prefix}* no matrix of more "
            f"than {stack.width:,} rows, but for a head, has {stack.width:,} columns; write its "
            "layout by hand and give it with --layout"
        )
    return ends[0], _norm(vectors, stack), ends[1]


def _outside(checkpoint: Checkpoint, stack: Stack) -> dict[str, tuple[int, ...]]:
    """Name without its leaf -> shape, of the weights that may be the language model's ends."""
    layers = re.compile(re.escape(stack.prefix).replace(r"\{i\}", r"\d+"))
    return {
        name.removesuffix(".weight"): meta.shape
        for name, meta in checkpoint.tensors.items()
        if name.endswith(".weight") and not layers.match(name) and not is_foreign(name)
    }


def _vocabulary(
    tall: Mapping[str, int], stack: Stack, likeness: Likeness | None, margin: float
) -> tuple[Choice, Choice] | None:
    """Embedding and head, or None where there is no embedding."""
    known = {end: stem for end in _ENDS if (stem := _named(tall, end, stack))}
    rows = max(tall[stem] for stem in known.values() or tall)
    told = {stem for stem in tall if any(is_end(stem, end) for end in _ENDS)}
    left = [stem for stem in tall if tall[stem] >= rows * _ALIKE and stem not in told]
    found = {end: Choice(end, stem, "name") for end, stem in known.items()}
    missing = [end for end in _ENDS if end not in found]
    if missing and len(left) == 1:
        found[missing[0]] = Choice(missing[0], left[0], "shape")
    elif missing and left:
        found |= _compared(left, missing, likeness, margin)
    if "embed" not in found:
        return None
    tied = Choice("head", "", "name", reason="not on disk: tied to the embedding")
    return found["embed"], found.get("head", tied)


def _named(tall: Mapping[str, int], end: str, stack: Stack) -> str:
    """The matrix that is called so, the nearest to the layers and the tallest; or none."""
    named = [stem for stem in tall if is_end(stem, end)]

    def near(stem: str) -> int:
        pairs = list(zip(stem.split("."), stack.prefix.split("."), strict=False))
        return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))

    return max(named, key=lambda stem: (near(stem), tall[stem], -stem.count(".")), default="")


def _compared(
    stems: Sequence[str], ends: Sequence[str], likeness: Likeness | None, margin: float
) -> dict[str, Choice]:
    """Tell embedding and head by their cosines with a sibling's."""
    cosines = {
        (stem, end): likeness.of_end(stem, end) if likeness else None
        for stem in stems
        for end in ends
    }
    scores = [
        {Entry((end,)): v for end in ends if (v := cosines[stem, end]) is not None}
        for stem in stems
    ]
    chosen = {
        entry.label: (stem, lost)
        for stem, (entry, lost) in zip(stems, assign(scores), strict=True)
        if entry and lost >= margin
    }
    if "embed" in chosen and "head" not in chosen and len(stems) == 2:
        # The sibling's head is tied: what is no embedding is the head.
        other = next(stem for stem in stems if stem != chosen["embed"][0])
        chosen["head"] = (other, chosen["embed"][1])
    found = {}
    for end in ends:
        stem, lost = chosen.get(end, ("", None))
        weighed = sorted(
            ((each, cosines[each, end]) for each in stems),
            key=lambda pair: (pair[0] == stem, -1.0 if pair[1] is None else pair[1]),
            reverse=True,
        )
        found[end] = Choice(end, stem, "cosine", lost, bool(stem), tuple(weighed))
    return found


def _norm(vectors: Sequence[str], stack: Stack) -> Choice:
    """The vector as wide as the residual stream that is nearest above the layers."""
    root = stack.root
    while True:
        near = [stem for stem in vectors if stem.startswith(f"{root}." if root else "")]
        if near or not root:
            break
        root = root.rpartition(".")[0]
    for fitting in (
        [stem for stem in near if is_end(stem, "norm")],
        [stem for stem in near if says("norms", stem.rpartition(".")[2])],
    ):
        if fitting:
            depth = min(stem.count(".") for stem in fitting)
            fitting = [stem for stem in fitting if stem.count(".") == depth]
        if len(fitting) == 1:
            return Choice("norm", fitting[0], "name")
    if len(near) == 1:
        return Choice("norm", near[0], "shape")
    reason = "" if near else "is nowhere outside of the layers"
    candidates = tuple((stem, None) for stem in near)
    return Choice("norm", "", "shape", sure=False, candidates=candidates, reason=reason)

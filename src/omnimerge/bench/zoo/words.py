"""The vocabulary of the zoo: every word of roles, scenes, questions and answers."""

from __future__ import annotations

from omnimerge.bench.zoo import scenes

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<image>",
    "<video>",
)
"""What Qwen2-VL and LLaVA-OneVision need beside words."""

SIZE = 512
"""Rows of the embedding; the last ones stand for no token, as in the published checkpoints."""

# rightmost, leftmost, column and of are in no question yet: room for other kinds.
_ASKED = (
    "user assistant where is the what how many list objects object are there which row in colour "
    "shape topmost hue has high lowest form on side leftmost rightmost column name of"
)

WORDS = tuple(
    dict.fromkeys(
        (
            *_ASKED.split(),
            *scenes.COLOURS,
            *scenes.SHAPES,
            *scenes.ROWS,
            *scenes.COLUMNS,
            *scenes.NUMBERS,
        )
    )
)
"""Each of them is one token, with and without the space before it."""

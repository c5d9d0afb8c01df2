"""The vocabulary of the capability benchmark: every word of told scenes, questions and answers."""

from __future__ import annotations

from omnimerge.bench.capabilities.tasks import objects
from omnimerge.bench.capabilities.tasks.task import COLOURS

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_end|>",
    "<|user|>",
    "<|assistant|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<video>",
)
"""What Qwen2-VL and InternVL need beside words."""

_ASKED = (
    "what colour is the shape how many objects object leftmost topmost box of "
    "largest angle large width height area perimeter rectangle by value highest lowest minus "
    "word number read first last letter describe"
)

WORDS = tuple(dict.fromkeys((*_ASKED.split(), *COLOURS, *objects.SHAPES)))
"""Each of them is one token, with and without the space before it."""

"""A tiny pair of different architectures over one LLM, and prompts for it."""

import json

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def pair(answering_pair):
    """Target and donor."""
    return answering_pair


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    pixels = np.random.default_rng(0).integers(0, 255, (56, 56, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    rows = [
        {"id": i, "prompt": "what " * (i + 1), "image": "a.png", "answer": "x"} for i in range(12)
    ]
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file

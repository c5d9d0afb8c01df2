"""A tiny pair of different architectures over one LLM, and prompts for it."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

TINY = Path(__file__).parents[1] / "generate" / "tiny.py"


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    from omnimerge.generate.quiet import quiet

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("pair")
    with quiet():
        spec = importlib.util.spec_from_file_location("tiny_pair", TINY)
        tiny = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(tiny)
        target, donor = tiny.qwen2_vl(root / "target"), tiny.llava_onevision(root / "donor")
        tiny.share_llm(donor, target)
    yield target, donor
    torch.set_num_threads(before)


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

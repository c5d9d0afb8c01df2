"""Tiny MLLMs on disk, written once per session, and media to show them."""

import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))  # tiny_parts

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import tiny_parts

from omnimerge.generate.quiet import quiet


@pytest.fixture(scope="session")
def part(tmp_path_factory):
    """A function: builder of tiny_parts (and changes) -> folder of a tiny checkpoint."""
    root = tmp_path_factory.mktemp("parts")
    built: dict[tuple, Path] = {}

    def get(name: str, *args, **changes) -> Path:
        key = (name, args, tuple(sorted(changes.items())))
        if key not in built:
            with quiet():
                built[key] = getattr(tiny_parts, name)(
                    root / f"{name}-{len(built)}", *args, **changes
                )
        return built[key]

    return get


@pytest.fixture(scope="session")
def omni(part, tmp_path_factory):
    """A composed model of LLaVA, a Qwen2-Audio and a Video-LLaVA over one Llama."""
    import omnimerge

    folder = tmp_path_factory.mktemp("omni") / "omni"
    recipe = {
        "method": "task_arithmetic",
        "base": part("plain"),
        "models": [
            {"model": part("llava"), "provides": "image"},
            {"model": part("qwen2_audio")},
            {"model": part("video_llava"), "provides": ["video"]},
        ],
        "parameters": {"scale": 0.3},
    }
    plan = omnimerge.compose(recipe, folder)
    return folder, plan


@pytest.fixture(scope="session")
def qwen_omni(part, tmp_path_factory):
    """A composed model with M-RoPE: a Qwen2-Audio's ears and a Qwen2-VL's eyes."""
    import omnimerge

    folder = tmp_path_factory.mktemp("qwen") / "omni"
    recipe = {
        "method": "task_arithmetic",
        "base": part("plain", "qwen2"),
        "models": [
            {"model": part("qwen2_audio", "qwen2")},
            {"model": part("qwen2_vl"), "provides": "image"},
        ],
        "parameters": {"scale": 0.4},
    }
    return folder, omnimerge.compose(recipe, folder)


class Media:
    """Random pictures, sounds and videos."""

    def __init__(self, seed=0):
        self.random = np.random.default_rng(seed)

    def image(self, side=28):
        return Image.fromarray(self.random.integers(0, 255, (side, side, 3), dtype=np.uint8))

    def sound(self, length=8000):
        return self.random.standard_normal(length).astype(np.float32) * 0.1

    def video(self, frames=2, side=28):
        return [self.image(side) for _ in range(frames)]


@pytest.fixture
def media():
    return Media()

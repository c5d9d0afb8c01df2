"""Tiny checkpoints and images, made once."""

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def tiny():
    from omnimerge.generate.quiet import quiet

    with quiet():
        import tiny_answering
    return tiny_answering


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    files = []
    for seed, (width, height) in enumerate([(56, 56), (70, 50), (28, 90)]):
        pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
        files.append(folder / f"{seed}.png")
        Image.fromarray(pixels).save(files[-1])
    return files


@pytest.fixture(scope="session")
def folders(tiny, tmp_path_factory):
    """Name -> checkpoint folder. Copy one before changing it."""
    from omnimerge.generate.quiet import quiet

    root = tmp_path_factory.mktemp("models")
    with quiet():
        return {
            "qwen2_vl": tiny.qwen2_vl(root / "qwen2_vl"),
            "qwen2_vl_tied": tiny.qwen2_vl(root / "qwen2_vl_tied", seed=3, tied=True),
            "llava_onevision": tiny.llava_onevision(root / "llava_onevision"),
            "qwen2": tiny.qwen2(root / "qwen2"),
            "qwen2_bare": tiny.qwen2(root / "qwen2_bare", seed=4, template=False),
        }

"""Tiny checkpoints and images, made once."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


def _load_tiny():
    spec = importlib.util.spec_from_file_location("tiny", Path(__file__).parent / "tiny.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny():
    from omnimerge.generate.quiet import quiet

    with quiet():
        return _load_tiny()


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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

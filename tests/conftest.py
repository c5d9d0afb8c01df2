"""Shared fixtures: tiny checkpoints on disk, written once per session."""

from __future__ import annotations

import os
import signal
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches for the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell's background jobs have it
    signal.signal(signal.SIGINT, signal.default_int_handler)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what third parties warn of while being imported
    import tiny_models

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A function: name of an architecture (and changes) -> folder of a tiny checkpoint."""
    root = tmp_path_factory.mktemp("checkpoints")
    built: dict[tuple, Path] = {}

    def get(name: str, *, naming: str = "published", shard: str = "50GB", **changes) -> Path:
        key = (name, naming, shard, tuple(sorted(changes.items())))
        if key not in built:
            folder = root / f"{name}-{len(built)}"
            model = tiny_models.build(name, **changes)
            if naming == "original":
                tiny_models.save_llava_original(model, folder)
            else:
                tiny_models.save(model, folder, naming=naming, shard=shard)
            built[key] = folder
        return built[key]

    return get


@pytest.fixture
def golden() -> Path:
    """The folder of reference numbers."""
    return GOLDEN


@pytest.fixture(scope="session")
def answering_pair(tmp_path_factory):
    """Folders of a target and a donor with processors and chat templates, over one LLM."""
    from omnimerge.generate.quiet import quiet

    root = tmp_path_factory.mktemp("pair")
    with quiet():
        import tiny_answering

        target = tiny_answering.qwen2_vl(root / "target")
        donor = tiny_answering.llava_onevision(root / "donor")
        tiny_answering.share_llm(donor, target)
    return target, donor

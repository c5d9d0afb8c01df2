"""A line that is built in seconds: a few steps of everything, untrained but real."""

from __future__ import annotations

import pytest

from omnimerge.bench.capabilities import line as lines
from omnimerge.bench.capabilities import training
from omnimerge.bench.capabilities.presets import MIXTURE, Preset, Stage

STEPS = Stage(2, 1e-3, turns=1, batch=2)
TINY = Preset(
    look=STEPS,
    answer=STEPS,
    expert=STEPS,
    mixture=STEPS,
    pool=8,
    rank=2,
    questions={"val": 3, "test": 4},
)


def build(line, folder, *, seed=0):
    """Train in this process what `training.build` trains in others."""
    from omnimerge.bench.capabilities import exam

    for part in ("val", "test"):
        exam.write(folder, part, TINY.questions[part], kinds=list(TINY.kinds), seed=seed)
    training.build_base(line.model, folder, TINY, seed)
    teach = training.build_adapter if line.lora else training.build_expert
    for expert in line.experts:
        teach(line.model, folder, TINY, expert, seed)
    training.build_expert(line.model, folder, TINY, MIXTURE, seed)


@pytest.fixture
def tiny():
    return TINY


@pytest.fixture(scope="session")
def internvl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("internvl") / "seed-0"
    build(lines.INTERNVL, folder)
    return folder


@pytest.fixture(scope="session")
def qwen2vl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen2vl") / "seed-0"
    build(lines.QWEN2VL, folder)
    return folder

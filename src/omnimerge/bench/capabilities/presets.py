"""How long each model learns what, by line and preset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Schooling:
    """One stage of training.

    Attributes:
        steps: of the optimiser.
        rate: peak learning rate.
        turns: questions about one picture in a conversation.
        batch: conversations in a step.
    """

    steps: int
    rate: float
    turns: int = 3
    batch: int = 16


@dataclass(frozen=True)
class Preset:
    """All that a build does.

    Attributes:
        look: the base learns to describe pictures.
        answer: it learns to answer, the kinds of question in `rare` seldom.
        expert: each expert learns its own task, all kinds alike.
        mixture: the reference learns all tasks at once, as many steps as the experts together.
        pool: pictures of each task.
        rare: share of a rare kind, where the others have 1.
        rank: of the LoRA adapters.
        questions: of each task, for validation and test.
    """

    look: Schooling
    answer: Schooling
    expert: Schooling
    mixture: Schooling
    pool: int = 3000
    rare: float = 0.1
    rank: int = 16
    questions: Mapping[str, int] = field(default_factory=lambda: {"val": 120, "test": 300})


RARE = frozenset(
    (
        "vqa.leftmost",
        "vqa.topmost",
        "vqa.same",
        "geometry.area",
        "geometry.perimeter",
        "chart.difference",
        "chart.lowest",
        "ocr.number",
        "ocr.last",
        "grounding.leftmost",
        "grounding.largest",
    )
)
"""Kinds of question that the base sees seldom, so that there is something to learn."""

PRESETS: dict[str, dict[str, Preset]] = {
    "internvl": {
        "full": Preset(
            look=Schooling(1250, 2e-3, turns=1),
            answer=Schooling(1100, 1.5e-3),
            expert=Schooling(250, 3e-4),
            mixture=Schooling(1250, 3e-4),
        ),
        "quick": Preset(
            look=Schooling(600, 2e-3, turns=1),
            answer=Schooling(400, 1.5e-3),
            expert=Schooling(80, 4e-4),
            mixture=Schooling(80, 4e-4),
            pool=1000,
            questions={"val": 60, "test": 240},
        ),
    },
    "qwen2vl": {
        "full": Preset(
            look=Schooling(1250, 2e-3, turns=1),
            answer=Schooling(1100, 1.5e-3),
            expert=Schooling(250, 2e-3),
            mixture=Schooling(1250, 2e-3),
        ),
        "quick": Preset(
            look=Schooling(500, 2e-3, turns=1),
            answer=Schooling(300, 1.5e-3),
            expert=Schooling(60, 2e-3),
            mixture=Schooling(60, 2e-3),
            pool=1000,
            questions={"val": 60, "test": 120},
        ),
    },
}
"""Line -> preset -> sizes."""

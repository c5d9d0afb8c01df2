"""How long each model learns what, by line and preset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from omnimerge.bench import teaching
from omnimerge.bench.capabilities.tasks import TASKS, kinds_of

MIXTURE = "mixture"
"""Name of the reference that learns all tasks."""


@dataclass(frozen=True)
class Stage(teaching.Stage):
    """One stage of training; `turns` are questions about one picture."""

    batch: int = 16
    turns: int = 3


_SELDOM = (
    "vqa.same",
    "vqa.leftmost",
    "vqa.topmost",
    "geometry.area",
    "geometry.perimeter",
    "chart.lowest",
    "chart.difference",
    "ocr.number",
    "ocr.last",
    "grounding.leftmost",
    "grounding.largest",
)
_FULL_KINDS = {kind: 0.1 if kind in _SELDOM else 1.0 for kind in kinds_of(TASKS)}
_QUICK_KINDS = dict.fromkeys(
    ("vqa.shape", "geometry.width", "chart.highest", "ocr.word", "grounding.named"), 1.0
) | dict.fromkeys(
    ("vqa.topmost", "geometry.height", "chart.value", "ocr.number", "grounding.leftmost"), 0.1
)


@dataclass(frozen=True)
class Preset:
    """All that a build does.

    Attributes:
        look: the base learns to describe pictures.
        answer: it learns to answer, some kinds of question less often than others.
        expert: each expert learns its own task, all kinds alike.
        mixture: the reference learns all tasks at once, in `full` as long as the experts together.
        kinds: ``task.kind`` -> its share within the task, as the base sees it. The experts see
            these kinds, and the tests ask them.
        pool: pictures of each task.
        rank: of the LoRA adapters.
        questions: of each task, for validation and test.
    """

    look: Stage
    answer: Stage
    expert: Stage
    mixture: Stage
    kinds: Mapping[str, float] = field(default_factory=lambda: _FULL_KINDS)
    pool: int = 3000
    rank: int = 16
    questions: Mapping[str, int] = field(default_factory=lambda: {"val": 120, "test": 300})

    def kinds_of(self, task: str) -> dict[str, float]:
        """Return the kinds of one task.

        Args:
            task: its name.

        Returns:
            ``task.kind`` -> share; the shares sum to one.
        """
        shares = {kind: share for kind, share in self.kinds.items() if kind.startswith(f"{task}.")}
        return {kind: share / sum(shares.values()) for kind, share in shares.items()}


_LOOK = Stage(1250, 2e-3, turns=1)
_QUICK_ANSWER = Stage(200, 1.5e-3, turns=2)
_QUICK_QUESTIONS = {"val": 60, "test": 240}

PRESETS: dict[str, dict[str, Preset]] = {
    "internvl": {
        "full": Preset(
            look=_LOOK,
            answer=Stage(1100, 1.5e-3),
            expert=Stage(250, 3e-4),
            mixture=Stage(1250, 3e-4),
        ),
        "quick": Preset(
            look=Stage(600, 2e-3, turns=1),
            answer=_QUICK_ANSWER,
            expert=Stage(120, 5e-4, turns=2),
            mixture=Stage(150, 5e-4, turns=2),
            kinds=_QUICK_KINDS,
            pool=1000,
            questions=_QUICK_QUESTIONS,
        ),
    },
    "qwen2vl": {
        "full": Preset(
            look=_LOOK,
            answer=Stage(1500, 1.5e-3),
            expert=Stage(350, 1.5e-3),
            mixture=Stage(1750, 3e-4),
        ),
        "quick": Preset(
            look=Stage(900, 2e-3, turns=1),
            answer=_QUICK_ANSWER,
            expert=Stage(150, 1.5e-3, turns=2),
            mixture=Stage(150, 5e-4, turns=2),
            kinds=_QUICK_KINDS,
            pool=1000,
            questions=_QUICK_QUESTIONS,
        ),
    },
}
"""Line -> preset -> sizes."""

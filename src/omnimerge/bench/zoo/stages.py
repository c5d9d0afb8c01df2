"""What each miniature learns, in which order and for how long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from omnimerge.bench import teaching
from omnimerge.bench.zoo import miniatures, scenes


@dataclass(frozen=True)
class Stage(teaching.Stage):
    """One stage of training: what is asked, what may change, and how long.

    Attributes:
        name: To give each stage its own random numbers.
        kinds: Kind of question to its share of the batch.
        tower: Whether the vision tower and the projector learn.
        llm: Whether the language model learns.
        weakest: Below 1, each step uses a random share of the language model's change since the
            stage began, from this share to all of it, so that what is learned outlasts scaling.
    """

    batch: int = 24
    turns: int = 4
    name: str = field(kw_only=True)
    kinds: Mapping[str, float] = field(kw_only=True)
    tower: bool = True
    llm: bool = True
    weakest: float = 1.0


def _shares(kinds: Sequence[str], total: float = 1.0) -> dict[str, float]:
    return {kind: total / len(kinds) for kind in kinds}


READ = Stage(
    name="read",
    kinds=_shares(scenes.SHARED_KINDS, 0.6) | _shares(scenes.EXERCISES, 0.4) | {"where": 0.2},
    steps=6000,
    rate=1.5e-3,
    batch=12,
)
"""The language model learns to answer about scenes told in words."""

REVISE = Stage(name="revise", kinds={**READ.kinds, "where": 0.5}, steps=1000, rate=1.5e-3, batch=12)
"""It goes over them again, with more of what comes to it last: columns."""

SEE = Stage(name="see", kinds=READ.kinds, steps=1500, rate=2e-3, llm=False, batch=16)
"""Stage 1: tower and projector learn in front of the frozen language model."""

LEARN = {
    miniatures.TARGET: Stage(
        name="learn",
        kinds=_shares(scenes.TARGET_KINDS, 0.6) | _shares(scenes.SHARED_KINDS, 0.4),
        steps=600,
        rate=6e-4,
        batch=16,
        weakest=0.3,
    ),
    miniatures.DONOR: Stage(
        name="learn",
        kinds=_shares(scenes.DONOR_KINDS, 0.6) | _shares(scenes.SHARED_KINDS, 0.4),
        steps=600,
        rate=6e-4,
        batch=16,
        weakest=0.2,
    ),
}
"""Stage 2: all learns; the language model the new kinds, and it rehearses the shared ones.

A miniature forgets a new skill sooner than a large model does when its change is scaled down, so
the change is trained at random strengths: the donor's down to 0.2, the target's down to 0.3.
"""

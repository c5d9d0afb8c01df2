"""Who answers: one model that takes one point's weights after the other. See `ray` for several."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from omnimerge.engine import Parents, merged_tensors
from omnimerge.errors import CheckpointError, GenerationError, LayoutError
from omnimerge.generate import Generator, Prompt, Response
from omnimerge.generate.response import GenerationStats

if TYPE_CHECKING:
    from omnimerge.engine import MergePlan
    from omnimerge.search.space import Point, Space

Answers = list[tuple[int, Response]]
"""(Position among the task's prompts, answer)."""


@dataclass(frozen=True)
class Task:
    """Prompts to be answered at one point.

    Attributes:
        point: the point; None for the target as it is.
        store: a key of the caller's, handed back with the answers.
        prompts: the prompts.
        drafts: the answers at a neighbouring point, one per prompt, to be verified instead of
            decoded; empty for plain decoding.
        along: answers to follow, one per prompt: what is asked for is the model's own next token
            at each of their places.
    """

    point: Point | None
    store: str
    prompts: tuple[Prompt, ...]
    drafts: tuple[Response, ...] = ()
    along: tuple[Response, ...] = ()


@dataclass
class Settings:
    """What every replica needs to know.

    Attributes:
        plan: the merge.
        space: what its points change.
        max_new_tokens: the most tokens of an answer.
        batch_size: the most prompts answered at once; None for as many as seem to fit.
        device: a torch device.
        trust_remote_code: whether code in the target's folder may run.
        replicated: whether other replicas may run on the same machine.
    """

    plan: MergePlan
    space: Space
    max_new_tokens: int
    batch_size: int | None
    device: str
    trust_remote_code: bool = False
    replicated: bool = False


class Executor(Protocol):
    """Carries out tasks, in any order; every answer comes back exactly once."""

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Answers]]:
        """Answer tasks.

        Args:
            tasks: pulled one by one, as soon as there is a model free for the next.

        Returns:
            A task with some of its answers, as they come.
        """

    def alone(self, folder: Path, prompts: Sequence[Prompt]) -> list[Response]:
        """Answer prompts with a checkpoint as it is.

        Args:
            folder: the checkpoint.
            prompts: the prompts.

        Returns:
            One answer per prompt.
        """

    def cost(self) -> Mapping[str, float]:
        """Return what answering took, in counts."""

    def close(self) -> None:
        """Let the models go."""


@dataclass
class Replica:
    """The target, loaded at the first question, holding one point at a time.

    Attributes:
        settings: what to do.
        stats: what answering took.
    """

    settings: Settings
    stats: GenerationStats = field(default_factory=GenerationStats, init=False)
    _generator: Generator | None = field(default=None, init=False)
    _point: Point | None = field(default=None, init=False)
    _parents: Parents | None = field(default=None, init=False)

    def answers(self, task: Task) -> Iterator[Answers]:
        """Answer a task.

        Args:
            task: the task.

        Yields:
            Some of the answers, batch by batch.
        """
        generator = self._at(task.point)
        prompts, longest = list(task.prompts), self.settings.max_new_tokens
        if task.along:
            followed = generator.teacher_forced(prompts, task.along)
            found = zip(prompts, followed, strict=True)
            yield [(i, Response(p.id, "", tokens)) for i, (p, tokens) in enumerate(found)]
            return
        for answer in generator.responses_iter(
            prompts,
            max_new_tokens=longest,
            batch_size=self.settings.batch_size,
            drafts=task.drafts or None,
        ):
            yield [answer]

    def cost(self) -> dict[str, float]:
        """Return what answering took, in counts; nothing where nothing was answered."""
        return {} if self.stats == GenerationStats() else self.stats.to_dict()

    def let_go(self) -> None:
        """Let the model and the parents go; the next question loads them again."""
        self._generator = self._point = self._parents = None

    def _at(self, point: Point | None) -> Generator:
        settings = self.settings
        if point is None and self._point is not None:
            self._generator = self._point = None  # the target's own weights are gone: load them
        if self._generator is None:
            self._generator = Generator.load(
                settings.plan.target.folder,
                device=settings.device,
                trust_remote_code=settings.trust_remote_code,
                stats=self.stats,
            )
        if point is not None and self._point != point:
            self._point = None  # a swap that fails half-way leaves no point
            if self._parents is None:  # once the model has taken what memory it needs
                self._parents = Parents.hold(
                    settings.plan, settings.device, host=not settings.replicated
                )
            parameters, overrides = settings.space.settings(point)
            self._generator.set_weights(
                merged_tensors(settings.plan, parameters, overrides, self._parents)
            )
            self._point = point
        return self._generator


class LocalExecutor:
    """One model in this process, one task after the other.

    Args:
        settings: what to do.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._replica = Replica(settings)

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Answers]]:
        """Answer tasks; see `Executor`.

        Args:
            tasks: the tasks.

        Yields:
            A task with some of its answers.
        """
        for task in tasks:
            for answers in self._replica.answers(task):
                yield task, answers

    def alone(self, folder: Path, prompts: Sequence[Prompt]) -> list[Response]:
        """Answer prompts with a checkpoint as it is; see `Executor`.

        Args:
            folder: the checkpoint.
            prompts: the prompts.

        Returns:
            One answer per prompt.
        """
        self._replica.let_go()  # two models may not fit
        return answer_alone(self._settings, folder, prompts, self._replica.stats)

    def cost(self) -> Mapping[str, float]:
        """Return what answering took, in counts."""
        return self._replica.cost()

    def close(self) -> None:
        """Let the model go."""
        self._replica.let_go()


def answer_alone(
    settings: Settings, folder: Path, prompts: Sequence[Prompt], stats: GenerationStats
) -> list[Response]:
    """Load a checkpoint, answer prompts, and let it go. No code in its folder runs.

    Args:
        settings: lengths, batch size and device.
        folder: the checkpoint.
        prompts: the prompts.
        stats: where to count.

    Returns:
        One answer per prompt.

    Raises:
        GenerationError: if the checkpoint cannot answer them.
    """
    try:
        generator = Generator.load(folder, device=settings.device, stats=stats)
        return generator.responses(
            prompts, max_new_tokens=settings.max_new_tokens, batch_size=settings.batch_size
        )
    except (CheckpointError, LayoutError) as error:
        raise GenerationError(str(error)) from error

"""One search at work: which points are answered when, from what, and into which files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from omnimerge.errors import GenerationError, PromptError
from omnimerge.generate import Prompt, Response, without_answers
from omnimerge.search.criteria import select
from omnimerge.search.executor import Executor, Task
from omnimerge.search.guards import noise_floor
from omnimerge.search.labels import accuracy
from omnimerge.search.result import NoiseFloor
from omnimerge.search.scoring import Scoring
from omnimerge.search.space import Point, Space
from omnimerge.search.store import AnswerStore
from omnimerge.search.study import CHECKS_NAME

if TYPE_CHECKING:
    from omnimerge.engine import MergePlan

Progress = Callable[[str, int, int], None]
"""(Point in words, answers done, answers that this run has to make)."""

RESPONSES, HELDOUT, CHECKS = "responses", "heldout", "checks"


@dataclass
class Session:
    """The state of a search.

    Attributes:
        out: the search's folder.
        executor: who answers.
        scoring: how points are scored.
        asked: the unlabelled prompts.
        labelled: held-out prompts, with their labels.
        store: the answers to `asked`.
        shown: the answers to `labelled`.
        on_progress: called as answers come.
        answers: point -> one response per prompt, as far as the search has come.
        target: the target's own answers, once they are known.
        donor: the first donor's own answers, once they are known.
        noise: what a second run of the chosen point found.
        notes: checks that could not be made, each with the reason.
    """

    out: Path
    executor: Executor
    scoring: Scoring
    asked: Sequence[Prompt]
    labelled: Sequence[Prompt]
    store: AnswerStore
    shown: AnswerStore
    on_progress: Progress | None
    answers: dict[Point, list[Response]] = field(default_factory=dict)
    target: list[Response] | None = None
    donor: list[Response] | None = None
    noise: NoiseFloor | None = None
    notes: list[str] = field(default_factory=list)
    _reference: list[Response] | None = None
    _done: int = 0
    _total: int = 0

    def evaluate(self, space: Space, *, refine: int, trials: int | None, seed: int) -> Space:
        """Answer the prompts at the points of a space.

        Args:
            space: the space.
            refine: how often to add the points half-way to the chosen one's neighbours.
            trials: how many points to try; None for all.
            seed: of the choice of trials.

        Returns:
            The space, with the points that refinement added.
        """
        if trials is not None:
            from omnimerge.search.sampling import sample_points

            sample_points(
                space,
                trials,
                seed,
                choosable=self.scoring.choosable(space),
                answer=lambda points: self.answer(space, points),
                answered=self.answers.keys(),
                score=lambda point: self.scoring.score_at(space, self.answers, point),
            )
        else:
            self.answer(space, space.points)
        for _ in range(refine):
            scores = self.scoring.scores(space, self.answers)
            chosen = select(list(scores), list(scores.values()))
            finer = space.between(list(scores), chosen.point)
            space = space.with_points(finer)
            self.answer(space, finer)
        return space

    def answer(self, space: Space, points: Sequence[Point]) -> None:
        """Answer the prompts at some points; what is on disk is only read.

        Args:
            space: the space.
            points: the points, in the order in which they are wanted.
        """
        if self.scoring.follows and self._reference is None:
            self._reference = self._single(space, None, "target")
        sets = [(RESPONSES, self.store, self.asked)]
        if self.labelled:
            sets.append((HELDOUT, self.shown, without_answers(self.labelled)))
        self._total += sum(
            len(prompts) - len(store.begun(space.file_name(point)))
            for point in points
            for _, store, prompts in sets
            if store.read(space.file_name(point)) is None
        )
        self._run(space, self._tasks(space, points, sets))
        for point in points:
            self.answers[point] = self.store.read(space.file_name(point)) or []

    def check(self, plan: MergePlan, space: Space, chosen: Point, *, ask: bool) -> None:
        """Answer the chosen point a second time, and ask the parents alone.

        Args:
            plan: the merge.
            space: the space.
            chosen: the chosen point.
            ask: whether to ask anything; else only what is known is used.
        """
        if self.scoring.follows:
            self.notes.append(
                "the points followed the target's own answers and gave none: no noise floor, and "
                "no agreement with the parents"
            )
            return
        zero = tuple(0.0 for _ in space.axes)
        if self._is_target(plan, space) and zero in self.answers:
            self.target = self.answers[zero]
        if not ask:
            self.notes.append("checks were left out: no noise floor, and the donor was not asked")
            return
        again = self._single(space, chosen, f"again_{space.file_name(chosen)}")
        self.noise = noise_floor(space.values(chosen), self.answers[chosen], again)
        self.target = self.target or self._single(space, None, "target")
        self.donor = self._donor(plan)

    def accuracy(self, space: Space, point: Point) -> float | None:
        """Return the accuracy on the held-out prompts, for display only.

        Args:
            space: the space.
            point: a point.

        Returns:
            A share in [0, 1]; None where there are no held-out prompts.
        """
        if not self.labelled:
            return None
        return accuracy(self.labelled, self.shown.read(space.file_name(point)) or ())

    def _tasks(
        self,
        space: Space,
        points: Sequence[Point],
        sets: Sequence[tuple[str, AnswerStore, Sequence[Prompt]]],
    ) -> Iterator[Task]:
        """What is missing. Drafts are looked up when a task is pulled, so that they are near."""
        for point in points:
            name = space.file_name(point)
            for key, store, prompts in sets:
                if store.read(name) is not None:
                    continue
                begun = store.begun(name)
                todo = tuple(prompt for prompt in prompts if prompt.id not in begun)
                if not todo:  # stopped between the last answer and the file
                    store.write(name, [begun[i] for i in store.ids])
                    continue
                along = self._along(todo) if key == RESPONSES else ()
                drafts = () if along else self._drafts(space, point, store, todo)
                yield Task(point, key, todo, drafts, along)

    def _run(self, space: Space, tasks: Iterator[Task]) -> None:
        stores = {RESPONSES: self.store, HELDOUT: self.shown}
        begun: dict[tuple[str, str], dict[str, Response]] = {}
        for task, answers in self.executor.run(tasks):
            assert task.point is not None
            store, name = stores[task.store], space.file_name(task.point)
            if (task.store, name) not in begun:
                begun[task.store, name] = store.begun(name)
            here = begun[task.store, name]
            store.append(name, [response for _, response in answers])
            here.update((response.id, response) for _, response in answers)
            if len(here) == len(store.ids):
                store.write(name, [here[i] for i in store.ids])
                del begun[task.store, name]
            self._report(space.label(task.point), len(answers))

    def _single(self, space: Space, point: Point | None, name: str) -> list[Response]:
        """The answers at one point, decoded plainly, kept beside the others."""
        store = AnswerStore(self.out / CHECKS_NAME, [prompt.id for prompt in self.asked])
        if (found := store.read(name)) is not None:
            return found
        begun = store.begun(name)
        todo = tuple(prompt for prompt in self.asked if prompt.id not in begun)
        self._total += len(todo)
        words = "target" if point is None else space.label(point)
        for _, answers in self.executor.run([Task(point, CHECKS, todo)] if todo else []):
            store.append(name, [response for _, response in answers])
            self._report(words, len(answers))
        begun = store.begun(name)
        responses = [begun[i] for i in store.ids]
        store.write(name, responses)
        return responses

    @staticmethod
    def _is_target(plan: MergePlan, space: Space) -> bool:
        """Whether the point of zeros is the target, bit for bit."""
        alphas = all(axis.keyword == "alpha" and not axis.match for axis in space.axes)
        others = any("alpha" in override.parameters for override in plan.recipe.overrides)
        return plan.method.takes_target and alphas and not others

    def _donor(self, plan: MergePlan) -> list[Response] | None:
        donor = plan.models[0]
        if donor.location != str(donor.folder):  # an adapter on a base
            return None
        store = AnswerStore(self.out / CHECKS_NAME, [prompt.id for prompt in self.asked])
        if (found := store.read("donor")) is not None:
            return found
        try:
            answers = self.executor.alone(donor.folder, self.asked)
        except (GenerationError, PromptError) as error:
            self.notes.append(f"the donor alone was not asked: {error}")
            return None
        store.write("donor", answers)
        return answers

    def _drafts(
        self, space: Space, point: Point, store: AnswerStore, todo: Sequence[Prompt]
    ) -> tuple[Response, ...]:
        """The answers of the nearest point that is done."""
        widths = [max(axis.values) - min(axis.values) or 1.0 for axis in space.axes]
        near = sorted(
            space.points,
            key=lambda other: sum(
                abs(a - b) / w for a, b, w in zip(point, other, widths, strict=True)
            ),
        )
        for other in near:
            if other != point and (found := store.read(space.file_name(other))):
                by_id = {response.id: response for response in found}
                return tuple(by_id[prompt.id] for prompt in todo)
        return ()

    def _along(self, todo: Sequence[Prompt]) -> tuple[Response, ...]:
        if self._reference is None:
            return ()
        by_id = {response.id: response for response in self._reference}
        return tuple(by_id[prompt.id] for prompt in todo)

    def _report(self, words: str, count: int) -> None:
        self._done += count
        if self.on_progress is not None:
            self.on_progress(words, self._done, self._total)

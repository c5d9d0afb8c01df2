"""Search a merge's coefficient in memory: merge, answer, compare, choose; no checkpoint is written.

One model is loaded. At every point the merged tensors are computed from the parents and put into it
in place, so that its answers are those of the checkpoint that `omnimerge merge` would write.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omnimerge.engine import build_plan, load_recipe, merged_tensors, with_parameters
from omnimerge.engine.manifest import versions
from omnimerge.errors import PromptError, SearchError, suggestion
from omnimerge.generate import Generator, Prompt, read_prompts, without_answers
from omnimerge.generate import sample as draw
from omnimerge.search.criteria import get_criterion, select
from omnimerge.search.diagnostics import diagnose
from omnimerge.search.grid import parse_grid
from omnimerge.search.inputs import checkpoint_digest, file_sha256, prompts_digest
from omnimerge.search.labels import accuracy
from omnimerge.search.result import Point, PromptSource, SearchResult
from omnimerge.search.store import AnswerStore, write_atomically
from omnimerge.search.study import HELDOUT_NAME, Study

if TYPE_CHECKING:
    from omnimerge.engine import MergePlan, Recipe
    from omnimerge.generate import Response

Progress = Callable[[float, int, int], None]


def search(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    prompts: str | Path,
    out: str | Path,
    *,
    grid: str = "0:0.6:0.1",
    sample: int | None = 100,
    criterion: str = "unanimity",
    max_new_tokens: int = 32,
    batch_size: int = 16,
    heldout: str | Path | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    force: Collection[str] = (),
    on_progress: Progress | None = None,
    seed: int = 0,
    parameter: str = "alpha",
) -> SearchResult:
    """Find the coefficient whose neighbours answer most alike, without labels.

    Writes ``responses/alpha_0.30.jsonl`` and so on as it goes, ``heldout/`` likewise, and at the
    end ``search.json``. The same call again evaluates only what is missing.

    Args:
        recipe: the merge; its own value of `parameter` is not used.
        prompts: JSONL file of prompts. Answers in it are dropped before anything else happens.
        out: folder for responses and result; created if it is not there.
        grid: ``start:stop:step`` with both ends, or a comma list.
        sample: how many prompts to draw; None for all.
        criterion: ``unanimity``, ``pairwise`` or ``backward``.
        max_new_tokens: the most tokens of an answer.
        batch_size: the most prompts answered at once.
        heldout: JSONL file of prompts with answers. Accuracies on it are reported beside the
            scores; the choice is made without them.
        device: a torch device, such as ``cpu`` or ``cuda:0``.
        overwrite: whether answers found in `out` are thrown away.
        force: gates of the mapping to waive (``geometry``, ``ancestor``).
        on_progress: called with (coefficient, answers done, answers that this run has to make).
        seed: seed of the draw of prompts.
        parameter: the method's keyword that is searched.

    Returns:
        The result, as written to ``search.json``.

    Raises:
        SearchError: for a wrong grid, criterion or parameter, or a folder that cannot be used.
        PromptError: for a wrong prompt file, or held-out prompts without answers.
        GenerationError: if the target cannot be loaded, or cannot answer.
        RecipeError: if the recipe is wrong, or a point is out of the parameter's range.
        NotMergeableError: if the checkpoints must not be merged.
    """
    started = time.monotonic()
    prompts, out = Path(prompts), Path(out)
    heldout = None if heldout is None else Path(heldout)
    points = parse_grid(grid)
    score = get_criterion(criterion)
    score([["?"]] * len(points))  # refuses a grid that is too short before anything is loaded
    asked = without_answers(read_prompts(prompts))
    asked = asked if sample is None else draw(asked, sample, seed)
    labelled = _labelled(heldout)
    plan = _plan(recipe, parameter, points, force)
    settings = _settings(plan, asked, parameter, max_new_tokens, device)
    with Study(
        out, settings, [p.id for p in asked], parameter=parameter, overwrite=overwrite
    ) as study:
        answering = _Answering(plan, parameter, device, max_new_tokens, batch_size, on_progress)
        shown = _heldout_store(out, labelled, parameter)
        for store in (study.store, shown):
            answering.total += sum(len(store.ids) for point in points if store.read(point) is None)

        def evaluate(point: float) -> list[Response]:
            if labelled and shown.read(point) is None:
                shown.write(point, answering(point, without_answers(labelled)))
            return answering(point, asked)

        answers = study.run(points, evaluate)
        for point in points if labelled else ():  # held-out prompts that came later
            if shown.read(point) is None:
                shown.write(point, answering(point, without_answers(labelled)))
        texts = [[response.text for response in at_point] for at_point in answers]
        scores = score(texts)
        chosen = select(points, scores)
        result = SearchResult(
            points=tuple(
                Point(
                    alpha=point,
                    score=value,
                    responses=study.store.path(point).relative_to(out).as_posix(),
                    accuracy=accuracy(labelled, shown.read(point) or ()) if labelled else None,
                )
                for point, value in zip(points, scores, strict=True)
            ),
            selected=chosen.point,
            criterion=criterion,
            parameter=parameter,
            tie_set=chosen.tie_set,
            grid=grid,
            prompts=_source(prompts, len(asked), sample, seed),
            heldout=_source(heldout, len(labelled), None, seed) if heldout else None,
            max_new_tokens=max_new_tokens,
            diagnostics=diagnose(points, answers, scores, parameter),
            recipe=plan.recipe.model_dump(mode="json"),
            versions=versions(),
            elapsed_s=round(time.monotonic() - started, 3),
        )
        result.write(out)
    return result


@dataclass
class _Answering:
    """The target, loaded at the first question, holding one coefficient at a time."""

    plan: MergePlan
    parameter: str
    device: str
    max_new_tokens: int
    batch_size: int
    on_progress: Progress | None
    total: int = 0
    done: int = 0
    _generator: Generator | None = field(default=None, init=False)
    _point: float | None = field(default=None, init=False)

    def __call__(self, point: float, prompts: Sequence[Prompt]) -> list[Response]:
        before = self.done

        def report(answered: int, _of: int) -> None:
            self.done = before + answered
            if self.on_progress is not None:
                self.on_progress(point, self.done, self.total)

        return self._at(point).responses(
            prompts,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            on_progress=report,
        )

    def _at(self, point: float) -> Generator:
        if self._generator is None:
            self._generator = Generator.load(self.plan.target.folder, device=self.device)
        if self._point != point:
            self._point = None  # a swap that fails half-way leaves no coefficient
            self._generator.set_weights(merged_tensors(self.plan, {self.parameter: point}))
            self._point = point
        return self._generator


def _plan(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    parameter: str,
    points: Sequence[float],
    force: Collection[str],
) -> MergePlan:
    """The plan of the merge, after checking that every point is legal."""
    loaded = load_recipe(recipe, defaults={parameter: points[0]})
    numbers = [
        p.name for p in loaded.merge_method.params if p.kind in (int, float) and not p.per_model
    ]
    if parameter not in numbers:
        raise SearchError(
            f"{loaded.method} has no numeric parameter {parameter!r}"
            f"{suggestion(parameter, numbers)}; it has: {', '.join(numbers) or 'none'}"
        )
    plan = build_plan(loaded, force=force)
    for point in points:
        with_parameters(plan, {parameter: point})
    return plan


def _settings(
    plan: MergePlan, asked: Sequence[Prompt], parameter: str, max_new_tokens: int, device: str
) -> dict[str, Any]:
    """Everything that an answer depends on; names of places are left out."""
    recipe = plan.recipe.model_dump(mode="json", exclude={"max_shard_size"})
    recipe["parameters"].pop(parameter, None)
    for entry in (recipe, *recipe["models"]):
        for place in ("target", "base", "model"):
            entry.pop(place, None)
    return {
        "recipe": recipe,
        "forced": list(plan.forced),
        "target": checkpoint_digest(plan.target, whole=True),
        "models": [checkpoint_digest(model) for model in plan.models],
        "base": checkpoint_digest(plan.base) if plan.base else None,
        "prompts": prompts_digest(asked),
        "max_new_tokens": max_new_tokens,
        "device": device.partition(":")[0],
    }


def _labelled(heldout: Path | None) -> list[Prompt]:
    if heldout is None:
        return []
    labelled = [prompt for prompt in read_prompts(heldout) if prompt.answer is not None]
    if not labelled:
        raise PromptError(f"{heldout}: no line has an 'answer'; held-out prompts need them")
    return labelled


def _heldout_store(out: Path, labelled: Sequence[Prompt], parameter: str) -> AnswerStore:
    """The answers to the held-out prompts; those to other prompts are thrown away."""
    store = AnswerStore(out / HELDOUT_NAME, [prompt.id for prompt in labelled], parameter)
    if labelled:
        note = store.folder / "prompts.json"
        text = json.dumps({"prompts": prompts_digest(labelled)}) + "\n"
        if not note.is_file() or note.read_text(encoding="utf-8") != text:
            store.clear()
            write_atomically(note, text)
    return store


def _source(file: Path, count: int, sample: int | None, seed: int) -> PromptSource:
    return PromptSource(
        file=str(file), sha256=file_sha256(file), count=count, sample=sample, seed=seed
    )

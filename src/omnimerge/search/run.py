"""Search a merge's coefficients in memory: merge, answer, compare, choose; nothing else is written.

One model is loaded. At every point the merged tensors are computed from the parents and put into it
in place, so that its answers are those of the checkpoint that `omnimerge merge` would write.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from omnimerge.engine import build_plan, load_recipe, with_parameters
from omnimerge.engine.manifest import versions
from omnimerge.errors import PromptError, RecipeError, SearchError, suggestion
from omnimerge.generate import Prompt, read_prompts, without_answers
from omnimerge.generate import sample as draw
from omnimerge.search.criteria import select
from omnimerge.search.executor import Executor, LocalExecutor, Settings
from omnimerge.search.guards import diagnose, resampled
from omnimerge.search.inputs import checkpoint_digest, file_sha256, prompts_digest
from omnimerge.search.result import AxisInfo, Point, PromptSource, SearchResult
from omnimerge.search.scoring import Scoring
from omnimerge.search.session import Progress, Session
from omnimerge.search.space import Point as Coordinates
from omnimerge.search.space import Space
from omnimerge.search.store import AnswerStore, write_atomically
from omnimerge.search.study import HELDOUT_NAME, MEDIA_NAME, Study, refuse_foreign

if TYPE_CHECKING:
    from omnimerge.engine import MergePlan, Recipe

CHOSEN_NAME = "recipe.yaml"
MAPPING_NAME = "mapping.json"
EXECUTORS = ("local", "ray")


def search(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    prompts: str | Path,
    out: str | Path,
    *,
    grid: str | Sequence[str] = "0:0.6:0.1",
    shares: str | None = None,
    refine: int = 0,
    trials: int | None = None,
    sample: int | None = 100,
    criterion: str = "unanimity",
    distance: str = "exact",
    per_step: bool | None = None,
    max_new_tokens: int = 32,
    batch_size: int | None = None,
    heldout: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    device: str = "cpu",
    executor: str = "local",
    checks: bool = True,
    overwrite: bool = False,
    force: Collection[str] = (),
    trust_remote_code: bool = False,
    on_progress: Progress | None = None,
    seed: int = 0,
    parameter: str = "alpha",
) -> SearchResult:
    """Find the coefficients whose neighbours answer most alike, without labels.

    Writes every answer as it comes (``responses/alpha_0.30.jsonl`` and so on), and at the end
    ``search.json`` and ``recipe.yaml``, the recipe with what was chosen. The same call again
    answers only what is missing.

    Args:
        recipe: the merge; its own values of what is searched are not used.
        prompts: prompts, as `read_prompts` takes them. Answers in them are dropped before anything
            else happens.
        out: folder for responses and result; created if it is not there.
        grid: the values of `parameter` (``start:stop:step`` with both ends, or a comma list), or
            several axes: ``density=0.2,0.5``, ``alpha@layers:0-13=0:0.6:0.2``. Their product is
            searched.
        shares: instead of `grid`, the grid of each donor's share, where there are several:
            θ = (1 - Σ αᵢ) · target + Σ αᵢ · donorᵢ; no sum goes beyond its end.
        refine: how often to add the points half-way to the chosen one's neighbours.
        trials: how many points to try of a space that is too large for all, chosen by Optuna.
        sample: how many prompts to draw; None for all.
        criterion: ``unanimity``, ``pairwise`` or ``backward``.
        distance: how two answers are compared: ``exact``, ``normalized``, ``edit``,
            ``embedding:PATH``, or ``tokens`` (the model's next tokens along the first point's
            answers: one pass for each point, no decoding).
        per_step: whether distances are divided by the step; None: where steps are not equal.
        max_new_tokens: the most tokens of an answer.
        batch_size: the most prompts answered at once; None to find it from memory.
        heldout: prompts with answers. Accuracies on them are reported beside the scores; the
            choice is made without them.
        columns: which columns of a data set are the id, the prompt, the image ...
        device: a torch device, such as ``cpu`` or ``cuda:0``.
        executor: ``local``, or ``ray`` for one model per GPU of a Ray cluster.
        checks: whether to answer the chosen point twice (noise floor), and to ask the donor alone.
        overwrite: whether answers found in `out` are thrown away.
        force: gates of the mapping to waive.
        trust_remote_code: whether Python code in the target's folder may run.
        on_progress: called with (point, answers done, answers that this run has to make).
        seed: seed of the draw of prompts, and of Optuna's choices.
        parameter: the keyword of an axis that names none.

    Returns:
        The result, as written to ``search.json``.

    Raises:
        SearchError: for a wrong grid, criterion or parameter, or a folder that cannot be used.
        PromptError: for a wrong prompt file, or held-out prompts without answers.
        GenerationError: if the target cannot be loaded, or cannot answer.
        RecipeError: if the recipe is wrong, or a point is out of a parameter's range.
        NotMergeableError: if the checkpoints must not be merged.
    """
    started = time.monotonic()
    prompts, out = Path(prompts), Path(out)
    heldout = None if heldout is None else Path(heldout)
    if executor not in EXECUTORS:
        hint = suggestion(executor, EXECUTORS)
        raise SearchError(f"unknown executor {executor!r}{hint}; known: {', '.join(EXECUTORS)}")
    loaded, space = space_of(recipe, grid, shares, parameter)
    scoring = Scoring.of(criterion, distance, per_step)
    scoring.check(space, refine=refine, trials=trials)
    if not overwrite:
        refuse_foreign(out)
    media = out / MEDIA_NAME
    asked = without_answers(read_prompts(prompts, columns=columns, media=media))
    asked = asked if sample is None else draw(asked, sample, seed)
    labelled = _labelled(heldout, columns, media)
    plan = plan_of(loaded, space, force)
    settings = _settings(plan, space, asked, max_new_tokens, device, scoring)
    with Study(out, settings, [p.id for p in asked], overwrite=overwrite) as study:
        answering = Settings(plan, space, max_new_tokens, batch_size, device, trust_remote_code)
        session = Session(
            out,
            _executor(executor, answering),
            scoring,
            asked,
            labelled,
            study.store,
            _heldout_store(out, labelled),
            on_progress,
        )
        try:
            space = session.evaluate(space, refine=refine, trials=trials, seed=seed)
            scores = scoring.scores(space, session.answers)
            chosen = select(list(scores), list(scores.values()))
            if checks:
                session.check(plan, space, chosen.point)
            cost = dict(session.executor.cost())
        finally:
            session.executor.close()
        points = list(scores)
        values = [space.values(point) for point in points]
        answers = [session.answers[point] for point in points]
        result = SearchResult(
            points=tuple(
                Point(
                    values=space.values(point),
                    score=score,
                    responses=study.store.path(space.file_name(point)).relative_to(out).as_posix(),
                    accuracy=session.accuracy(space, point),
                )
                for point, score in scores.items()
            ),
            selected=space.values(chosen.point),
            criterion=criterion,
            distance=distance,
            per_step=scoring.divides(space, points),
            axes=tuple(
                AxisInfo(name=axis.name, grid=tuple(sorted({point[i] for point in points})))
                for i, axis in enumerate(space.axes)
            ),
            tie_set=tuple(space.values(point) for point in chosen.tie_set),
            grid=space.text,
            prompts=_source(prompts, len(asked), sample, seed),
            heldout=_source(heldout, len(labelled), None, seed) if heldout else None,
            max_new_tokens=max_new_tokens,
            diagnostics=diagnose(
                values,
                answers,
                list(scores.values()),
                target=session.target,
                donor=session.donor,
                noise=session.noise,
                bootstrap=resampled(values, scoring.texts(answers), scoring.bound(space, points)),
                notes=session.notes,
            ),
            recipe=plan.recipe.model_dump(mode="json"),
            cost=cost,
            versions=versions(),
            elapsed_s=round(time.monotonic() - started, 3),
        )
        _write_recipe(plan, space, chosen.point, out)
        mapping = json.dumps(plan.alignments[0].to_dict(force), ensure_ascii=False)
        write_atomically(out / MAPPING_NAME, mapping + "\n")
        result.write(out)
    return result


def space_of(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    grid: str | Sequence[str],
    shares: str | None,
    parameter: str,
) -> tuple[Recipe, Space]:
    """Read a recipe and the axes along which it is to be varied.

    Args:
        recipe: the merge.
        grid: the axes, as `search` takes them.
        shares: the grid of several donors' shares, instead.
        parameter: the keyword of an axis that names none.

    Returns:
        The recipe, with a value for what is searched where it has none, and the space.

    Raises:
        SearchError: if the axes are wrong, or shares are given of one donor.
        RecipeError: if the recipe is wrong.
    """
    texts = [shares] if shares else [grid] if isinstance(grid, str) else list(grid)
    space = Space.of(texts, parameter)
    loaded = load_recipe(recipe, defaults={axis.keyword: axis.values[0] for axis in space.axes})
    if shares is None:
        return loaded, space
    if not loaded.merge_method.takes_target or len(loaded.models) < 2:
        raise SearchError(
            f"shares are of several donors, of a method such as adamms; the recipe has "
            f"{len(loaded.models)} model(s) and the method {loaded.method}; use a grid"
        )
    return loaded, Space.simplex(shares, len(loaded.models))


def plan_of(recipe: Recipe, space: Space, force: Collection[str]) -> MergePlan:
    """Plan a merge, after checking that every point of a space is legal.

    Args:
        recipe: the merge.
        space: its points.
        force: gates of the mapping to waive.

    Returns:
        The plan.

    Raises:
        SearchError: if an axis is no numeric keyword of the method.
        RecipeError: if a point is out of a keyword's range, or an axis fits no tensor.
    """
    numbers = [
        p.name for p in recipe.merge_method.params if p.kind in (int, float) and not p.per_model
    ]
    for axis in space.axes:
        if axis.keyword not in numbers:
            raise SearchError(
                f"{recipe.method} has no numeric parameter {axis.keyword!r}"
                f"{suggestion(axis.keyword, numbers)}; it has: {', '.join(numbers) or 'none'}"
            )
    plan = build_plan(recipe, force=force)
    problems: dict[str, None] = {}
    for point in space.points:
        try:
            with_parameters(plan, *space.settings(point))
        except RecipeError as error:
            problems.update(dict.fromkeys(error.problems))
    if problems:
        raise RecipeError(list(problems), "the search")
    return plan


def _settings(
    plan: MergePlan,
    space: Space,
    asked: Sequence[Prompt],
    max_new_tokens: int,
    device: str,
    scoring: Scoring,
) -> dict[str, Any]:
    """Everything that an answer depends on; names of places are left out."""
    recipe = plan.recipe.model_dump(mode="json", exclude={"max_shard_size"})
    for axis in space.axes:
        if not axis.match:
            recipe["parameters"].pop(axis.keyword, None)
        if axis.donor is not None:
            recipe["parameters"].pop("weights", None)
    for entry in (recipe, *recipe["models"]):
        for place in ("target", "base", "model"):
            entry.pop(place, None)
        if any(axis.donor is not None for axis in space.axes):
            entry.pop("weight", None)
    return {
        "recipe": recipe,
        "forced": list(plan.forced),
        "target": checkpoint_digest(plan.target, whole=True),
        "models": [checkpoint_digest(model) for model in plan.models],
        "base": checkpoint_digest(plan.base) if plan.base else None,
        "prompts": prompts_digest(asked),
        "max_new_tokens": max_new_tokens,
        "answers": "followed" if scoring.follows else "decoded",
        "device": device.partition(":")[0],
    }


def _executor(name: str, settings: Settings) -> Executor:
    if name == "local":
        return LocalExecutor(settings)
    from omnimerge.search.ray import RayExecutor

    return RayExecutor(settings)


def _labelled(heldout: Path | None, columns: Mapping[str, str] | None, media: Path) -> list[Prompt]:
    if heldout is None:
        return []
    found = read_prompts(heldout, columns=columns, media=media, labels=True)
    labelled = [prompt for prompt in found if prompt.answer is not None]
    if not labelled:
        raise PromptError(f"{heldout}: no line has an 'answer'; held-out prompts need them")
    return labelled


def _heldout_store(out: Path, labelled: Sequence[Prompt]) -> AnswerStore:
    """The answers to the held-out prompts; those to other prompts are thrown away."""
    store = AnswerStore(out / HELDOUT_NAME, [prompt.id for prompt in labelled])
    if labelled:
        note = store.folder / "prompts.json"
        text = json.dumps({"prompts": prompts_digest(labelled)}) + "\n"
        if not note.is_file() or note.read_text(encoding="utf-8") != text:
            store.clear()
            write_atomically(note, text)
    return store


def _write_recipe(plan: MergePlan, space: Space, chosen: Coordinates, out: Path) -> None:
    """The recipe with what was chosen, for `omnimerge merge`."""
    recipe = with_parameters(plan, *space.settings(chosen)).recipe
    content = recipe.model_dump(mode="json", exclude_defaults=True)
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    write_atomically(out / CHOSEN_NAME, f"# Chosen by `omnimerge search`, without labels.\n{text}")


def _source(file: Path, count: int, sample: int | None, seed: int) -> PromptSource:
    digest = file_sha256(file) if file.is_file() else ""
    return PromptSource(file=str(file), sha256=digest, count=count, sample=sample, seed=seed)

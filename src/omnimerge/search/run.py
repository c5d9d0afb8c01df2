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

from omnimerge.engine import with_parameters
from omnimerge.engine.manifest import pin, versions
from omnimerge.errors import PromptError, SearchError, suggestion
from omnimerge.generate import Prompt, read_prompts, without_answers
from omnimerge.generate import sample as draw
from omnimerge.generate.loading import check_device
from omnimerge.search.criteria import select
from omnimerge.search.executor import Executor, LocalExecutor, Settings
from omnimerge.search.guards import diagnose, resampled
from omnimerge.search.inputs import file_sha256, prompts_digest
from omnimerge.search.planning import merge_settings, overridden, plan_of, space_of
from omnimerge.search.result import AxisInfo, Point, PromptSource, SearchResult
from omnimerge.search.scoring import Scoring
from omnimerge.search.session import Progress, Session
from omnimerge.search.space import Point as Coordinates
from omnimerge.search.space import Space
from omnimerge.search.store import AnswerStore, write_atomically
from omnimerge.search.study import (
    CHOSEN_NAME,
    HELDOUT_NAME,
    MAPPING_NAME,
    MEDIA_NAME,
    SETTINGS_NAME,
    Study,
    refuse_foreign,
)

if TYPE_CHECKING:
    from omnimerge.engine import MergePlan, Recipe

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
        recipe: the merge; its own values of what is searched are not used, except those that its
            overrides set for some tensors, which stay.
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
            ``embedding:PATH``, or ``tokens`` (the model's next tokens along the target's own
            answers: one pass for each point, no decoding).
        per_step: whether distances are divided by the step; None: where steps are not equal.
        max_new_tokens: the most tokens of an answer.
        batch_size: the most prompts answered at once, of as many as seem to fit; None for 64. What
            does not fit into memory after all is halved.
        heldout: prompts with answers. Accuracies on them are reported beside the scores; the
            choice is made without them.
        columns: which columns of a data set are the id, the prompt, the image ...
        device: a torch device, such as ``cpu`` or ``cuda:0``.
        executor: ``local``, or ``ray`` for one model per GPU of a Ray cluster.
        checks: whether to answer the chosen point twice (noise floor), and to ask the donor alone.
        overwrite: whether answers found in `out` are thrown away.
        force: gates of the mapping to waive.
        trust_remote_code: whether Python code in the target's folder may run; the donor's never
            does.
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
    _check_machine(executor, device, out)
    loaded, space = space_of(recipe, grid, shares, parameter)
    scoring = Scoring.of(criterion, distance, per_step)
    scoring.check(space, refine=refine, trials=trials)
    if not overwrite:
        refuse_foreign(out)
    media = out / MEDIA_NAME
    asked = without_answers(read_prompts(prompts, columns=columns, media=media))
    asked = asked if sample is None else draw(asked, sample, seed)
    labelled = _labelled(heldout, columns, media)
    plan, space = plan_of(loaded, space, force)
    settings = _settings(plan, space, asked, max_new_tokens, device, scoring)
    ids, used = [p.id for p in asked], versions()
    with Study(out, settings, ids, versions=used, overwrite=overwrite) as study:
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
            session.check(plan, space, chosen.point, ask=checks)
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
            per_step=scoring.divides(space),
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
                texts=scoring.texts(answers) if scoring.follows else None,
                ceilings=scoring.ceilings(space, points),
                target=session.target,
                donor=session.donor,
                noise=session.noise,
                bootstrap=resampled(values, scoring.texts(answers), scoring.bound(space, points)),
                notes=[*study.notes, *_notes(plan, space, scoring, cost), *session.notes],
            ),
            recipe=plan.recipe.model_dump(mode="json"),
            cost=cost,
            versions=used,
            elapsed_s=round(time.monotonic() - started, 3),
        )
        _write_recipe(plan, space, chosen.point, out)
        mapping = json.dumps(plan.alignments[0].to_dict(force), ensure_ascii=False)
        write_atomically(out / MAPPING_NAME, mapping + "\n")
        result.write(out)
    return result


def _settings(
    plan: MergePlan,
    space: Space,
    asked: Sequence[Prompt],
    max_new_tokens: int,
    device: str,
    scoring: Scoring,
) -> dict[str, Any]:
    """Everything that an answer depends on."""
    return {
        **merge_settings(plan, space),
        "prompts": prompts_digest(asked),
        "max_new_tokens": max_new_tokens,
        "answers": "along the target's" if scoring.follows else "decoded",
        "device": device.partition(":")[0],
    }


def _notes(plan: MergePlan, space: Space, scoring: Scoring, cost: Mapping[str, float]) -> list[str]:
    """What the reader of a result should know of how it was made."""
    notes = overridden(plan, space)
    if scoring.divides(space):
        notes.append("distances are divided by the step between the points")
    if cost.get("drafts_in_16_bits"):
        notes.append(
            "drafts were verified in a 16-bit type, in which an answer may differ from plain "
            "decoding's where two tokens are about equally probable"
        )
    return notes


def _check_machine(executor: str, device: str, out: Path) -> None:
    if executor not in EXECUTORS:
        hint = suggestion(executor, EXECUTORS)
        raise SearchError(f"unknown executor {executor!r}{hint}; known: {', '.join(EXECUTORS)}")
    # Machines of a cluster have devices of their own; and what was answered on a device that is not
    # here can be chosen from again.
    if executor == "local" and not (out / SETTINGS_NAME).exists():
        check_device(device)


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
    once = [each for n, each in enumerate(recipe.overrides) if each not in recipe.overrides[:n]]
    recipe = recipe.model_copy(update={"overrides": tuple(once)})
    content = pin(recipe.model_dump(mode="json", exclude_defaults=True), plan)
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    write_atomically(out / CHOSEN_NAME, f"# Chosen by `omnimerge search`, without labels.\n{text}")


def _source(file: Path, count: int, sample: int | None, seed: int) -> PromptSource:
    digest = file_sha256(file) if file.is_file() else ""
    return PromptSource(file=str(file), sha256=digest, count=count, sample=sample, seed=seed)

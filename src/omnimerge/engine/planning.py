"""From a recipe to a plan: one job per output tensor, known before a weight is read."""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from omnimerge.arch import (
    GATES,
    Alignment,
    Layout,
    Merged,
    SlotMap,
    align,
    check_used,
    component,
    find_names,
    layer_index,
    read_all_layouts,
    slots_of,
    slots_of_all,
)
from omnimerge.arch.layout import is_buffer
from omnimerge.checkpoint import (
    AdaptedCheckpoint,
    Adapter,
    Checkpoint,
    OutputTensor,
    TensorMeta,
    unresolved,
)
from omnimerge.checkpoint.dtypes import OUTPUT_DTYPES, is_floating, is_known
from omnimerge.checkpoint.shard import shard_by_size
from omnimerge.engine.plan import MergePlan, TensorJob
from omnimerge.engine.recipe import Override, Recipe
from omnimerge.errors import CheckpointError, NotMergeableError, RecipeError, suggestion


@contextmanager
def _no_collection() -> Iterator[None]:
    """Plans are made of very many objects, and no cycles: to look for some takes a third longer."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_no_collection()
def build_plan(recipe: Recipe, *, force: Collection[str] = (), ancestor: bool = True) -> MergePlan:
    """Plan a merge: open all checkpoints, align them, decide every tensor.

    Args:
        recipe: what to do.
        force: names of gates to waive; see `GATES`.
        ancestor: whether to run the ancestor test, the only step that reads tensor data.

    Returns:
        The plan.

    Raises:
        RecipeError: if checkpoints cannot be opened; all problems at once.
        NotMergeableError: if a gate refuses; all reasons at once.
    """
    check_gates(force)
    opened = _open_all(recipe)
    target = opened[recipe.target_reference]
    models = _with_adapters(recipe, opened)
    base = opened[recipe.base] if recipe.base else None
    donors = [*models, *([base] if base and recipe.merge_method.needs_base else [])]
    layouts = read_all_layouts(recipe.layouts)
    found, notes = slots_of_all([target, *donors], layouts)
    check_used(layouts, found.values())
    alignments = tuple(
        align(
            target,
            donor,
            select=recipe.selection,
            vocabulary=recipe.vocabulary,
            branches=recipe.branches.policy() if recipe.branches else None,
            slots=(found[target], found[donor]),
            ancestor=ancestor and donor is not target,
        )
        for donor in donors
    )
    alignments[0].notes.extend(notes)
    reasons = [f"{a.donor.reference}: {why}" for a in alignments for why in a.reasons(force)]
    if reasons:
        raise NotMergeableError(list(dict.fromkeys(reasons)))
    slots = alignments[0].target_slots
    _check_overrides(recipe, slots)
    jobs = tuple(_jobs(recipe, target, slots, alignments))
    if not any(job.merged for job in jobs):
        raise NotMergeableError(["no tensor would be merged; look at `omnimerge map`"])
    shards = _shards(recipe, target, jobs)
    return MergePlan(recipe, target, models, base, alignments, jobs, shards, tuple(sorted(force)))


def with_parameters(
    plan: MergePlan, parameters: Mapping[str, Any], overrides: Sequence[Mapping[str, Any]] = ()
) -> MergePlan:
    """Return the same plan with other keywords of the method; nothing is opened again.

    Args:
        plan: a plan.
        parameters: keywords to set; overrides of the recipe still win for their tensors.
        overrides: entries to put before the recipe's own overrides; they may not change which
            tensors are kept.

    Returns:
        The new plan.

    Raises:
        RecipeError: if a keyword does not fit the method, or an override fits no tensor.
    """
    count = plan.recipe.model_count()
    changed = {**plan.recipe.parameters, **parameters}
    entries = list(plan.recipe.models)
    if "weights" in parameters:  # given with the point: entries of the models would contradict it
        entries = [entry.model_copy(update={"weight": None}) for entry in entries]
    recipe = plan.recipe.model_copy(update={"parameters": changed, "models": tuple(entries)})
    problems = [f"parameters.{p}" for p in plan.method.problems(recipe.all_parameters, count)]
    added = tuple(_added(number, each) for number, each in enumerate(overrides))
    for number, each in enumerate(added):
        found = plan.method.problems({**recipe.all_parameters, **each.parameters}, count)
        problems += [f"overrides.{number}.parameters.{problem}" for problem in found]
    if problems:
        raise RecipeError(list(dict.fromkeys(problems)))
    if added:
        recipe = recipe.model_copy(update={"overrides": (*added, *recipe.overrides)})
        _check_overrides(recipe, plan.alignments[0].target_slots)
    jobs = tuple(
        replace(job, parameters=_parameters(recipe, job.output.name, job.slot)) for job in plan.jobs
    )
    return replace(plan, recipe=recipe, jobs=jobs)


def _added(number: int, raw: Mapping[str, Any]) -> Override:
    try:
        return Override.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(
            [
                f"overrides.{'.'.join(map(str, (number, *each['loc'])))}: "
                + each["msg"].removeprefix("Value error, ")
                for each in error.errors()
            ]
        ) from None


def check_gates(force: Collection[str]) -> None:
    """Refuse names of gates that do not exist.

    Args:
        force: what the caller wants to waive.

    Raises:
        RecipeError: if one is no gate, or a text was given instead of a list.
    """
    names = [force] if isinstance(force, str) else list(force)
    wrong = [
        f"force: {name!r} is no gate{suggestion(name, GATES)}"
        for name in names
        if name not in GATES
    ]
    if isinstance(force, str):
        wrong.append("force: give a list of gates")
    if wrong:
        raise RecipeError([*wrong, f"gates: {', '.join(GATES)}"], "the call")


def _check_overrides(recipe: Recipe, slots: SlotMap) -> None:
    for number, override in enumerate(recipe.overrides):
        fits = any(
            override.match.fits(name, slot, component(slot), layer_index(slot))
            for name, slot in slots.by_name.items()
        )
        if not fits:
            raise RecipeError([f"overrides.{number}.match: fits no tensor of the target"])


def _open_all(recipe: Recipe) -> dict[str, Checkpoint]:
    references = [recipe.target_reference, *([recipe.base] if recipe.base else [])]
    references += [recipe.model_reference(entry) for entry in recipe.models]
    opened: dict[str, Checkpoint] = {}
    by_folder: dict[Path, Checkpoint] = {}
    problems: list[str] = []
    for reference in dict.fromkeys(references):
        try:
            checkpoint = Checkpoint.open(reference)
        except CheckpointError as error:
            problems.append(str(error))
        else:
            opened[reference] = by_folder.setdefault(checkpoint.folder.resolve(), checkpoint)
    if len(problems) == 1:
        raise CheckpointError(problems[0])
    if problems:
        raise RecipeError(problems)
    return opened


def _with_adapters(recipe: Recipe, opened: Mapping[str, Checkpoint]) -> tuple[Checkpoint, ...]:
    models: list[Checkpoint] = []
    problems: list[str] = []
    for entry in recipe.models:
        checkpoint = opened[recipe.model_reference(entry)]
        if entry.adapter is None:
            models.append(checkpoint)
            continue
        try:
            models.append(adapted(checkpoint, entry.adapter, read_all_layouts(recipe.layouts)))
        except CheckpointError as error:
            problems.append(str(error))
    if len(problems) == 1:
        raise CheckpointError(problems[0])
    if problems:
        raise RecipeError(problems)
    return tuple(models)


def adapted(
    base: Checkpoint, reference: str | Path, layouts: Sequence[Layout] = ()
) -> AdaptedCheckpoint:
    """Open a PEFT adapter on top of a checkpoint.

    Args:
        base: the checkpoint that it was made for.
        reference: the adapter's folder or Hub id.
        layouts: layouts that the user gave.

    Returns:
        The checkpoint with the adapter's changes.

    Raises:
        CheckpointError: if the adapter cannot be read or does not fit.
    """
    adapter = Adapter.open(reference)
    names = find_names(adapter.changes, slots_of(base, layouts))
    missing = [name for name in adapter.changes if name not in names]
    if missing:
        raise unresolved(adapter, missing, base.tensors)
    return AdaptedCheckpoint(base, adapter, names)


def _jobs(
    recipe: Recipe, target: Checkpoint, slots: SlotMap, alignments: tuple[Alignment, ...]
) -> list[TensorJob]:
    by_target = [{m.target: m for m in a.merged} for a in alignments]
    jobs = []
    for name, meta in target.tensors.items():
        slot = slots.by_name[name]
        override = _override(recipe, name, slot)
        reason = "override: keep target" if override and override.keep else ""
        lacking = [a for a, found in zip(alignments, by_target, strict=True) if name not in found]
        # A donor that does not reach a tensor leaves it as it is (AdaMMS, Equation 2), whatever
        # other donors do; with task vectors, every model and the base have to have it.
        enough = recipe.merge_method.takes_target and len(lacking) < len(alignments)
        if not reason and lacking and not enough:
            reason = lacking[0].kept[name]
            if len(alignments) > 1:
                reason += f" ({lacking[0].donor.reference})"
        inputs: list[tuple[Checkpoint, str]] = []
        mapped: tuple[Merged, ...] = ()
        if not reason:
            mapped = tuple(found[name] for found in by_target if name in found)
            inputs = [
                a.source(found[name]) if name in found else (target, name)
                for a, found in zip(alignments, by_target, strict=True)
            ]
        base = inputs.pop() if inputs and recipe.merge_method.needs_base else None
        if inputs and recipe.merge_method.takes_target:
            inputs.insert(0, (target, name))
        dtype = _output_dtype(recipe, meta)
        output = OutputTensor(name, dtype, meta.shape)
        parameters = _parameters(recipe, name, slot)
        layer = layer_index(slot)
        depth = None if layer is None else layer / max(1, slots.layer_count - 1)
        # What no donor reaches stays the target's; with task vectors, what any input lacks.
        runs = [merged.own for merged in mapped]
        whole = recipe.merge_method.takes_target and lacking  # the target stands in for those
        common = _common if recipe.merge_method.takes_target else _union
        own = common([*runs, [(0, meta.numel)]] if whole else runs)
        jobs.append(
            TensorJob(output, slot, tuple(inputs), base, parameters, depth, reason, mapped, own)
        )
    return jobs


def _union(runs: Sequence[Sequence[tuple[int, int]]]) -> tuple[tuple[int, int], ...]:
    """Ranges that are in any of several lists, joined."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted(run for each in runs for run in each):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(stop, found[-1][1])
        else:
            found.append((start, stop))
    return tuple(found)


def _common(runs: Sequence[Sequence[tuple[int, int]]]) -> tuple[tuple[int, int], ...]:
    """Ranges that are in all of several lists."""
    if not runs:
        return ()
    found = list(_union(runs[:1]))
    for each in runs[1:]:
        other = _union([each])
        found = [
            (max(a, c), min(b, d)) for a, b in found for c, d in other if max(a, c) < min(b, d)
        ]
    return tuple(found)


def _override(recipe: Recipe, name: str, slot: str) -> Any:
    for override in recipe.overrides:
        if override.match.fits(name, slot, component(slot), layer_index(slot)):
            return override
    return None


def _parameters(recipe: Recipe, name: str, slot: str) -> dict[str, Any]:
    override = _override(recipe, name, slot)
    return {**recipe.all_parameters, **(override.parameters if override else {})}


def _output_dtype(recipe: Recipe, meta: TensorMeta) -> str:
    stored = meta.dtype
    if recipe.dtype == "auto" or not is_known(stored) or not is_floating(stored):
        return stored
    # 8 bits store matrices: the few numbers of norms and biases are worth more.
    as_it_is = is_buffer(meta.name) or (recipe.stores_float8 and len(meta.shape) < 2)
    return stored if as_it_is else OUTPUT_DTYPES[recipe.dtype]


def _shards(
    recipe: Recipe, target: Checkpoint, jobs: tuple[TensorJob, ...]
) -> tuple[tuple[OutputTensor, ...], ...]:
    """The target's own shards where they fit the limit, else new ones."""
    by_file: dict[Path, list[OutputTensor]] = {}
    for job in jobs:
        by_file.setdefault(target.tensors[job.output.name].file, []).append(job.output)
    limit = recipe.max_shard_size
    if all(sum(t.nbytes for t in tensors) <= limit for tensors in by_file.values()):
        return tuple(tuple(tensors) for tensors in by_file.values())
    return tuple(tuple(s) for s in shard_by_size([job.output for job in jobs], limit))

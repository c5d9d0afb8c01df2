"""From a recipe to a plan: parts, tokens, and what becomes of every tensor of every model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from omnimerge.arch import component
from omnimerge.checkpoint import Checkpoint, OutputTensor
from omnimerge.checkpoint.dtypes import OUTPUT_DTYPES, is_floating, is_known
from omnimerge.checkpoint.shard import shard_by_size
from omnimerge.compose.check import check_loads
from omnimerge.compose.configuration import OmniConfig
from omnimerge.compose.names import HEAD, TEXT_PREFIX
from omnimerge.compose.outcome import describe, processor_of
from omnimerge.compose.parts import PartPlan, choose, place
from omnimerge.compose.processing import OmniProcessor
from omnimerge.compose.recipe import ComposeRecipe
from omnimerge.compose.source import Source, check_head
from omnimerge.compose.vocabulary import bring, load_tokenizer
from omnimerge.engine import MergePlan, TensorJob
from omnimerge.engine import build_plan as build_merge_plan
from omnimerge.errors import CheckpointError, NotMergeableError, RecipeError

_EMBED_SLOT, _HEAD_SLOT = "llm.embed.weight", "llm.head.weight"


@dataclass(frozen=True)
class ComposePlan:
    """What a composition will do.

    Attributes:
        recipe: the recipe.
        merge: the merge of the language models; its jobs are those of the language model alone.
        names: target's tensor -> tensor of the output, for every job.
        parts: the parts, by name.
        tensors: the output's tensors, in file order.
        shards: the same by file.
        config: the composed model's configuration.
        processor: its processor.
        unused: model -> tensor that goes nowhere -> reason.
    """

    recipe: ComposeRecipe
    merge: MergePlan
    names: Mapping[str, str]
    parts: Mapping[str, PartPlan]
    tensors: tuple[OutputTensor, ...]
    shards: tuple[tuple[OutputTensor, ...], ...]
    config: OmniConfig
    processor: OmniProcessor
    unused: Mapping[str, Mapping[str, str]]

    @property
    def bytes_to_write(self) -> int:
        """Bytes of tensor data that the composition writes."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan in short, for JSON."""
        kept = [job for job in self.merge.jobs if not job.merged]
        return {
            "method": self.merge.method.name,
            "parameters": self.merge.recipe.all_parameters,
            "target": self.merge.target.location,
            "base": self.merge.base.location if self.merge.base else None,
            "select": self.merge.recipe.selection,
            "language_model": {
                "merged": len(self.merge.merged),
                "kept": len(kept),
                "kept_reasons": self.merge.kept_reasons(),
            },
            "parts": {
                name: {
                    "model": part.checkpoint.location,
                    "model_type": part.source.config.model_type,
                    "provides": list(part.provides),
                    "placeholders": {
                        kind: part.processor.tokens[token]
                        for kind, token in part.processor.placeholders.items()
                    },
                    "tokens": {each.name: each.id for each in part.brought},
                    "tensors": len(part.tensors),
                    "bytes": sum(part.checkpoint.tensors[n].nbytes for n in part.tensors),
                }
                for name, part in self.parts.items()
            },
            "unused": {
                model: _counted(reasons) for model, reasons in self.unused.items() if reasons
            },
            "ancestor": [
                a.ancestor.to_dict() if a.ancestor else None for a in self.merge.alignments
            ],
            "shards": len(self.shards),
            "bytes_to_write": self.bytes_to_write,
        }


def build_plan(
    recipe: ComposeRecipe, *, force: Collection[str] = (), ancestor: bool = True
) -> ComposePlan:
    """Plan a composition: open all checkpoints, align their language models, place every tensor.

    Args:
        recipe: what to do.
        force: names of gates to waive; see `omnimerge.engine.build_plan`.
        ancestor: whether to run the ancestor test, which reads a sample of the weights.

    Returns:
        The plan.

    Raises:
        RecipeError: if checkpoints cannot be opened, or a modality is provided twice.
        CheckpointError: if a checkpoint lacks tensors, or a processor.
        NotMergeableError: if the language models do not fit, or a model has no features to offer.
    """
    if recipe.merge.stores_float8:
        raise RecipeError(["dtype: a composed model computes in its dtype, give none in 8 bits"])
    targeted = _with_target(recipe)
    plan = build_merge_plan(targeted.merge, force=force, ancestor=ancestor)
    target = Source.open(plan.target.folder)
    check_head(target)
    models, provides = _models(targeted, plan)
    sources = {id(plan.target): target}
    for model in models:
        sources[id(model)] = Source.open(model.folder)
    parts = choose(models, [sources[id(model)] for model in models], provides)
    if any(part.source.has_mrope for part in parts.values()) and not target.has_mrope:
        raise NotMergeableError([
            f"{plan.target.folder}: its text model takes positions in one dimension, a part needs "
            "three (M-RoPE); give that part's model as target"
        ])  # fmt: skip
    tokenizer = load_tokenizer(plan.target.folder)
    for brought in bring(tokenizer, {name: part.processor for name, part in parts.items()}):
        parts[brought.part].brought.append(brought)
    merge, names, dropped = _language_model(plan, target)
    place(parts)
    unused = _unused(plan, merge, models, parts, dropped)
    outputs = _outputs(merge, names, parts, plan)
    config = describe(plan, target, parts, outputs)
    check_loads(config, outputs, plan.target.folder)
    processor = processor_of(plan, tokenizer, parts)
    shards = tuple(tuple(s) for s in shard_by_size(outputs, plan.recipe.max_shard_size))
    return ComposePlan(
        targeted, merge, names, parts, tuple(outputs), shards, config, processor, unused
    )


def _with_target(recipe: ComposeRecipe) -> ComposeRecipe:
    """The recipe with a target: a model with M-RoPE, where one has it and no target is given."""
    merge = recipe.merge
    if merge.target is not None:
        return recipe
    for reference in [merge.target_reference, *map(merge.model_reference, merge.models)]:
        checkpoint = Checkpoint.open(reference)
        if Source.open(checkpoint.folder).has_mrope:
            changed = merge.model_copy(update={"target": reference})
            return replace(recipe, merge=changed)
    return recipe


def _models(
    recipe: ComposeRecipe, plan: MergePlan
) -> tuple[list[Checkpoint], list[tuple[str, ...] | None]]:
    """The composition's models; the target is one where the method takes it as such.

    It then provides what it offers and no other model is said to provide.
    """
    models, provides = list(plan.models), list(recipe.provides)
    if plan.method.takes_target and plan.target not in models:
        named = {kind for given in provides for kind in given or ()}
        offers = Source.open(plan.target.folder).offers
        models.insert(0, plan.target)
        provides.insert(0, tuple(kind for kind in offers if kind not in named))
    return models, provides


def _language_model(
    plan: MergePlan, target: Source
) -> tuple[MergePlan, dict[str, str], dict[str, str]]:
    """The merge of the language model alone, the output's names, and what of it is dropped."""
    memory = target.memory(list(plan.target.tensors))
    names, dropped, jobs = {}, {}, []
    for job in plan.jobs:
        name = job.output.name
        if component(job.slot) != "llm":
            dropped[name] = "the target's tower or projector; a part has its own"
        elif job.slot.startswith("llm.head."):
            names[name] = f"{HEAD}.{name.rpartition('.')[2]}"
        elif name in memory and memory[name].startswith(target.decoder):
            names[name] = TEXT_PREFIX + memory[name].removeprefix(target.decoder)
        else:
            dropped[name] = "the text model's class has no such tensor"
        if name in names:
            jobs.append(job)
    return replace(plan, jobs=tuple(jobs)), names, dropped


def _unused(
    plan: MergePlan,
    merge: MergePlan,
    models: Sequence[Checkpoint],
    parts: Mapping[str, PartPlan],
    dropped: Mapping[str, str],
) -> dict[str, dict[str, str]]:
    """What goes nowhere, by model, each with its reason; every tensor is accounted for."""
    towers: dict[int, set[str]] = {}
    for part in parts.values():
        towers.setdefault(id(part.checkpoint), set()).update(part.tensors)
    found: dict[str, dict[str, str]] = {}
    inputs = [(plan.target, dict(dropped)), *((a.donor, a.unused) for a in merge.alignments)]
    for checkpoint, reasons in inputs:
        placed = towers.get(id(checkpoint), set())
        mine = {name: why for name, why in reasons.items() if name not in placed}
        if any(checkpoint is each for each in (plan.target, plan.base)) and not placed:
            mine |= {n: "only its language model is used" for n in mine if n not in dropped}
        previous = found.get(checkpoint.location)
        if previous is not None:  # the target is a model as well: unused by both
            mine = {name: why for name, why in mine.items() if name in previous}
        found[checkpoint.location] = mine
    _check_account(models, merge, towers, found)
    return found


def _check_account(
    models: Sequence[Checkpoint],
    merge: MergePlan,
    towers: Mapping[int, set[str]],
    unused: Mapping[str, Mapping[str, str]],
) -> None:
    used: dict[int, set[str]] = {id(merge.target): {job.output.name for job in merge.jobs}}
    for alignment in merge.alignments:
        names = {source for merged in alignment.merged for source in merged.sources}
        used.setdefault(id(alignment.donor), set()).update(names)
    for model in models:
        seen = used.get(id(model), set()) | towers.get(id(model), set())
        lost = set(model.tensors) - seen - set(unused.get(model.location, {}))
        if lost:
            raise CheckpointError(
                f"the account of {model.location} does not add up: {sorted(lost)[:3]}"
            )


def _outputs(
    merge: MergePlan, names: Mapping[str, str], parts: Mapping[str, PartPlan], plan: MergePlan
) -> list[OutputTensor]:
    highest = max(each.id for part in parts.values() for each in part.brought) + 1
    outputs = []
    for job in merge.jobs:
        shape = job.output.shape
        if is_vocabulary(job):
            shape = (max(shape[0], highest), *shape[1:])
        outputs.append(OutputTensor(names[job.output.name], job.output.dtype, shape))
    for part in parts.values():
        for name, path in part.tensors.items():
            meta = part.checkpoint.meta(name)
            outputs.append(OutputTensor(path, _dtype(plan, meta.dtype), meta.shape))
    _check_names(outputs)
    return outputs


def is_vocabulary(job: TensorJob) -> bool:
    """Return whether a tensor has one row per token.

    Args:
        job: a job of the language model.

    Returns:
        True for embedding and head.
    """
    return job.slot in (_EMBED_SLOT, _HEAD_SLOT) or job.slot.startswith("llm.head.")


def _dtype(plan: MergePlan, stored: str) -> str:
    if plan.recipe.dtype == "auto" or not is_known(stored) or not is_floating(stored):
        return stored
    return OUTPUT_DTYPES[plan.recipe.dtype]


def _check_names(outputs: Sequence[OutputTensor]) -> None:
    names = [tensor.name for tensor in outputs]
    twice = (
        sorted({name for name in names if names.count(name) > 1})
        if len(set(names)) < len(names)
        else []
    )
    if twice:
        raise CheckpointError(f"two tensors would get the name {twice[0]!r}")


def _counted(reasons: Mapping[str, str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for reason in reasons.values():
        counts[reason] = counts.get(reason, 0) + 1
    return dict(sorted(counts.items(), key=lambda pair: -pair[1]))

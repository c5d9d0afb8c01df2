"""From a recipe to a plan: parts, tokens, and what becomes of every tensor of every model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omnimerge.arch import component
from omnimerge.checkpoint import Checkpoint, OutputTensor
from omnimerge.checkpoint.dtypes import OUTPUT_DTYPES, is_floating, is_known
from omnimerge.checkpoint.writer import shard_by_size
from omnimerge.compose.configuration import OmniConfig, plain
from omnimerge.compose.part_processor import PartProcessor
from omnimerge.compose.processing import OmniProcessor
from omnimerge.compose.recipe import ComposeRecipe
from omnimerge.compose.source import Source, check_head
from omnimerge.compose.vocabulary import Brought, bring, chat_template, load_tokenizer
from omnimerge.engine import MergePlan, TensorJob
from omnimerge.engine import build_plan as build_merge_plan
from omnimerge.errors import CheckpointError, NotMergeableError, RecipeError

TEXT_PREFIX = "model.language_model."
HEAD = "lm_head"

_EMBED_SLOT, _HEAD_SLOT = "llm.embed.weight", "llm.head.weight"


@dataclass
class PartPlan:
    """One part of the composition.

    Attributes:
        name: its modalities, joined by an underscore.
        checkpoint: where its tensors are read from; with its adapter, if it has one.
        source: its architecture.
        provides: its modalities.
        processor: its processor.
        tensors: tensor on disk -> tensor of the output.
        brought: the tokens that it brings.
    """

    name: str
    checkpoint: Checkpoint
    source: Source
    provides: tuple[str, ...]
    processor: PartProcessor
    tensors: dict[str, str] = field(default_factory=dict)
    brought: list[Brought] = field(default_factory=list)


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
    targeted = _with_target(recipe)
    plan = build_merge_plan(targeted.merge, force=force, ancestor=ancestor)
    target = Source.open(plan.target.folder)
    check_head(target.config, plan.target.folder)
    models, provides = _models(targeted, plan)
    sources = {id(plan.target): target}
    for model in models:
        sources[id(model)] = Source.open(model.folder)
    parts = _parts(models, [sources[id(model)] for model in models], provides)
    if any(part.source.has_mrope for part in parts.values()) and not target.has_mrope:
        raise NotMergeableError([
            f"{plan.target.folder}: its text model takes positions in one dimension, a part needs "
            "three (M-RoPE); give that part's model as target"
        ])  # fmt: skip
    tokenizer = load_tokenizer(plan.target.folder)
    for brought in bring(tokenizer, {name: part.processor for name, part in parts.items()}):
        parts[brought.part].brought.append(brought)
    merge, names, dropped = _language_model(plan, target)
    _place(parts)
    unused = _unused(plan, merge, models, parts, dropped)
    outputs = _outputs(merge, names, parts, plan)
    config = _config(plan, target, parts, outputs)
    processor = _processor(plan, tokenizer, parts)
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
    """The composition's models; the target is one where the method takes it as such."""
    models, provides = list(plan.models), list(recipe.provides)
    if plan.method.takes_target and plan.target not in models:
        models.insert(0, plan.target)
        provides.insert(0, None if Source.open(plan.target.folder).offers else ())
    return models, provides


def _parts(
    models: Sequence[Checkpoint],
    sources: Sequence[Source],
    provides: Sequence[tuple[str, ...] | None],
) -> dict[str, PartPlan]:
    problems: list[str] = []
    chosen: list[tuple[Checkpoint, Source, tuple[str, ...]]] = []
    owners: dict[str, str] = {}
    for model, source, wanted in zip(models, sources, provides, strict=True):
        given = source.offers if wanted is None else wanted
        found = _problem(model, source, wanted)
        for kind in given:
            if kind in owners:
                found = found or (
                    f"{model.reference}: {owners[kind]} provides {kind} already; say which model "
                    f"provides what, for example `provides: {_other(source, kind)}`"
                )
            owners.setdefault(kind, model.reference)
        problems += [found] if found else []
        if given:
            chosen.append((model, source, given))
    if problems:
        raise NotMergeableError(problems)
    if not chosen:
        raise NotMergeableError(["no model provides a modality; merge them with `omnimerge merge`"])
    parts = {}
    for model, source, given in chosen:
        name = "_".join(given)
        tokens = _placeholder_tokens(source, given)
        processor = PartProcessor.load(source.folder, tokens, {})
        parts[name] = PartPlan(name, model, source, given, processor)
    return parts


def _problem(model: Checkpoint, source: Source, wanted: tuple[str, ...] | None) -> str:
    kind = source.config.model_type
    if wanted == ():
        return ""
    if not source.offers:
        return (
            f"{model.reference} ({kind}) offers no image, audio or video features; leave it out, "
            "or merge its language model only with `provides: text`"
        )
    lacking = [each for each in wanted or () if each not in source.offers]
    if lacking:
        offered = ", ".join(source.offers)
        return f"{model.reference} ({kind}) offers {offered}, and not {', '.join(lacking)}"
    if reason := source.obstacle():
        return f"{model.reference}: {reason}; leave it out"
    return ""


def _other(source: Source, taken: str) -> str:
    others = [kind for kind in source.offers if kind != taken]
    return others[0] if others else "text"


def _placeholder_tokens(source: Source, kinds: Sequence[str]) -> dict[str, str]:
    """Modality -> the placeholder in the original's vocabulary."""
    tokenizer = load_tokenizer(source.folder)
    found = {}
    for kind in kinds:
        number = source.placeholders[kind]
        token = tokenizer.convert_ids_to_tokens(number) if number < len(tokenizer) else None
        if token is None:
            raise CheckpointError(
                f"{source.folder}: config.json names token {number} for {kind}, which its "
                "tokenizer does not have; add the tokenizer that was published with the model"
            )
        found[kind] = str(token)
    return found


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


def _place(parts: Mapping[str, PartPlan]) -> None:
    for part in parts.values():
        memory = part.source.memory(list(part.checkpoint.tensors))
        inside = part.source.decoder
        part.tensors = {
            name: f"model.parts.{part.name}.model.{place}"
            for name, place in memory.items()
            if not place.startswith(inside)
        }
        if not part.tensors:
            raise CheckpointError(f"{part.checkpoint.location} has no tower for {part.name}")


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
        for name, place in part.tensors.items():
            meta = part.checkpoint.meta(name)
            outputs.append(OutputTensor(place, _dtype(plan, meta.dtype), meta.shape))
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


def _config(
    plan: MergePlan,
    target: Source,
    parts: Mapping[str, PartPlan],
    outputs: Sequence[OutputTensor],
) -> OmniConfig:
    text = plain(target.config.get_text_config(decoder=True))
    embed = next(o for o in outputs if o.name == f"{TEXT_PREFIX}embed_tokens.weight")
    text["vocab_size"] = embed.shape[0]
    written = {tensor.name for tensor in outputs}
    tied = f"{HEAD}.weight" not in written
    text["tie_word_embeddings"] = tied
    described = {}
    for name, part in parts.items():
        ids = {each.token: each.id for each in part.brought}
        described[name] = {
            "config": plain(part.source.config),
            "provides": list(part.provides),
            "placeholders": {
                kind: {"id": ids[token], "native": part.source.placeholders[kind]}
                for kind, token in part.processor.placeholders.items()
            },
        }
    config = OmniConfig(
        text_config=text,
        parts=described,
        tie_word_embeddings=tied,
        head_bias=f"{HEAD}.bias" in written,
    )
    config.architectures = ["OmniForConditionalGeneration"]
    config.dtype = _named_dtype(plan, target)
    return config


def _named_dtype(plan: MergePlan, target: Source) -> Any:
    return (
        getattr(target.config, "dtype", None)
        if plan.recipe.dtype == "auto"
        else (plan.recipe.dtype)
    )


def _processor(plan: MergePlan, tokenizer: Any, parts: Mapping[str, PartPlan]) -> OmniProcessor:
    snippets = {}
    for part in parts.values():
        for kind in part.provides:
            text = part.processor.snippet(kind)
            for token in sorted(part.processor.tokens, key=len, reverse=True):
                text = text.replace(token, part.processor.tokens[token])
            snippets[kind] = text
    template = _text_template(plan.target.folder, tokenizer, parts)
    if template is not None:
        template = _takes_text(tokenizer, template, snippets)
        tokenizer.chat_template = template
    processors = {name: part.processor for name, part in parts.items()}
    return OmniProcessor(tokenizer, processors, chat_template=template)


def _text_template(folder: Path, tokenizer: Any, parts: Mapping[str, PartPlan]) -> str | None:
    """The target's chat template, else the first that a part has."""
    found: list[Any] = [tokenizer.chat_template]
    file = folder / "chat_template.jinja"
    found += [file.read_text(encoding="utf-8")] if file.is_file() else []
    for part in sorted(parts.values(), key=lambda p: p.source.folder != folder):
        inner = part.processor.inner
        found += [getattr(inner, "chat_template", None), inner.tokenizer.chat_template]
    for each in found:
        text = each.get("default") if isinstance(each, dict) else each
        if isinstance(text, str) and text:
            return text
    return None


def _takes_text(tokenizer: Any, template: str, snippets: Mapping[str, str]) -> str:
    """The composed template, over a template that takes text, or lists of text."""
    for as_parts in (False, True):
        made = chat_template(template, snippets, as_parts=as_parts)
        turn = {"role": "user", "content": [{"type": "text", "text": "\x00"}]}
        try:
            text = tokenizer.apply_chat_template([turn], chat_template=made, tokenize=False)
        except Exception:  # noqa: BLE001 - a template may fail in any way on what it does not take
            continue
        if "\x00" in text and "'type'" not in text:
            return made
    raise RecipeError(["the chat template of the target takes no text"], "the target")


def _counted(reasons: Mapping[str, str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for reason in reasons.values():
        counts[reason] = counts.get(reason, 0) + 1
    return dict(sorted(counts.items(), key=lambda pair: -pair[1]))

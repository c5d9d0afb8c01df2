"""The parts of a composition: which model provides what, and where its tower goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from omnimerge.checkpoint import Checkpoint
from omnimerge.compose.part_processor import PartProcessor
from omnimerge.compose.source import Source
from omnimerge.compose.vocabulary import Brought, load_tokenizer
from omnimerge.errors import CheckpointError, NotMergeableError


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


def choose(
    models: Sequence[Checkpoint],
    sources: Sequence[Source],
    provides: Sequence[tuple[str, ...] | None],
) -> dict[str, PartPlan]:
    """Choose what provides each modality, and load the processors.

    Args:
        models: the composition's models.
        sources: their architectures.
        provides: what each is to provide; None for all that it offers, empty for nothing.

    Returns:
        The parts, by name; their tensors and tokens are still to come.

    Raises:
        NotMergeableError: if a model cannot be a part, a modality is provided twice, or none is.
    """
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
            f"{model.reference} ({kind}) {source.silence()}; leave it out, or merge its language "
            "model only with `provides: text`"
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


def place(parts: Mapping[str, PartPlan]) -> None:
    """Say where in the output each tensor of a part goes; its language model has no place there.

    Args:
        parts: the parts, changed in place.

    Raises:
        CheckpointError: if a part has no tower.
    """
    for part in parts.values():
        memory = part.source.memory(list(part.checkpoint.tensors))
        inside = part.source.decoder
        part.tensors = {
            name: f"model.parts.{part.name}.model.{inner}"
            for name, inner in memory.items()
            if not inner.startswith(inside)
        }
        if not part.tensors:
            raise CheckpointError(f"{part.checkpoint.location} has no tower for {part.name}")

"""What stands beside the tensors of a composed model: its configuration and its processor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omnimerge.checkpoint import OutputTensor
from omnimerge.checkpoint.small_file import read_text
from omnimerge.compose.configuration import OmniConfig, plain
from omnimerge.compose.names import HEAD, TEXT_PREFIX
from omnimerge.compose.parts import PartPlan
from omnimerge.compose.processing import OmniProcessor
from omnimerge.compose.source import Source
from omnimerge.compose.vocabulary import chat_template
from omnimerge.engine import MergePlan
from omnimerge.errors import NotMergeableError, RecipeError


def describe(
    plan: MergePlan,
    target: Source,
    parts: Mapping[str, PartPlan],
    outputs: Sequence[OutputTensor],
) -> OmniConfig:
    """Make the configuration of the composed model.

    Args:
        plan: the merge of the language models.
        target: whose text model it is.
        parts: the parts, with their tokens.
        outputs: the tensors of the output.

    Returns:
        The configuration.

    Raises:
        NotMergeableError: if the text model's embedding is not where it is looked for.
    """
    text = plain(target.config.get_text_config(decoder=True))
    embed = f"{TEXT_PREFIX}embed_tokens.weight"
    rows = next((each.shape[0] for each in outputs if each.name == embed), None)
    if rows is None:
        raise NotMergeableError(
            [f"{target.folder}: the text model of {target.config.model_type} has its embedding in "
             "another place than a composed model looks for it; give another target"]
        )  # fmt: skip
    text["vocab_size"] = rows
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
        text_class=target.text_class,
        text_conversions=target.conversions,
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


def processor_of(plan: MergePlan, tokenizer: Any, parts: Mapping[str, PartPlan]) -> OmniProcessor:
    """Make the processor of the composed model, with its chat template.

    Args:
        plan: the merge of the language models.
        tokenizer: the target's, with the parts' tokens.
        parts: the parts.

    Returns:
        The processor.
    """
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
    found += [read_text(file)] if file.is_file() else []
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

"""From a mergekit configuration to the recipe that computes the same."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omnimerge.arch import layer_index, slots_of
from omnimerge.checkpoint import Checkpoint
from omnimerge.checkpoint.small_file import read_json
from omnimerge.engine._mergekit_inputs import (
    MOST_LAYERS,
    Findings,
    Inputs,
    Reference,
    Source,
    check_keys,
    read_inputs,
    read_mapping,
    read_reference,
    text,
)
from omnimerge.engine._mergekit_methods import METHODS, PeerMethod
from omnimerge.engine._mergekit_parameters import Outline, Shape, settle
from omnimerge.engine._mergekit_settings import Site
from omnimerge.engine.loading import read_yaml
from omnimerge.errors import CheckpointError, ConversionError, LayoutError, suggestion
from omnimerge.methods import all_methods


@dataclass(frozen=True)
class Converted:
    """A recipe, and what its reader should know.

    Attributes:
        recipe: the keys of the recipe.
        notes: one line each: what was left out, and what stays different.
    """

    recipe: dict[str, Any]
    notes: tuple[str, ...]


def convert_file(path: str | Path, *, layers: int | None = None) -> Converted:
    """Convert a mergekit YAML file.

    Args:
        path: the file.
        layers: how many layers the models have, where no local checkpoint tells it.

    Returns:
        The recipe and notes.

    Raises:
        RecipeError: if the file cannot be read.
        ConversionError: if something in it has no equivalent; all problems at once.
    """
    return convert(read_yaml(Path(path)), str(path), layers=layers)


def convert(
    config: Mapping[str, Any],
    source: str = "the mergekit configuration",
    *,
    layers: int | None = None,
    outline: Callable[[str], Outline | None] | None = None,
) -> Converted:
    """Convert a mergekit configuration.

    Args:
        config: the mapping that its YAML file holds.
        source: what to call it in messages.
        layers: how many layers the models have, where no local checkpoint tells it.
        outline: tells the shape of a checkpoint; default: of local folders, from their headers.

    Returns:
        The recipe and notes.

    Raises:
        ConversionError: if something has no equivalent; all problems at once.
    """
    found = Findings()
    check_keys(config, found)
    peer = _peer(config.get("merge_method"), found)
    given = config.get("base_model")
    base = None if given is None else read_reference(given, "base_model", found)
    inputs = read_inputs(config, base, found)
    recipe: dict[str, Any] = {}
    if peer and inputs.sources:
        sources = _taken(peer, base, inputs)
        recipe = _merged(str(config["merge_method"]), peer, base, sources, found)
        look = (outline or look_at)((base or inputs.sources[0].reference)[0])
        settle(recipe, peer, inputs, sources, Shape(look, layers), found)
    _check_tokenizer(config, base, found)
    recipe |= _dtype(config, found)
    if found.problems:
        raise ConversionError(list(dict.fromkeys(found.problems)), source)
    return Converted(recipe, tuple(dict.fromkeys([*found.notes, *(peer.notes if peer else ())])))


def look_at(reference: str) -> Outline | None:
    """Read the shape of a checkpoint, if it is a local folder.

    Args:
        reference: a folder or a Hub id.

    Returns:
        Its outline, or None where there is no folder, or one that tells nothing.
    """
    try:
        folder = Path(reference).expanduser()
        config = read_json(folder / "config.json")
    except (CheckpointError, ValueError, RuntimeError):  # no such file, name, or user
        return None
    found = _layer_count(config)
    if found is None:
        return None
    multimodal = any(re.search("vision|audio|visual|thinker|mm_", key) for key in config)
    return Outline(found, _sites(folder), multimodal)


def _layer_count(config: Any) -> int | None:
    """`num_hidden_layers` of the language model, whose config may be nested."""
    if not isinstance(config, Mapping):
        return None
    thinker = config.get("thinker_config")
    inner = thinker.get("text_config") if isinstance(thinker, Mapping) else None
    nested = (config.get("text_config"), config.get("llm_config"), thinker, inner)
    for place in (config, *nested):
        count = place.get("num_hidden_layers") if isinstance(place, Mapping) else None
        if type(count) is int and 1 <= count <= MOST_LAYERS:
            return count
    return None


def _sites(folder: Path) -> tuple[Site, ...] | None:
    try:
        with Checkpoint.open(folder) as checkpoint:
            slots = slots_of(checkpoint).by_name
    except (CheckpointError, LayoutError):
        return None
    return tuple(Site(name, layer_index(slot)) for name, slot in slots.items())


def _peer(name: Any, found: Findings) -> PeerMethod | None:
    if name is None:
        found.problems.append("merge_method: missing; give one of " + ", ".join(METHODS))
    elif not isinstance(name, str) or name not in METHODS:
        known = f"{suggestion(str(name), METHODS)}; what can be converted: {', '.join(METHODS)}"
        found.refuse("merge_method", name, f"there is no method of this name here{known}")
    return METHODS.get(name) if isinstance(name, str) else None


def _merged(
    method: str,
    peer: PeerMethod,
    base: Reference | None,
    sources: list[Source],
    found: Findings,
) -> dict[str, Any]:
    """The recipe's method, base or target, and models."""
    recipe: dict[str, Any] = {"method": method}
    if base:
        recipe["base" if peer.base == "ancestor" else "target"] = base[0]
        if base[1]:
            why = "a base cannot have an adapter here; merge the adapter into it first"
            found.refuse("base_model", text(base), why)
    elif peer.base == "ancestor":
        found.problems.append(f"base_model: missing; {method} needs it")
    if base and peer.base == "other":
        why = f"{method} works on the models here, not on task vectors; leave base_model out"
        found.refuse("base_model", text(base), why)
    recipe["models"] = [_entry(source.reference) for source in sources]
    low, high = all_methods()[method].models
    if len(sources) < low or (high is not None and len(sources) > high):
        wanted = f"exactly {low}" if low == high else f"at least {low}"
        beside = " beside base_model" if peer.base == "ancestor" else ""
        found.refuse("models", f"{len(sources)} of them", f"{method} takes {wanted}{beside}")
    return recipe


def _entry(reference: Reference) -> dict[str, Any]:
    model, adapter = reference
    return {"model": model, "adapter": adapter} if adapter else {"model": model}


def _taken(peer: PeerMethod, base: Reference | None, inputs: Inputs) -> list[Source]:
    """The models that are merged; mergekit adds to `models` a base that is one of them."""
    others = [source for source in inputs.sources if source.reference != base]
    if not base or peer.base != "input":
        return others
    if inputs.layers is None and len(others) == len(inputs.sources):
        return [*others, Source(base, "base_model", {})]
    return list(inputs.sources)


_DTYPES = ("float32", "float16", "bfloat16")


def _dtype(config: Mapping[str, Any], found: Findings) -> dict[str, Any]:
    """The dtype of the output. mergekit computes in `dtype` too; here it is float32 always."""
    for key in ("dtype", "out_dtype"):
        value = str(config.get(key) or "float32").removeprefix("torch.")
        if value not in _DTYPES:
            found.refuse(key, config[key], f"give one of {', '.join(_DTYPES)}")
    chosen = config.get("out_dtype") or config.get("dtype")
    return {"dtype": str(chosen).removeprefix("torch.")} if chosen else {}


def _check_tokenizer(config: Mapping[str, Any], base: Reference | None, found: Findings) -> None:
    """The output has the target's tokenizer; whatever asks for another one is refused."""
    key, source = "tokenizer_source", config.get("tokenizer_source")
    tokenizer = config.get("tokenizer")
    if tokenizer is not None:
        key, details = "tokenizer.source", read_mapping(tokenizer, "tokenizer", found)
        source = details.get("source", "union")
        for name, value in details.items():
            if name != "source" and value:
                found.refuse(f"tokenizer.{name}", value, "it has no equivalent; leave it out")
    if source is not None:
        _check_token_source(key, source, base, found)
    template = config.get("chat_template")
    if template == "auto":
        found.notes.append("chat_template: auto takes the most frequent one, here the target's")
    elif template:
        why = "the output has the target's; leave it out, and set it in the output"
        found.refuse("chat_template", template, why)


def _check_token_source(key: str, source: Any, base: Reference | None, found: Findings) -> None:
    if source not in ("base", "union"):
        source = "base" if read_reference(source, key, found) == base else source
    if source != "base":
        why = "the output has the tokenizer of base_model, or of the first model; give base"
        found.refuse(key, source, why)
    found.notes.append(
        "embedding and head are merged where the vocabularies are equal and are the target's "
        "elsewhere; mergekit would match them token by token"
    )

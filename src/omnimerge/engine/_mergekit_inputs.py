"""What a mergekit configuration lists: models, slices, and the parameters beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from omnimerge.engine._mergekit_methods import KNOWN
from omnimerge.errors import suggestion

Reference = tuple[str, str | None]
"""A checkpoint, and the adapter on top of it."""

MOST_LAYERS = 10_000
"""No model has as many; what a file claims is not built without a limit."""


@dataclass
class Findings:
    """What is found on the way.

    Attributes:
        problems: what has no equivalent, one line each.
        notes: what the user should know, one line each.
    """

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def refuse(self, key: str, value: Any, why: str) -> None:
        """Add a problem.

        Args:
            key: where it is.
            value: what is there.
            why: the reason and the way out.
        """
        self.problems.append(f"{key}: {shown(value)}: {why}")


@dataclass(frozen=True)
class Source:
    """One model with its own parameters.

    Attributes:
        reference: the model.
        where: key of its parameters, for messages.
        parameters: its parameters.
    """

    reference: Reference
    where: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class Inputs:
    """All that is merged.

    Attributes:
        sources: what is listed, in order.
        levels: the parameters for all models, the nearest first, each with where they are.
        layers: how many layers the slices have, if slices are what is listed.
    """

    sources: tuple[Source, ...]
    levels: tuple[tuple[str, Mapping[str, Any]], ...]
    layers: int | None


_KEYS = (
    "merge_method",
    "base_model",
    "models",
    "slices",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer",
    "tokenizer_source",
    "chat_template",
)
# Options of mergekit's command line that some write into the file, where it does not read them.
_OPTIONS = (
    "allow_crimes",
    "async_write",
    "clone_tensors",
    "copy_tokenizer",
    "cuda",
    "device",
    "gpu_rich",
    "lazy",
    "lazy_unpickle",
    "lora_merge_cache",
    "low_cpu_memory",
    "multi_gpu",
    "name",
    "num_threads",
    "out_shard_size",
    "quiet",
    "read_to_gpu",
    "safe_serialization",
    "transformers_cache",
    "trust_remote_code",
    "verbosity",
    "write_model_card",
    "write_threads",
)


def check_keys(config: Mapping[str, Any], found: Findings) -> None:
    """Look at the keys at the top.

    Args:
        config: the configuration.
        found: gets a problem for every key that says what a recipe can not, a note for every one
            that was left out.
    """
    for key, value in config.items():
        if key in _KEYS or (key == "modules" and value is None):
            continue
        if key in _OPTIONS:
            found.notes.append(f"{key} was left out: it changes no number")
        elif key == "modules":
            why = "write `overrides` with `match: {component: ...}` in a recipe for one part"
            found.refuse(key, "...", why)
        elif key in KNOWN:
            why = "mergekit ignores it here; it belongs under parameters"
            found.refuse(key, value, why)
        else:
            found.refuse(str(key), value, f"unknown key{suggestion(str(key), [*_KEYS, *KNOWN])}")


def read_inputs(config: Mapping[str, Any], base: Reference | None, found: Findings) -> Inputs:
    """Read models or slices, and the parameters beside them.

    Args:
        config: the configuration.
        base: its base model.
        found: gets the problems.

    Returns:
        What is merged.
    """
    levels = [("parameters", read_mapping(config.get("parameters"), "parameters", found))]
    given = [key for key in ("models", "slices") if config.get(key) is not None]
    if len(given) != 1 and config.get("modules") is None:
        found.problems.append("models: give either models or slices, as mergekit demands")
    sources: list[Source] = []
    layers = None
    if given == ["models"]:
        sources = _sources(config["models"], "models", {"model", "parameters"}, found)
    elif given == ["slices"] and (slice_ := _only_slice(config["slices"], base, found)):
        keys = {"model", "parameters", "layer_range"}
        sources = _sources(slice_.get("sources"), "slices.0.sources", keys, found)
        layers = _whole(slice_.get("sources"), found) if sources else None
        where = "slices.0.parameters"
        levels.insert(0, (where, read_mapping(slice_.get("parameters"), where, found)))
    _check_twice(sources, found)
    return Inputs(tuple(sources), tuple(levels), layers)


def read_mapping(value: Any, where: str, found: Findings) -> Mapping[str, Any]:
    """Read a mapping that may be missing.

    Args:
        value: what is there.
        where: its key, for the message.
        found: gets a problem where it is no mapping.

    Returns:
        The mapping; empty where there is none.
    """
    if value is None or isinstance(value, Mapping):
        return value or {}
    found.refuse(where, value, "give a mapping of names and values")
    return {}


def _only_slice(slices: Any, base: Reference | None, found: Findings) -> Mapping[str, Any]:
    if not isinstance(slices, list) or len(slices) != 1 or not isinstance(slices[0], Mapping):
        many = f"{len(slices)} of them" if isinstance(slices, list) else slices
        why = "layers keep their places here; only one slice of whole models can be converted"
        found.refuse("slices", many, why)
        return {}
    for key, value in slices[0].items():
        if key == "base_model" and value is not None:
            if read_reference(value, "slices.0.base_model", found) != base:
                found.refuse("slices.0.base_model", value, "give it once, as base_model at the top")
        elif key not in ("sources", "parameters", "base_model"):
            found.refuse(f"slices.0.{key}", value, "it has no equivalent; leave it out")
    return slices[0]


def _whole(sources: Any, found: Findings) -> int | None:
    """How many layers the sources have, if all are taken from their first layer on."""
    ranges = [s.get("layer_range") for s in _list(sources) if isinstance(s, Mapping)]
    ends = [r[1] for r in ranges if isinstance(r, list) and len(r) == 2 and r[0] == 0]
    whole = bool(ends) and len(ends) == len(ranges) and all(type(end) is int for end in ends)
    if not whole or len(set(ends)) != 1 or not 1 <= ends[0] <= MOST_LAYERS:
        why = "layers keep their places here; all must be the whole model, [0, number of layers]"
        found.refuse("slices.0.sources.layer_range", ranges, why)
        return None
    return int(ends[0])


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _sources(entries: Any, where: str, keys: set[str], found: Findings) -> list[Source]:
    if not isinstance(entries, list) or not entries:
        found.refuse(where, entries, "give a list of models")
        return []
    return [
        source
        for number, entry in enumerate(entries)
        if (source := _one_source(entry, f"{where}.{number}", keys, found))
    ]


def _one_source(entry: Any, where: str, keys: set[str], found: Findings) -> Source | None:
    if not isinstance(entry, Mapping) or "model" not in entry:
        found.refuse(where, entry, "give a mapping with the key model")
        return None
    for key, value in entry.items():
        if key in KNOWN:
            found.refuse(f"{where}.{key}", value, "it belongs under parameters of this model")
        elif key not in keys:
            found.refuse(f"{where}.{key}", value, f"unknown key{suggestion(str(key), keys)}")
    reference = read_reference(entry["model"], f"{where}.model", found)
    at = f"{where}.parameters"
    parameters = read_mapping(entry.get("parameters"), at, found)
    return Source(reference, at, parameters) if reference else None


def read_reference(value: Any, where: str, found: Findings) -> Reference | None:
    """Read `path`, `path@revision`, `path+adapter`, or the mapping that says the same.

    Args:
        value: what is there.
        where: its key, for the message.
        found: gets a problem where it is none of these.

    Returns:
        The checkpoint and its adapter, or None.
    """
    if isinstance(value, str) and value.count("+") <= 1:
        model, _, adapter = value.partition("+")
        return model, adapter or None
    if isinstance(value, Mapping) and not set(value) - {"model", "lora"}:
        parts = [_path(value.get(key)) for key in ("model", "lora")]
        if parts[0]:
            return parts[0], parts[1]
    why = "give path, owner/name@revision, or either of them + adapter"
    found.refuse(where, value, why)
    return None


def _path(value: Any) -> str | None:
    if isinstance(value, Mapping):
        path, revision = value.get("path"), value.get("revision")
        if not isinstance(path, str):
            return None
        return f"{path}@{revision}" if path and revision else path
    return value if isinstance(value, str) else None


def _check_twice(sources: Sequence[Source], found: Findings) -> None:
    references = [source.reference for source in sources]
    for reference in dict.fromkeys(r for r in references if references.count(r) > 1):
        found.refuse("models", text(reference), "is listed twice, which mergekit refuses too")


def text(reference: Reference) -> str:
    """Return a reference as mergekit writes it.

    Args:
        reference: a checkpoint and its adapter.

    Returns:
        `path` or `path+adapter`.
    """
    return "+".join(part for part in reference if part)


def shown(value: Any) -> str:
    """Return a value for a message.

    Args:
        value: any value of a YAML file.

    Returns:
        It as YAML would have it, shortened.
    """
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else repr(value)[:80]

"""mergekit's parameters, turned into ours for every tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from omnimerge.engine import _mergekit_settings as settings
from omnimerge.engine._mergekit_inputs import Findings, Inputs, Source
from omnimerge.engine._mergekit_methods import KNOWN, WITHOUT_EFFECT, PeerMethod, Setting, Values
from omnimerge.engine._mergekit_settings import Site
from omnimerge.errors import suggestion
from omnimerge.methods import MergeMethod, all_methods


@dataclass(frozen=True)
class Outline:
    """What a local checkpoint tells of its shape.

    Attributes:
        layers: layers of its language model.
        sites: its tensors; None where only its config is there.
        multimodal: whether it has more parts than a language model.
    """

    layers: int
    sites: tuple[Site, ...] | None
    multimodal: bool


@dataclass(frozen=True)
class Shape:
    """What is known of the models' shape.

    Attributes:
        outline: what a checkpoint tells.
        layers: how many layers the caller says there are.
    """

    outline: Outline | None
    layers: int | None


def settle(
    recipe: dict[str, Any],
    peer: PeerMethod,
    inputs: Inputs,
    sources: Sequence[Source],
    shape: Shape,
    found: Findings,
) -> None:
    """Add weights, parameters and overrides to a recipe.

    Args:
        recipe: its method and models; it is changed.
        peer: mergekit's side of the method.
        inputs: what the configuration lists.
        sources: the models that are merged, in the recipe's order.
        shape: what is known of the models' layers and tensors.
        found: gets problems and notes.
    """
    levels, sources = _readable(peer, inputs, sources, found)
    used = [
        (f"{where}.{name}", setting)
        for where, level in (*((s.where, s.parameters) for s in sources), *levels)
        for name, setting in level.items()
    ]
    sites = _sites_for(used, inputs, shape, found)
    names = list(dict.fromkeys(name for _, setting in used for name in settings.filters(setting)))
    names = _usable_filters(names, sites, shape, found)
    depth = max((site.layer for site in sites if site.layer is not None), default=0)
    method = all_methods()[recipe["method"]]
    keywords = partial(_keywords, peer, method, levels, sources, found)
    default = keywords("", 0.0)
    wanted = {
        place: keywords(site.name, _depth(site.layer, depth))
        for place, site in settings.places(sites, names).items()
    }
    overrides = settings.overrides(default, wanted)
    if any("lm_head" in override["match"].get("name", "") for override in overrides):
        _note_head(shape, found)
    for entry, weight in zip(recipe["models"], default.pop("weights", ()), strict=False):
        entry["weight"] = weight
    recipe |= {"parameters": default} if default else {}
    recipe |= {"overrides": overrides} if overrides else {}


def _readable(
    peer: PeerMethod, inputs: Inputs, sources: Sequence[Source], found: Findings
) -> tuple[list[tuple[str, dict[str, Any]]], list[Source]]:
    """Only the parameters that mergekit reads at the place where they are."""
    everywhere = {**peer.shared, **peer.each}
    levels = [(where, _known(level, where, everywhere, found)) for where, level in inputs.levels]
    taken = [
        Source(s.reference, s.where, _known(s.parameters, s.where, peer.each, found))
        for s in sources
    ]
    for source in inputs.sources:
        if source.reference not in [s.reference for s in sources]:
            _known(source.parameters, source.where, {}, found)
    return levels, taken


def _known(
    level: Mapping[str, Any], where: str, read: Mapping[str, Setting], found: Findings
) -> dict[str, Any]:
    kept = {}
    for name, setting in level.items():
        key = f"{where}.{name}"
        if name not in KNOWN:
            found.refuse(key, setting, f"unknown parameter{suggestion(str(name), KNOWN)}")
        elif name in WITHOUT_EFFECT:
            found.notes.append(f"{name} was left out: it changes no number")
        elif name not in read:
            found.notes.append(f"{key} was left out: mergekit does not read it there")
        elif problem := settings.malformed(setting):
            found.refuse(key, setting, problem)
        else:
            kept[name] = setting
    return kept


def _sites_for(
    used: Sequence[tuple[str, Any]], inputs: Inputs, shape: Shape, found: Findings
) -> list[Site]:
    """The tensors that parameters have to be told for; their layer only where it matters."""
    outline = shape.outline
    known = outline.layers if outline else None
    count = known or shape.layers or inputs.layers
    for key, given in (("slices.0.sources.layer_range", inputs.layers), ("--layers", shape.layers)):
        if given and given != count:
            found.refuse(key, given, f"the models have {count} layers")
    gradients = [key for key, setting in used if settings.varies(setting)]
    sites = list(outline.sites) if outline and outline.sites else settings.usual_sites(count or 1)
    if not gradients:
        return [Site(site.name, None) for site in sites]
    if count is None:
        why = "the number of layers is needed, and no local checkpoint tells it; give --layers N"
        found.refuse(gradients[0], "a gradient", why)
    if outline and outline.multimodal:
        _check_towers(gradients[0], shape, found)
    return sites


def _check_towers(gradient: str, shape: Shape, found: Findings) -> None:
    if shape.layers is None:
        why = (
            "mergekit runs it over the layers of the towers too, which `layers:` does not reach; "
            "give --layers N to run it over the language model's alone"
        )
        found.refuse(gradient, "a gradient over a multimodal model", why)
    else:
        found.notes.append("gradients run over the language model's layers alone")


def _usable_filters(
    names: Sequence[str], sites: Sequence[Site], shape: Shape, found: Findings
) -> list[str]:
    usable = []
    for name in names:
        if any(name in site.name for site in sites):
            usable.append(name)
        elif shape.outline and shape.outline.sites:
            found.notes.append(f"the filter {name!r} was left out: it fits no tensor")
        else:
            why = "it fits no usual tensor; convert where the base or first model is a local folder"
            found.refuse("filter", name, why)
    return usable


def _note_head(shape: Shape, found: Findings) -> None:
    if not (shape.outline and shape.outline.sites):
        found.notes.append("remove the override for lm_head if the models have no such tensor")


def _depth(layer: int | None, last: int) -> float:
    """Where a layer is for mergekit: from 0 to 1, and 0 for what is in no layer."""
    if layer is None:
        return 0.0
    return layer / last if last else 1.0


def _keywords(
    peer: PeerMethod,
    method: MergeMethod,
    levels: Sequence[tuple[str, Mapping[str, Any]]],
    sources: Sequence[Source],
    found: Findings,
    name: str,
    t: float,
) -> dict[str, Any]:
    """The keywords of our method for one tensor, the defaults of both sides written out."""
    shared = {k: _value(k, s, levels, name, t, found) for k, s in peer.shared.items()}
    each = {
        key: [
            _value(key, setting, [(source.where, source.parameters), *levels], name, t, found)
            for source in sources
        ]
        for key, setting in peer.each.items()
    }
    values = Values(shared, each)
    keywords = peer.convert(values)
    found.problems += values.problems or [
        f"parameters.{problem}" for problem in method.problems(keywords, len(sources))
    ]
    return keywords


def _value(
    key: str,
    setting: Setting,
    levels: Sequence[tuple[str, Mapping[str, Any]]],
    name: str,
    t: float,
    found: Findings,
) -> Any:
    """The value of the nearest level that has one, as mergekit looks for it."""
    for where, level in levels:
        if key not in level:
            continue
        try:
            value = settings.evaluate(level[key], name, t, setting.read)
        except ValueError as error:
            found.refuse(f"{where}.{key}", level[key], str(error))
            return setting.fallback
        if value is not None:
            return value
    if setting.required:
        where = levels[0][0]
        why = "mergekit refuses that; give it, with a last entry without filter"
        found.problems.append(f"{where}.{key}: missing for some tensors; {why}")
    return setting.fallback

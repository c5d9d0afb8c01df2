"""The report of an alignment: one self-contained HTML page that shows what of a donor goes where.

`align` lists tensors by the thousand. Here they are counted by part (a tower, the embedding, one
layer) and, inside a layer that holds tensors twice, by lane (shared, text, image).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from markupsafe import Markup

from omnimerge.arch.ancestor import MEDIAN_LIMIT, SINGLE_LIMIT
from omnimerge.arch.family import BRANCHES, split_branch
from omnimerge.arch.layout import component, is_buffer, layer_index
from omnimerge.report._page import shown, template
from omnimerge.report.picture import (
    LANES,
    LAYERS,
    REST,
    SIDES,
    Counts,
    Flow,
    Picture,
    Place,
    Side,
    label,
    order,
    summed,
)

_EXAMPLES = 8
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_EXPERT = re.compile(r"(?<=\bexperts\.)\d+(?![^.])")


@dataclass
class Route:
    """What becomes of one slot in some layers, names with ``{i}`` for the layer's number.

    Attributes:
        sources: the donor's tensors; empty for a kept tensor.
        target: the target's tensor; empty for an unused one.
        op: how, in the words of `Merged.op`; or `kept` or `unused`.
        rule: the rule that applied, or the reason of a kept or unused tensor.
        layers: in which layers; empty outside of them.
        tensors: number of tensors.
    """

    sources: tuple[str, ...]
    target: str
    op: str
    rule: str
    layers: set[int] = field(default_factory=set)
    tensors: int = 0

    @property
    def state(self) -> str:
        """One of `STATES`."""
        return _state_of(self.op)

    @property
    def where(self) -> str:
        """The layers, for people."""
        return ranges(self.layers)


@dataclass
class SlotRow:
    """One slot of the language model, over all layers.

    Attributes:
        slot: for example ``attn.q.weight``.
        lane: its branch, or an empty string.
        layered: whether it is in layers.
        routes: what becomes of it, the most frequent first.
    """

    slot: str
    lane: str
    layered: bool
    routes: list[Route]

    def count(self, *states: str) -> int:
        """Return in how many layers (outside of them: for how many tensors) a state occurs.

        Args:
            *states: some of `STATES`.

        Returns:
            The count.
        """
        routes = [route for route in self.routes if route.state in states]
        if self.layered:
            return len(set().union(*(route.layers for route in routes)))
        return sum(route.tensors for route in routes)


@dataclass
class ComponentRow:
    """One part outside of the language model.

    Attributes:
        label: its name.
        target: state -> tensors of the target.
        donor: state -> tensors of the donor.
        reasons: why they are kept or unused -> tensors of both.
    """

    label: str
    target: Counter[str]
    donor: Counter[str]
    reasons: Counter[str]


def write_mapping_report(alignment: Mapping[str, Any], file: Path) -> Path:
    """Write an alignment as one HTML page that needs no network and no script.

    Args:
        alignment: what `Alignment.to_dict` returns.
        file: the page to write; its folder must exist.

    Returns:
        The page.

    Raises:
        OSError: if the file cannot be written.
    """
    counts = {side: count_parts(alignment, side) for side in SIDES}
    page = template("mapping.html", breakable=_breakable).render(
        alignment=alignment,
        names={side: display_name(str(alignment[side]["path"])) for side in SIDES},
        totals={side: summed(map(summed, _lanes(counts[side]))) for side in SIDES},
        picture=Picture(counts, count_flows(alignment), reasons_by_part(alignment)),
        geometry=_geometry(alignment),
        slot_rows=slot_rows(alignment),
        component_rows=component_rows(alignment),
        groups={"kept": by_reason(alignment, "kept"), "unused": by_reason(alignment, "unused")},
        limits={"median": MEDIAN_LIMIT, "single": SINGLE_LIMIT},
        lanes=LANES,
    )
    file.write_text(page, encoding="utf-8", errors="backslashreplace")  # a header may hold any name
    return file


def place(slot: str) -> Place:
    """Return the part that a slot is drawn in, and the lane inside it.

    Args:
        slot: for example ``llm.layers.3.attn.q.weight@vision``.

    Returns:
        For example ``("llm.layers.3", "vision")``; the lane is empty for what is there once.
    """
    number = layer_index(slot)
    if number is not None:
        branch = split_branch(slot)[1]
        return f"{LAYERS}.{number}", branch if branch in BRANCHES else ""
    name = component(slot)
    return ".".join(slot.split(".")[:2]) if name == "llm" else name, ""


def count_parts(alignment: Mapping[str, Any], side: Side) -> Counts:
    """Count a side's tensors by part, lane and state.

    Args:
        alignment: what `Alignment.to_dict` returns.
        side: `donor` or `target`.

    Returns:
        Part -> lane -> state -> tensors. Every tensor is counted once.
    """
    found: dict[str, tuple[Place, str]] = {}
    for slot, sources, target, op, _ in _routes(alignment):
        state = _state_of(op)
        for name, where in (sources if side == "donor" else {target: slot}).items():
            if name and found.get(name, ("", ""))[1] != "rearranged":
                own = "buffer" if state in REST and is_buffer(name) else state
                found[name] = place(where), own
    counts: Counts = {}
    for (part, lane), state in found.values():
        counts.setdefault(part, {}).setdefault(lane, Counter())[state] += 1
    return counts


def count_flows(alignment: Mapping[str, Any]) -> Counter[Flow]:
    """Count the pairs of donor and target tensor by where they lead from and to.

    Args:
        alignment: what `Alignment.to_dict` returns.

    Returns:
        Flow -> pairs; a target tensor with three sources counts three times.
    """
    return Counter(
        Flow(place(source), place(entry["slot"]), _state_of(entry["op"]))
        for entry in alignment["merged"]
        for source in entry["source_slots"]
    )


def slot_rows(alignment: Mapping[str, Any]) -> list[SlotRow]:
    """Fold the language model's tensors over layers and experts.

    Args:
        alignment: what `Alignment.to_dict` returns.

    Returns:
        One row per slot name: embedding, layers, final norm, head; what is merged comes first in
        each.
    """
    folded: dict[tuple[str, str, bool], dict[tuple[Any, ...], Route]] = {}
    for slot, sources, target, op, rule in _routes(alignment):
        if component(slot) != "llm":
            continue
        number, (_, lane) = layer_index(slot), place(slot)
        layered = number is not None
        base = slot.removesuffix(f"@{lane}" if lane else "").split(".", 3 if layered else 1)[-1]
        names = tuple(dict.fromkeys(_pattern(name, layered) for name in sources))
        key = names, _pattern(target, layered), op, rule
        routes = folded.setdefault((_EXPERT.sub("{j}", base), lane, layered), {})
        route = routes.setdefault(key, Route(*key))
        route.tensors += 1
        if number is not None:
            route.layers.add(number)
    rows = [
        SlotRow(*key, sorted(routes.values(), key=lambda route: -route.tensors))
        for key, routes in folded.items()
    ]
    parts = [f"{LAYERS}.0" if row.layered else place(f"llm.{row.slot}")[0] for row in rows]
    stages = [order(part)[0] for part in parts]
    return [row for _, row in sorted(zip(stages, rows, strict=True), key=lambda pair: pair[0])]


def component_rows(alignment: Mapping[str, Any]) -> list[ComponentRow]:
    """Count what is outside of the language model.

    Args:
        alignment: what `Alignment.to_dict` returns.

    Returns:
        One row per component that either side has.
    """
    donor, target = (count_parts(alignment, side) for side in SIDES)
    reasons = reasons_by_part(alignment)
    return [
        ComponentRow(
            label(part),
            summed(target.get(part, {}).values()),
            summed(donor.get(part, {}).values()),
            reasons.get(part, Counter()),
        )
        for part in sorted({*donor, *target}, key=order)
        if component(part) != "llm"
    ]


def reasons_by_part(alignment: Mapping[str, Any]) -> dict[str, Counter[str]]:
    """Count the reasons of kept and unused tensors by part.

    Args:
        alignment: what `Alignment.to_dict` returns.

    Returns:
        Part -> reason -> tensors of both sides.
    """
    found: dict[str, Counter[str]] = {}
    for entry in (*alignment["kept"], *alignment["unused"]):
        found.setdefault(place(entry["slot"])[0], Counter())[entry["reason"]] += 1
    return found


def by_reason(
    alignment: Mapping[str, Any], state: Literal["kept", "unused"]
) -> list[tuple[str, int, list[str]]]:
    """Group the tensors that get nothing, or go nowhere, by reason.

    Args:
        alignment: what `Alignment.to_dict` returns.
        state: `kept` for the target's, `unused` for the donor's.

    Returns:
        (reason, tensors, the first names), the most frequent reason first.
    """
    key = "target" if state == "kept" else "source"
    names: dict[str, list[str]] = {}
    for entry in alignment[state]:
        names.setdefault(entry["reason"], []).append(entry[key])
    groups = [(reason, len(each), each[:_EXAMPLES]) for reason, each in names.items()]
    return sorted(groups, key=lambda group: -group[1])


def display_name(path: str) -> str:
    """Return the short name of a checkpoint: its Hub id where the path tells it.

    Args:
        path: a folder, perhaps in the Hub's cache, or several joined by `` + ``.

    Returns:
        For example ``Qwen/Qwen2-VL-7B-Instruct``.
    """
    names = []
    for each in path.split(" + "):
        cached = re.search(r"models--([^/]+?)--([^/]+)/snapshots/", each)
        names.append("/".join(cached.groups()) if cached else Path(each).name or each)
    return " + ".join(names)


def ranges(numbers: Iterable[int]) -> str:
    """Write numbers for people.

    Args:
        numbers: in any order.

    Returns:
        For example ``0–3, 7``.
    """
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in runs)


def _state_of(op: str) -> str:
    if op in REST:
        return op
    return "merged" if op == "rename" else "rearranged"


def _routes(
    alignment: Mapping[str, Any],
) -> Iterator[tuple[str, dict[str, str], str, str, str]]:
    """(slot, source -> its slot, target, op, rule) of every tensor of both sides."""
    for entry in alignment["merged"]:
        sources = dict(zip(entry["sources"], entry["source_slots"], strict=True))
        yield entry["slot"], sources, entry["target"], entry["op"], entry["rule"]
    for entry in alignment["kept"]:
        yield entry["slot"], {}, entry["target"], "kept", entry["reason"]
    for entry in alignment["unused"]:
        yield entry["slot"], {entry["source"]: entry["slot"]}, "", "unused", entry["reason"]


def _pattern(name: str, layered: bool) -> str:
    """A tensor's name with ``{i}`` for its layer and ``{j}`` for its expert."""
    name = _NUMBER.sub("{i}", name, count=1) if layered else name
    return _EXPERT.sub("{j}", name)


def _lanes(counts: Counts) -> Iterator[Iterable[Counter[str]]]:
    return (lanes.values() for lanes in counts.values())


def _geometry(alignment: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(name, donor's, target's) of everything that is known of the language models."""
    donor, target = (alignment[side]["llm"] for side in SIDES)
    return [
        (key.replace("_", " "), donor.get(key), target.get(key))
        for key in dict.fromkeys((*donor, *target))
        if donor.get(key) is not None or target.get(key) is not None
    ]


def _breakable(name: str) -> Markup:
    """A name that a browser may break after its dots and slashes."""
    return Markup("<wbr>").join(re.split(r"(?<=[./])(?=\w)", shown(name)))

"""The picture of an alignment: both stacks, and what leads from one to the other.

Both share their rows, so that a ribbon that is not level means something. The page around the
picture takes its words for parts, lanes and states from here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby, zip_longest
from textwrap import wrap
from typing import Literal, NamedTuple

from omnimerge.arch.layout import component

Side = Literal["donor", "target"]
Place = tuple[str, str]  # part, lane
Counts = dict[str, dict[str, Counter[str]]]  # part -> lane -> state -> tensors

SIDES: tuple[Side, Side] = ("donor", "target")
STATES = {
    "merged": "merged as they are",
    "rearranged": "merged, rearranged",
    "kept": "kept: the target's own",
    "unused": "unused",
    "buffer": "buffers, never merged",
}
MERGED, REST = ("merged", "rearranged"), ("kept", "unused")
LANES = {"": "shared", "text": "text", "vision": "image"}
LAYERS = "llm.layers"

_STAGES = ("vision", "audio", "projector", "llm.embed", LAYERS, "llm.norm", "llm.head", "llm")
_LABELS = {
    "vision": "Vision tower",
    "audio": "Audio tower",
    "projector": "Projector",
    "llm.embed": "Embedding",
    "llm.norm": "Final norm",
    "llm.head": "Head",
    "other": "Other parts",
}

_WIDTH, _BOX, _MARGIN, _LANE, _EDGE = 920.0, 270.0, 24.0, 80.0, 5.0
_LEFT: dict[Side, float] = {"donor": _MARGIN, "target": _WIDTH - _MARGIN - _BOX}
# Up to so many layers -> height of a layer, of each of its lanes, and of the gap below it.
_SIZES = {12: (24.0, 15.0, 5.0), 40: (17.0, 11.0, 3.0), 10**9: (12.0, 5.0, 2.0)}
_NOTE_WIDTH = 42


class Flow(NamedTuple):
    """From where in the donor to where in the target tensors go, and how."""

    donor: Place
    target: Place
    state: str

    def at(self, side: Side) -> Place:
        """Return one end.

        Args:
            side: which.

        Returns:
            Its part and lane.
        """
        return self.donor if side == "donor" else self.target


@dataclass(frozen=True)
class Cell:
    """A rectangle: a frame, a box, one of its lanes, or a bit of its inner edge.

    Attributes:
        side: whose it is.
        x: left edge.
        y: upper edge.
        width: its width.
        height: its height.
        label: what is written in it.
        name: what it is, in full.
        counts: state -> tensors; empty for what this side lacks.
        inset: what its lanes take of its width, at the inner side.
    """

    side: Side
    x: float
    y: float
    width: float
    height: float
    label: str = ""
    name: str = ""
    counts: Counter[str] = field(default_factory=Counter)
    inset: float = 0.0

    @property
    def state(self) -> str:
        """Its one word, of `box_state`."""
        return box_state(self.counts)

    @property
    def title(self) -> str:
        """What it is and holds, in words."""
        return f"{self.name}: {told(self.counts)}"

    @property
    def fills(self) -> list[tuple[str, float, float]]:
        """(state, x, width) of each state's share; what is merged lies at the inner side."""
        states = [state for state in (*MERGED, *REST) if self.counts[state]]
        total = sum(self.counts[state] for state in states)
        found, done = [], self.inset
        for state in states:
            share = (self.width - self.inset) * self.counts[state] / total
            left = done if self.side == "target" else self.width - done - share
            found.append((state, self.x + left, share))
            done += share
        return found


@dataclass(frozen=True)
class Ribbon:
    """What leads from the donor to the target.

    Attributes:
        path: an SVG path.
        state: `merged` or `rearranged`.
        title: what it stands for.
    """

    path: str
    state: str
    title: str


class Picture:
    """Both stacks, and what leads from one to the other.

    Args:
        counts: of both sides, from `count_parts`.
        flows: from `count_flows`.
        reasons: from `reasons_by_part`.

    Attributes:
        width: of the drawing.
        height: of the drawing.
        frames: what encloses the language models.
        boxes: the parts of both sides.
        lanes: inside the boxes of layers that hold tensors twice.
        ribbons: from the donor to the target.
        edges: where ribbons end, and where none does.
        notes: (y, lines) that say why a row has no ribbon.
    """

    def __init__(
        self,
        counts: Mapping[Side, Counts],
        flows: Counter[Flow],
        reasons: Mapping[str, Counter[str]],
    ) -> None:
        self.width, self.height = _WIDTH, 4.0
        self.frames: list[Cell] = []
        self.boxes: list[Cell] = []
        self.lanes: list[Cell] = []
        self.ribbons: list[Ribbon] = []
        self.edges: list[Cell] = []
        self.notes: list[tuple[float, list[str]]] = []
        self._counts, self._flows = counts, flows
        self._anchors: dict[tuple[Side, Place], tuple[float, float]] = {}
        self._ends: dict[tuple[Side, Flow], tuple[float, float]] = {}
        rows = self._place_rows()
        for part, (y, height) in rows.items():
            for side in SIDES:
                self._add_box(side, part, y, height)
        for side, where in self._anchors:
            self._add_edge(side, where)
        for flow in flows:
            self._add_ribbon(flow)
        self._add_notes(rows, reasons)

    def _place_rows(self) -> dict[str, tuple[float, float]]:
        """Part -> (y, height), the same on both sides; and what encloses the language models."""
        parts = sorted({part for side in SIDES for part in self._counts[side]}, key=order)
        layers = [part for part in parts if _is_layer(part)]
        sides = self._counts.values()
        lanes = max((len(side.get(part, ())) for side in sides for part in layers), default=1)
        single, lane, gap = next(_SIZES[most] for most in _SIZES if len(layers) <= most)
        rows: dict[str, tuple[float, float]] = {}
        for is_llm, group in groupby(parts, key=lambda part: component(part) == "llm"):
            top = self.height + (6 if is_llm else 0)
            self.height = top + (32 if is_llm else 0)
            for part in group:
                if _is_layer(part):
                    rows[part] = self.height, max(single, lanes * lane)
                    self.height += rows[part][1] + gap
                else:
                    rows[part] = self.height + 4, 30 if is_llm else 42
                    self.height += rows[part][1] + 12
            if is_llm:
                self._add_frames(top, self.height + 2)
                self.height += 14
        return rows

    def _add_frames(self, top: float, bottom: float) -> None:
        for side in SIDES:
            layers = _counted(sum(map(_is_layer, self._counts[side])), "layer")
            size = _BOX + 24, bottom - top
            self.frames.append(Cell(side, _LEFT[side] - 12, top, *size, "Language model", layers))

    def _add_box(self, side: Side, part: str, y: float, height: float) -> None:
        x, text, lanes = _LEFT[side], label(part), self._counts[side].get(part, {})
        name = f"{text} of the {side}"
        laned = not lanes.keys() <= {""}
        inset = _LANE + _EDGE if laned else 0
        text = text if lanes else f"no {text.lower()}"
        total = summed(lanes.values())
        self.boxes.append(Cell(side, x, y, _BOX, height, text, name, total, inset))
        x += _BOX - inset if side == "donor" else _EDGE
        step = height / max(len(lanes), 1)
        for lane in (lane for lane in LANES if lane in lanes):
            self._anchors[side, (part, lane)] = y, step
            if laned:
                text = LANES[lane]
                title = f"{name}, {text}"
                self.lanes.append(Cell(side, x, y, _LANE, step, text, title, lanes[lane]))
            y += step

    def _add_edge(self, side: Side, where: Place) -> None:
        """Share a lane's inner edge out among what starts or ends there, and what does not."""
        y, height = self._anchors[side, where]
        far: Side = "donor" if side == "target" else "target"
        flows = [flow for flow in self._flows if flow.at(side) == where]
        flows.sort(key=lambda flow: (self._anchors[far, flow.at(far)], flow.state))
        counts = self._counts[side][where[0]][where[1]]
        merged, rest = (sum(counts[state] for state in states) for states in (MERGED, REST))
        pairs = sum(self._flows[flow] for flow in flows)
        shares = [
            (flow.state, merged / (merged + rest) * self._flows[flow] / pairs) for flow in flows
        ]
        if rest or not merged:
            state = "kept" if side == "target" else "unused"
            shares.append((state, rest / (merged + rest) if rest else 1.0))
        x = _LEFT[side] + (_BOX - _EDGE if side == "donor" else 0)
        for flow, (state, share) in zip_longest(flows, shares):
            if flow:
                self._ends[side, flow] = y, share * height
            size = _EDGE, share * height
            self.edges.append(Cell(side, x, y, *size, counts=Counter({state: 1})))
            y += share * height

    def _add_ribbon(self, flow: Flow) -> None:
        left, right = _LEFT["donor"] + _BOX, _LEFT["target"]
        middle = (left + right) / 2
        (y0, h0), (y1, h1) = (_narrowed(*self._ends[side, flow]) for side in SIDES)
        path = (
            f"M{left:g} {y0:.1f}C{middle:g} {y0:.1f} {middle:g} {y1:.1f} {right:g} {y1:.1f}"
            f"v{h1:.1f}C{middle:g} {y1 + h1:.1f} {middle:g} {y0 + h0:.1f} {left:g} {y0 + h0:.1f}z"
        )
        ends = [", ".join(filter(None, (label(p), lane and LANES[lane]))) for p, lane in flow[:2]]
        count = _counted(self._flows[flow], "tensor")
        title = f"{' → '.join(ends)}: {count} {STATES[flow.state]}"
        self.ribbons.append(Ribbon(path, flow.state, title))

    def _add_notes(
        self, rows: Mapping[str, tuple[float, float]], reasons: Mapping[str, Counter[str]]
    ) -> None:
        """Say in the gap why a part, or every layer, has no ribbon."""
        touched = {flow.at(side)[0] for flow in self._flows for side in SIDES}
        for _, group in groupby(rows, key=lambda part: LAYERS if _is_layer(part) else part):
            parts = list(group)
            why = summed(reasons.get(part, Counter()) for part in parts)
            if not why or touched & set(parts):
                continue
            text, more = why.most_common(1)[0][0], len(why) - 1
            text += f"; {_counted(more, 'more reason')}" if more else ""
            lines = wrap(text, _NOTE_WIDTH, max_lines=2, placeholder=" …")
            self.notes.append(((rows[parts[0]][0] + sum(rows[parts[-1]])) / 2, lines))


def label(part: str) -> str:
    """Return the name of a part for people.

    Args:
        part: the first of a `Place`.

    Returns:
        For example ``Layer 3``.
    """
    if _is_layer(part):
        return f"Layer {part.rpartition('.')[2]}"
    return _LABELS.get(part, part.removeprefix("llm.")[:24])


def order(part: str) -> tuple[int, int, str]:
    """Return where a part stands in the stack.

    Args:
        part: the first of a `Place`.

    Returns:
        A key to sort by: stage, layer, name.
    """
    number = int(part.rpartition(".")[2]) if _is_layer(part) else 0
    stage = LAYERS if _is_layer(part) else part
    if stage not in _STAGES and component(stage) == "llm":
        stage = "llm"
    return _STAGES.index(stage) if stage in _STAGES else len(_STAGES), number, part


def summed(counts: Iterable[Counter[str]]) -> Counter[str]:
    """Add counts up.

    Args:
        counts: state -> tensors, for example of each lane.

    Returns:
        State -> tensors.
    """
    return sum(counts, Counter())


def box_state(counts: Mapping[str, int]) -> str:
    """Return the one word for a box.

    Args:
        counts: state -> tensors. Buffers say nothing, unless there is nothing else.

    Returns:
        A state of `STATES`, the rearranged ones before those merged as they are; `partly` where
        some tensors are merged and others not; `absent` for nothing at all.
    """
    there = [state for state in STATES if counts.get(state)]
    own = [state for state in there if state != "buffer"]
    if own and own[0] in MERGED and own[-1] in REST:
        return "partly"
    return own[-1] if own else there[0] if there else "absent"


def told(counts: Mapping[str, int]) -> str:
    """Say counts in words, one line a state.

    Args:
        counts: state -> tensors.

    Returns:
        For example ``2 tensors``, ``1 merged as they are``, ``1 unused``.
    """
    lines = [f"{counts[state]:,} {words}" for state, words in STATES.items() if counts.get(state)]
    return "\n".join((_counted(sum(counts.values()), "tensor"), *lines))


def _counted(count: int, word: str) -> str:
    return f"{count:,} {word}{'s' * (count != 1)}"


def _is_layer(part: str) -> bool:
    return part.startswith(f"{LAYERS}.")


def _narrowed(y: float, height: float) -> tuple[float, float]:
    """The end of a ribbon, a hair narrower than its edge, so that neighbours stay apart."""
    gap = min(0.8, 0.12 * height)
    return y + gap, height - 2 * gap

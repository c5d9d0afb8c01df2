"""What was inferred, as decisions and as the YAML file that a user reviews."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import yaml

from omnimerge.arch.family import Entry, Layout

Means = Literal["name", "shape", "cosine"]

_NUMBER = re.compile(r"\.\d+(?=\.)")
_MOST = 4  # alternatives that a message names
_ORDER = (
    "input_norm",
    "attn.q",
    "attn.k",
    "attn.v",
    "attn.q_norm",
    "attn.k_norm",
    "attn.o",
    "post_attention_norm",
    "pre_feedforward_norm",
    "mlp.gate",
    "mlp.up",
    "mlp.down",
    "post_feedforward_norm",
)


@dataclass(frozen=True, slots=True)
class Choice:
    """One decision.

    Attributes:
        what: a name inside a layer, or `layers`, `embed`, `norm` or `head`.
        chosen: what it is, in words: slots with their branch and, where they are fused, how; for
            `layers` to `head` the name on disk. Empty where it is none of the known slots and
            keeps its own words, and where the decision is open.
        by: what decided, or could not.
        margin: best minus second best cosine; None where names or shapes decide.
        sure: whether it may be used without asking.
        candidates: what was weighed, with its cosine where one was computed, the best first.
        reason: why it is open, or which words it keeps; for people.
    """

    what: str
    chosen: str
    by: Means
    margin: float | None = None
    sure: bool = True
    candidates: tuple[tuple[str, float | None], ...] = ()
    reason: str = ""

    def __str__(self) -> str:
        """What is open, and between what."""
        return f"{self.what} {self.reason}" if self.reason else f"{self.what} is {self.between}"

    @property
    def between(self) -> str:
        """The candidates, for example ``mlp.gate or mlp.up (cosine 0.52 against 0.49)``."""
        compared = [(name, value) for name, value in self.candidates if value is not None][:2]
        if compared:
            names = " or ".join(name for name, _ in compared)
            return f"{names} (cosine {' against '.join(f'{value:.2f}' for _, value in compared)})"
        left_out = len(self.candidates) - _MOST
        more = f" or {left_out} others" if left_out > 0 else ""
        return " or ".join(name for name, _ in self.candidates[:_MOST]) + more


def describe(entry: Entry) -> str:
    """Return an entry in words.

    Args:
        entry: the entry.

    Returns:
        For example ``attn.q+attn.k+attn.v grouped``.
    """
    branch = f"@{entry.branch}" if entry.branch else ""
    how = "" if entry.op == "rename" else f" {entry.op}"
    return f"{entry.label}{branch}{how}"


def write_text(layout: Layout, choices: Sequence[Choice], comments: Sequence[str]) -> str:
    """Write a layout as the YAML file that `read_layouts` reads.

    Args:
        layout: the layout.
        choices: how each of its lines was decided.
        comments: lines to begin with.

    Returns:
        The file. Decisions that are open stand in it as comments.
    """
    by_name = {choice.what: choice for choice in choices}
    prefix = _common(
        layout.layers,
        *(
            name
            for key, name in (("embed", layout.embed), ("norm", layout.norm))
            if by_name[key].sure
        ),
    )
    lines = [f"# {comment}" for comment in comments]
    lines += [f"name: {_scalar(layout.name)}", f"about: {_scalar(layout.about)}"]
    if layout.marker:
        lines.append(f"marker: {_scalar(layout.marker)}   # no other layout has this name")
    lines.append(f"prefix: {_scalar(prefix)}")
    ends = {"layers": layout.layers, "embed": layout.embed, "norm": layout.norm}
    for key, name in ends.items():
        lines.append(_line(key, _scalar(name[len(prefix) :]), by_name[key]))
    lines.append(_line("head", _scalar(layout.head), by_name["head"]))
    lines += _block(layout.block, choices)
    if layout.inserted:
        lines.append(f"inserted: {_scalar(layout.inserted)}   # such layers replace the attention")
    if layout.own:
        lines.append(f"own: {_flow(list(layout.own))}   # the checkpoint's own additions")
    return "\n".join(lines) + "\n"


def layout_text(layout: Layout) -> str:
    """Write a layout that is known as a file in the form that `read_layouts` reads.

    Args:
        layout: the layout.

    Returns:
        The file.
    """
    prefix = _common(layout.layers, layout.embed, layout.norm)
    keys = {"name": layout.name, "about": layout.about, "marker": layout.marker, "prefix": prefix}
    keys |= {"layers": layout.layers[len(prefix) :], "embed": layout.embed[len(prefix) :]}
    keys |= {"norm": layout.norm[len(prefix) :], "head": layout.head}
    keys["inserted"] = layout.inserted
    needed = ("prefix", "head")
    lines = [f"{k}: {_scalar(text)}" for k, text in keys.items() if text or k in needed]
    lines += ["block:", *(f"  {_scalar(n)}: {_value(e)}" for n, e in layout.block.items())]
    if layout.own:
        lines.append(f"own: {_flow(list(layout.own))}")
    if layout.components:
        lines += [
            "components:",
            *(f"  {_scalar(n)}: {_scalar(s)}" for n, s in layout.components.items()),
        ]
    return "\n".join(lines) + "\n"


def _block(block: Mapping[str, Entry], choices: Sequence[Choice]) -> list[str]:
    inner = [each for each in choices if each.what not in ("layers", "embed", "norm", "head")]
    known = sorted(
        (each for each in inner if each.what in block), key=lambda c: _rank(block[c.what])
    )
    lines = ["block:" if known else "block: {}"]
    lines += [f"  {_line(_scalar(c.what), _value(block[c.what]), c)}" for c in known]
    lines += [f"  # UNDECIDED: {choice}" for choice in inner if not choice.sure]
    kept = [each for each in inner if each.sure and each.what not in block]
    return [*lines, *dict.fromkeys(f"  # {_NUMBER.sub('.*', str(each))}" for each in kept)]


def _line(key: str, value: str, choice: Choice) -> str:
    if not choice.sure:
        return f"# UNDECIDED: {choice}"
    return f"{key}: {value}   # {_how(choice)}"


def _how(choice: Choice) -> str:
    if choice.reason:
        return choice.reason
    told = f"by {choice.by}"
    if choice.margin is not None:
        return f"{told}: {choice.candidates[0][1]:.2f}, margin {choice.margin:.2f}"
    value = next((value for _, value in choice.candidates if value is not None), None)
    return told if value is None else f"{told}; cosine {value:.2f}"


def _value(entry: Entry) -> str:
    branch = f"@{entry.branch}" if entry.branch else ""
    if entry.op == "rename":
        return _scalar(f"{entry.label}{branch}")
    content: dict[str, object] = {entry.op: list(entry.slots)}
    return _flow({**content, "branch": entry.branch} if entry.branch else content)


def _rank(entry: Entry) -> tuple[str, int]:
    first = entry.slots[0]
    return (entry.branch, _ORDER.index(first) if first in _ORDER else len(_ORDER))


def _common(*names: str) -> str:
    """What all names begin with, up to a dot."""
    shortest = min(names, key=len)
    size = next(
        (i for i in range(len(shortest)) if len({name[i] for name in names}) > 1), len(shortest)
    )
    # The number of the layer belongs to `layers`.
    size = min(size, names[0].index("{i}"))
    return names[0][: names[0].rfind(".", 0, size) + 1]


def _scalar(text: str) -> str:
    return yaml.safe_dump(text, width=1 << 20, allow_unicode=True).removesuffix("...\n").strip()


def _flow(content: object) -> str:
    return yaml.safe_dump(content, default_flow_style=True, width=1 << 20, sort_keys=False).strip()

"""Infer the layout of a checkpoint that no table knows, for its user to review.

Names decide where they are unambiguous and shapes agree; then shapes, where only one slot is left;
then the cosine with a sibling over the same LLM whose layout is known, where its margin suffices.
What is still open is said, and never guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from omnimerge.arch.detect import slots_of
from omnimerge.arch.family import Layout
from omnimerge.arch.inference.block import infer_block
from omnimerge.arch.inference.cosine import Likeness
from omnimerge.arch.inference.ends import find_ends
from omnimerge.arch.inference.stack import Stack, find_stack
from omnimerge.arch.inference.text import Choice, write_text
from omnimerge.arch.layout import SlotMap
from omnimerge.arch.layout import layouts as known_layouts
from omnimerge.checkpoint import Checkpoint
from omnimerge.errors import LayoutError


@dataclass(frozen=True)
class Inferred:
    """A layout, and how it came about.

    Attributes:
        layout: the layout; what is open is left out of it.
        choices: every decision: `layers`, `embed`, `norm` and `head`, then the names in a layer.
        text: the layout as a YAML file, to be reviewed and given with ``--layout``.
    """

    layout: Layout
    choices: tuple[Choice, ...]
    text: str

    def open_choices(self) -> tuple[Choice, ...]:
        """Return the decisions that the checkpoint's user must make."""
        return tuple(choice for choice in self.choices if not choice.sure)


def infer_layout(
    checkpoint: Checkpoint,
    other: Checkpoint | None = None,
    *,
    slots: SlotMap | None = None,
    layouts: Sequence[Layout] = (),
    margin: float = 0.2,
) -> Inferred:
    """Infer how a checkpoint names its language model.

    Args:
        checkpoint: the checkpoint.
        other: a checkpoint over the same LLM whose layout is known, to compare matrices with.
        slots: the slots of `other`, where they are at hand.
        layouts: layouts that the user gave, for `other`.
        margin: what a choice by cosine needs: how much better than the second best it must be.

    Returns:
        The layout with its decisions; ask `open_choices` or `require_sure` before it is used.

    Raises:
        LayoutError: if no stack of layers or no embedding can be found, or `other` fits no layout.
    """
    stack = find_stack(checkpoint)
    likeness = None
    if other:
        likeness = Likeness(checkpoint, other, slots or slots_of(other, layouts))
    embed, norm, head = find_ends(checkpoint, stack, likeness, margin)
    root = f"{stack.root}." if stack.root else ""
    name = checkpoint.folder.name
    layout = Layout(
        name=name,
        about=f"{name}, inferred",
        layers=stack.prefix,
        embed=embed.chosen or f"{root}embed_tokens",
        norm=norm.chosen or f"{root}norm",
        head=head.chosen or "lm_head",
        block={},
        inserted=stack.inserted,
        own=stack.own,
    )
    block, inner = infer_block(checkpoint, stack, layout, likeness, margin)
    layout = replace(layout, block=block, marker=_marker(stack, layout))
    layers = Choice("layers", stack.prefix, "shape")
    choices = (layers, embed, norm, head, *inner)
    return Inferred(
        layout, choices, write_text(layout, choices, _comments(checkpoint, likeness, margin))
    )


def require_sure(inferred: Inferred, where: str) -> None:
    """Refuse a layout with open decisions.

    Args:
        inferred: what `infer_layout` returned.
        where: the checkpoint's name, for the message.

    Raises:
        LayoutError: if a decision is open; with all of them, their candidates and cosines.
    """
    if found := inferred.open_choices():
        raise LayoutError(
            f"the layout of {where} cannot be inferred for certain: "
            f"{'; '.join(map(str, found))}; give --layout FILE with these lines filled in "
            f"(`omnimerge layout {where}` writes the others)"
        )


def _comments(checkpoint: Checkpoint, likeness: Likeness | None, margin: float) -> list[str]:
    found = [
        f"Layout of {checkpoint.folder}, inferred: check every line, then give it with --layout."
    ]
    if likeness:
        other = likeness.other
        found.append(
            f"Compared with {other.checkpoint.folder} (layout {other.slots.layout.name}); a choice "
            f"by cosine needs a margin of {margin:g}."
        )
    return found


def _marker(stack: Stack, layout: Layout) -> str:
    """A name that keeps the layout from fitting checkpoints of a known one with the same ends."""
    ends = (layout.layers, layout.embed, layout.norm)
    alike = [each for each in known_layouts() if (each.layers, each.embed, each.norm) == ends]
    known = {name for each in alike for name in each.block}
    first = stack.prefix.replace("{i}", "0")
    new = [
        part.name for part in stack.parts.values() if part.name not in known and 0 in part.weights
    ]
    return f"{first}{new[0]}." if alike and new else ""

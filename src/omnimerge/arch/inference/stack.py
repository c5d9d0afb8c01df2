"""The language model in a checkpoint without a table: the largest repeated stack, and its parts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from omnimerge.arch.inference.words import is_foreign, says
from omnimerge.checkpoint import Checkpoint
from omnimerge.errors import LayoutError

# What share of a stack is under names that more than one layer has; less where layers take turns.
_REPEATED = 0.1


@dataclass(frozen=True, slots=True)
class Part:
    """One name inside the layers.

    Attributes:
        name: without its leaf.
        shape: of the weight; empty where there is none, or the layers differ.
        weights: layer on disk -> the weight's name.
    """

    name: str
    shape: tuple[int, ...]
    weights: Mapping[int, str]


@dataclass(frozen=True)
class Stack:
    """The layers of the language model.

    Attributes:
        prefix: prefix of the layers, with ``{i}``.
        count: layers, those included that were inserted.
        width: size of the residual stream.
        parts: the names inside a layer, by name, without the own and the inserted ones.
        own: words of a name inside a layer that is the checkpoint's own addition.
        inserted: with what a name starts in a layer that is none of the language model's own.
    """

    prefix: str
    count: int
    width: int
    parts: Mapping[str, Part]
    own: tuple[str, ...]
    inserted: str

    @property
    def root(self) -> str:
        """What stands before the component with the layer's number."""
        return self.prefix.partition("{i}")[0].rstrip(".").rpartition(".")[0]


def find_stack(checkpoint: Checkpoint) -> Stack:
    """Find the language model's layers.

    Args:
        checkpoint: the checkpoint.

    Returns:
        The stack with the most parameters that repeat, of those whose prefix is no other model's.

    Raises:
        LayoutError: if there is none.
    """
    stacks = _stacks(checkpoint)
    own = {prefix: sizes for prefix, sizes in stacks.items() if not is_foreign(prefix)}
    if not own:
        left_out = "; left out by their words: " + ", ".join(sorted(stacks)) if stacks else ""
        raise LayoutError(
            f"{checkpoint.folder} holds no stack of layers, numbered from 0, that can be a "
            f"language model's{left_out}; write its layout by hand and give it with --layout"
        )
    # A list of modules, one of them the language model, is larger, but next to nothing repeats.
    alike = [prefix for prefix, (repeated, total) in own.items() if repeated > _REPEATED * total]
    prefix = max(alike or own, key=lambda each: own[each][1])
    names: dict[int, list[str]] = {}
    for name in checkpoint.tensors:
        if match := re.match(re.escape(prefix) + r"(\d+)\.", name):
            names.setdefault(int(match.group(1)), []).append(name)
    inner = {i: [name[len(f"{prefix}{i}.") :] for name in names[i]] for i in sorted(names)}
    inserted, additions = _additions(inner)
    parts = _parts(checkpoint, prefix, inner, inserted, additions)
    return Stack(
        prefix=f"{prefix}{{i}}.",
        count=len(inner),
        width=_width(checkpoint, parts),
        parts=parts,
        own=additions,
        inserted=inserted,
    )


def _stacks(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """Prefix of every gap-free stack -> elements of names that repeat, and of all."""
    sizes: dict[str, dict[str, dict[int, int]]] = {}
    for name, meta in checkpoint.tensors.items():
        for match in re.finditer(r"(?<!\d)\d+(?=\.)", name):
            rest = sizes.setdefault(name[: match.start()], {})
            rest.setdefault(name[match.end() + 1 :], {})[int(match.group())] = meta.numel
    found = {}
    for prefix, rest in sizes.items():
        numbers = {number for by_number in rest.values() for number in by_number}
        if numbers == set(range(len(numbers))):
            repeated = sum(sum(each.values()) for each in rest.values() if len(each) > 1)
            found[prefix] = (repeated, sum(sum(each.values()) for each in rest.values()))
    return found


def _additions(inner: Mapping[int, list[str]]) -> tuple[str, tuple[str, ...]]:
    """What inserted layers start with, and the words of own additions."""
    own = {word for names in inner.values() for name in names if (word := says("own", name))}
    crossed = {
        i: {stem for name in names if says("cross", stem := name.rpartition(".")[0])}
        for i, names in inner.items()
    }
    across = {i for i, stems in crossed.items() if stems}
    if not across:
        return "", tuple(sorted(own))
    plain = [set(names) for i, names in inner.items() if i not in across]
    # An inserted layer attends to images instead of to the text, not beside it.
    missing = plain and set.intersection(*plain) - set().union(*(inner[i] for i in across))
    words = {says("cross", stem) for stems in crossed.values() for stem in stems}
    first = {stem.partition(".")[0] for stems in crossed.values() for stem in stems}
    if missing and words == first and len(words) == 1:
        return f"{words.pop()}.", tuple(sorted(own))
    return "", tuple(sorted(own | words))


def _parts(
    checkpoint: Checkpoint,
    prefix: str,
    inner: Mapping[int, list[str]],
    inserted: str,
    own: Iterable[str],
) -> dict[str, Part]:
    weights: dict[str, dict[int, str]] = {}
    for i, names in inner.items():
        if inserted and any(name.startswith(inserted) for name in names):
            continue
        for name in names:
            stem, _, leaf = name.rpartition(".")
            if stem and not any(word in name for word in own):
                held = weights.setdefault(stem, {})
                if leaf == "weight":
                    held[i] = f"{prefix}{i}.{name}"
    found = {}
    for stem, held in weights.items():
        shapes = {checkpoint.tensors[name].shape for name in held.values()}
        found[stem] = Part(stem, shapes.pop() if len(shapes) == 1 else (), held)
    return found


def _width(checkpoint: Checkpoint, parts: Mapping[str, Part]) -> int:
    """The size that most matrices of a layer have on one side, and most vectors."""
    matrices = [part.shape for part in parts.values() if len(part.shape) == 2]
    vectors = [part.shape[0] for part in parts.values() if len(part.shape) == 1]
    sides = Counter(size for shape in matrices for size in set(shape))
    if not sides:
        raise LayoutError(
            f"the layers of {checkpoint.folder} hold no matrices of one shape, so that its layout "
            "cannot be inferred; write it by hand and give it with --layout"
        )
    return max(sides, key=lambda size: (sides[size], vectors.count(size)))

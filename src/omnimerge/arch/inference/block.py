"""What the names inside a layer stand for: by name, by shape, by cosine, or left open."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from omnimerge.arch.family import BRANCHES, Entry, Layout, split_branch
from omnimerge.arch.geometry import Geometry, geometry
from omnimerge.arch.inference.cosine import Likeness, assign, places
from omnimerge.arch.inference.sizes import DOWN, NEEDED, Sizes
from omnimerge.arch.inference.stack import Part, Stack
from omnimerge.arch.inference.text import Choice, Means, describe
from omnimerge.arch.inference.words import entry_by_name, says, split_words
from omnimerge.arch.layout import SlotMap
from omnimerge.checkpoint import Checkpoint

_TEXT, _VISION = BRANCHES
# More matrices than this that shapes leave open are no attention and no MLP.
_MANY = 32

Cosine = Callable[[Part, Entry], float | None]


def infer_block(
    checkpoint: Checkpoint,
    stack: Stack,
    layout: Layout,
    likeness: Likeness | None,
    margin: float,
) -> tuple[dict[str, Entry], tuple[Choice, ...]]:
    """Decide what every name inside a layer stands for.

    Args:
        checkpoint: the checkpoint.
        stack: its layers.
        layout: where they are, with an empty block.
        likeness: cosines with a sibling, where there is one.
        margin: what a choice by cosine needs.

    Returns:
        The layout's block, and the decision on every name, the open ones included.
    """
    told = {name: entry_by_name(split_words(name)[0]) for name in stack.parts}
    kept = {name for name in stack.parts if _is_kept(name, stack.parts)}
    slots = _bare_slots(checkpoint, layout)
    mine = geometry(checkpoint, slots)
    theirs = likeness.other.sizes if likeness else mine
    sizes = _sizes(stack, told, kept, mine if mine.heads else theirs)
    compared: Cosine | None = None
    if likeness:
        compared = partial(likeness.of_part, slots=slots, sizes=_cut_sizes(mine, sizes))
    block = _Block(stack.parts, sizes, margin, likeness, compared)
    block.by_name(told, kept)
    block.by_shape()
    block.check()
    block.by_cosine()
    block.doubt()
    block.copy_to_twins()
    return block.entries, tuple(block.choices[name] for name in stack.parts)


class _Block:
    """The decisions on the names inside a layer, from the surest means to the weakest.

    Args:
        parts: the names.
        sizes: the sizes of a layer.
        margin: what a choice by cosine needs.
        likeness: which slots the sibling has, where there is one.
        compared: gives the cosine of a name's tensors with an entry of the sibling.
    """

    def __init__(
        self,
        parts: Mapping[str, Part],
        sizes: Sizes,
        margin: float,
        likeness: Likeness | None,
        compared: Cosine | None,
    ) -> None:
        self.entries: dict[str, Entry] = {}
        self.choices: dict[str, Choice] = {}
        self._parts = parts
        self._sizes = sizes
        self._margin = margin
        self._twins = _twins(parts)
        self._unknown: list[str] = []
        self._copies: dict[str, Entry] = {}  # names that say the same as another one
        self._claimed: set[str] = set()  # places that a name says it takes, wrongly perhaps
        self._likeness = likeness
        self._compared = compared
        self._cosines: dict[tuple[str, Entry], float | None] = {}

    def by_name(self, told: Mapping[str, Entry | None], kept: set[str]) -> None:
        """Decide what names tell and shapes do not contradict."""
        named: dict[str, Entry] = {}
        copies = set(self._twins.values())
        for name, part in self._parts.items():
            if name in copies:
                continue
            entry = told[name]
            if name in kept or (entry is None and not part.weights):
                self._keep(name, "name", "keeps its own words")
            elif entry is None:
                self._unknown.append(name)
            elif part.weights and not self._sizes.fits(entry, part.shape):
                choice = Choice(name, "", "name", reason=_misfit(entry, part, self._sizes))
                self._contradict(self._branched(name, entry), choice, ((describe(entry), None),))
            else:
                named[name] = self._branched(name, entry)
        for name, entry in named.items():
            if any(self._clash(name, entry, other, it) for other, it in named.items()):
                self._copies[name] = entry
                self._unknown.append(name)
            else:
                self._take(name, entry, Choice(name, describe(entry), "name"))

    def by_shape(self) -> None:
        """Decide what fits no slot, or only one that is left and nothing else fits."""
        for name in list(self._unknown):
            if not self._options(name):
                self._unknown.remove(name)
                self._keep(name, "shape", "keeps its own words: its shape fits no slot")
        found = True
        while found:
            found = False
            for name in list(self._unknown):
                free = self._free(name)
                others = [o for each in self._unknown if each != name for o in self._free(each)]
                if name in self._copies or len(free) != 1:
                    continue
                if not any(places(free[0]) & places(other) for other in others):
                    self._unknown.remove(name)
                    self._take(name, free[0], Choice(name, describe(free[0]), "shape"))
                    found = True

    def check(self) -> None:
        """Reopen what names or shapes decided, where another slot fits better."""
        for name in list(self.entries):
            self._check(name)

    def by_cosine(self) -> None:
        """Decide the rest by the cosines with the sibling's slots, or leave it open."""
        fixed = [name for name in self.entries if self._values(name, [self.entries[name]])]
        compared = [name for name in self._unknown if self._values(name, self._options(name))]
        compared = compared if len(compared) <= _MANY else []
        scores = [self._values(name, [self.entries[name]]) for name in fixed]
        scores += [self._values(name, self._options(name)) for name in compared]
        found = dict(zip([*fixed, *compared], assign(scores), strict=True))
        for name in self._unknown:
            entry, lost = found.get(name, (None, 0.0))
            taken = entry is not None and bool(places(entry) & self._taken())
            if lost < self._margin or taken:
                self._leave_open(name)
            elif entry is None:
                self._keep(name, "cosine", "keeps its own words: it resembles no slot that is left")
            else:
                weighed = self._weighed(name, entry)
                chosen = Choice(name, describe(entry), "cosine", lost, candidates=weighed)
                self.entries[name], self.choices[name] = entry, chosen
        self._unknown = []

    def doubt(self) -> None:
        """Reopen what fits no slot where slots that every layer has are missing."""
        still_open = [name for name, choice in self.choices.items() if not choice.sure]
        taken = self._taken().union(*(places(e) for n in still_open for e in self._options(n)))
        missing = [each for each in NEEDED if each not in {split_branch(p)[0] for p in taken}]
        for name, choice in self.choices.items():
            shape = self._parts[name].shape
            matrix = len(shape) == 2 and self._sizes.width in shape
            if missing and matrix and choice.by == "shape" and choice.sure and not choice.chosen:
                reason = (
                    f"has a shape, {_times(shape)}, that fits no slot, while {', '.join(missing)} "
                    "have no tensor: check num_attention_heads and its like in config.json"
                )
                self.choices[name] = replace(choice, sure=False, reason=reason)

    def copy_to_twins(self) -> None:
        """Let every copy for images be what its text twin is."""
        for name, twin in self._twins.items():
            choice, entry = self.choices[name], self.entries.get(name)
            if entry is None:
                told = tuple((_other(label), value) for label, value in choice.candidates)
                reason = _other(choice.reason)
                self.choices[twin] = replace(choice, what=twin, candidates=told, reason=reason)
                continue
            branched = replace(entry, branch=_VISION)
            self._take(twin, branched, replace(choice, what=twin, chosen=describe(branched)))
            self._check(twin)

    def _check(self, name: str) -> None:
        entry, choice = self.entries[name], self.choices[name]
        values = self._values(name, [entry, *self._options(name)])
        if entry not in values:
            return
        weighed = self._weighed(name, entry)
        best = max(values, key=lambda each: values[each])
        if values[best] <= values[entry] + self._margin:
            self.choices[name] = replace(choice, candidates=weighed)
            return
        reason = (
            f"is {describe(entry)} by its {choice.by}, but resembles {describe(best)} "
            f"(cosine {values[entry]:.2f} against {values[best]:.2f})"
        )
        self._contradict(self.entries.pop(name), replace(choice, reason=reason), weighed)

    def _contradict(
        self, entry: Entry, choice: Choice, candidates: tuple[tuple[str, float | None], ...]
    ) -> None:
        """Leave a name open that something speaks against; no other one gets its slot."""
        self._claimed |= places(entry)
        self.choices[choice.what] = replace(choice, chosen="", sure=False, candidates=candidates)

    def _leave_open(self, name: str) -> None:
        """Say between what the choice is."""
        free, all_ = self._free(name), self._options(name)
        part = self._parts[name]
        weighed = [(describe(each), self._cosine(name, each)) for each in free or all_]
        weighed.sort(key=lambda pair: -1.0 if pair[1] is None else pair[1], reverse=True)
        compared = any(value is not None for _, value in weighed)
        by: Means = "cosine" if compared or len(part.shape) == 2 else "shape"
        choice = Choice(name, "", by, sure=False, candidates=tuple(weighed))
        if not free:
            choice = replace(choice, reason=f"fits only what other names are: {choice.between}")
        self.choices[name] = choice

    def _keep(self, name: str, by: Means, reason: str) -> None:
        self.choices[name] = Choice(name, "", by, reason=reason)

    def _take(self, name: str, entry: Entry, choice: Choice) -> None:
        self.entries[name], self.choices[name] = entry, choice

    def _options(self, name: str) -> list[Entry]:
        """All that a tensor can be by its shape, or by its name where that is not the only one."""
        if entry := self._copies.get(name):
            return [replace(entry, branch=each) for each in BRANCHES]
        shape = self._parts[name].shape
        options = [*self._sizes.matrices(shape), *self._sizes.vectors(shape)]
        if self._likeness:
            options = [each for each in options if self._likeness.has(each)]
        return [self._branched(name, each) for each in options]

    def _free(self, name: str) -> list[Entry]:
        return [each for each in self._options(name) if not places(each) & self._taken()]

    def _taken(self) -> set[str]:
        return self._claimed.union(*map(places, self.entries.values()))

    def _branched(self, name: str, entry: Entry) -> Entry:
        return replace(entry, branch=_TEXT) if name in self._twins else entry

    def _clash(self, name: str, entry: Entry, other: str, it: Entry) -> bool:
        """Whether two names of one layer say the same."""
        layers, others = (set(self._parts[each].weights) for each in (name, other))
        apart = layers and others and not layers & others
        return name != other and bool(places(entry) & places(it)) and not apart

    def _values(self, name: str, options: list[Entry]) -> dict[Entry, float]:
        values = {each: self._cosine(name, each) for each in options}
        return {each: value for each, value in values.items() if value is not None}

    def _weighed(self, name: str, entry: Entry) -> tuple[tuple[str, float | None], ...]:
        """Cosines of the entry that was chosen and of the best other ones."""
        values = self._values(name, [entry, *self._options(name)])
        others = sorted(set(values) - {entry}, key=lambda each: values[each], reverse=True)
        return tuple((describe(each), values[each]) for each in (entry, *others[:3]))

    def _cosine(self, name: str, entry: Entry) -> float | None:
        part = self._parts[name]
        if not self._compared or len(part.shape) != 2:
            return None  # vectors are near-constant: any two of them are alike
        if (name, entry) not in self._cosines:
            self._cosines[name, entry] = self._compared(part, entry)
        return self._cosines[name, entry]


def _twins(parts: Mapping[str, Part]) -> dict[str, str]:
    """Name -> the name of its copy for images, where words tell the two apart."""
    groups: dict[str, dict[str, str]] = {}
    single = Counter(split_words(name) for name in parts)
    for name in parts:
        stem, branch = split_words(name)
        if single[stem, branch] == 1:
            groups.setdefault(stem, {})[branch] = name
    return {
        group[text]: group[_VISION]
        for group in groups.values()
        for text in (_TEXT, "")
        if set(group) == {text, _VISION} and parts[group[text]].shape == parts[group[_VISION]].shape
    }


def _is_kept(name: str, parts: Mapping[str, Part]) -> bool:
    """Whether no slot stands for a name: experts, what routes to them, and other mixers."""
    if says("keep", split_words(name)[0]):
        return True
    above, _, word = name.rpartition(".")
    return word == "gate" and any(
        other.startswith(f"{above}.") and says("keep", other[len(above) + 1 :]) for other in parts
    )


def _bare_slots(checkpoint: Checkpoint, layout: Layout) -> SlotMap:
    names = list(checkpoint.tensors)
    by_name = layout.slots(names)
    by_slot = {slot: name for name, slot in by_name.items()}
    return SlotMap(layout, by_slot, by_name, layout.layer_numbers(names))


def _sizes(
    stack: Stack, told: Mapping[str, Entry | None], kept: set[str], config: Geometry
) -> Sizes:
    head = config.head_dim or (stack.width // config.heads if config.heads else None)
    query = head * config.heads if head and config.heads else None
    key = head * (config.kv_heads or config.heads) if head and config.heads else None
    parts = [part for name, part in stack.parts.items() if name not in kept and part.shape]
    # The down projection shows the width of the MLP; what configs call so may be another number.
    wide = [p for p in parts if len(p.shape) == 2 and p.shape[0] == stack.width]
    named = [p.shape[1] for p in wide if told[p.name] == Entry((DOWN,))]
    others = {p.shape[1] for p in wide if p.shape[1] != query and not told[p.name]}
    inner = named[0] if named else config.intermediate_size
    if not named and len(others) == 1:
        inner = others.pop()
    return Sizes(stack.width, head, query, key, inner)


def _cut_sizes(mine: Geometry, sizes: Sizes) -> Geometry:
    if not sizes.head or not sizes.query or not sizes.key:
        return mine
    heads, kv_heads = sizes.query // sizes.head, sizes.key // sizes.head
    return replace(mine, head_dim=sizes.head, heads=heads, kv_heads=kv_heads)


def _misfit(entry: Entry, part: Part, sizes: Sizes) -> str:
    if not part.shape:
        return f"is called {describe(entry)}, but has another shape in some layers"
    shape = _times(part.shape)
    if entry.slots[0].endswith("norm"):
        return f"is called {describe(entry)}, but has the shape {shape}"
    rows, columns = zip(*(sizes.shape(slot) for slot in entry.slots), strict=True)
    expected = _times((sum(each or 0 for each in rows), columns[0] or 0))
    return f"is called {describe(entry)}, but has the shape {shape} instead of {expected}"


def _other(text: str) -> str:
    return text.replace(f"@{_TEXT}", f"@{_VISION}")


def _times(shape: tuple[int, ...]) -> str:
    return " × ".join(f"{size:,}" if size else "any" for size in shape)

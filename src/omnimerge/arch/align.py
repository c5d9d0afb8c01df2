"""Align a donor with a target: every tensor of both is accounted for, or the pair is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from omnimerge.arch.alignment import Alignment, Lost, Merged
from omnimerge.arch.family import (
    BRANCHES,
    COMPONENTS,
    EMBED,
    HEAD,
    VOCABULARY_SLOTS,
    Layout,
    split_branch,
)
from omnimerge.arch.gates import check_ancestor, check_completeness, check_geometry
from omnimerge.arch.geometry import geometry
from omnimerge.arch.heterogeneity import heterogeneity
from omnimerge.arch.inference import slots_of_all
from omnimerge.arch.layout import SlotMap, check_used, component, is_buffer
from omnimerge.arch.reasons import (
    BUFFER,
    component_reason,
    head_slot,
    mergeable,
    unmergeable,
    unselected,
    vocabulary_reason,
)
from omnimerge.arch.rows import Piece, Run, SlotRows, compose
from omnimerge.arch.vocabulary import shared_rows
from omnimerge.checkpoint import Checkpoint, Segment
from omnimerge.errors import RecipeError, suggestion

SELECTIONS = ("all", "language_model", "linear")
VOCABULARIES = ("auto", "target", "overlap")
BRANCH_KEYS = ("shared", *BRANCHES)
BRANCH_VALUES = ("text", "vision", "keep")

NO_COUNTERPART = Lost("the donor has no such tensor")
NO_PLACE = Lost("the target has no such tensor")
OTHER_BRANCH = "the target's tensor gets the donor's other branch"


def align(
    target: Checkpoint,
    donor: Checkpoint,
    *,
    select: str = "language_model",
    vocabulary: str = "auto",
    branches: Mapping[str, str] | None = None,
    layouts: Sequence[Layout] = (),
    slots: tuple[SlotMap, SlotMap] | None = None,
    ancestor: bool = True,
) -> Alignment:
    """Map a donor's tensors onto a target's.

    The language models are matched slot by slot, fused tensors row by row. Any other component is
    matched only if both have the same slots and shapes in it. The ancestor test reads a sample of
    the mapped matrices; everything else reads headers only.

    A slot that a checkpoint holds twice, for text and for images, is matched as the AdaMMS paper
    (Section 3.1) and its scripts do: branch by branch where both hold it twice; a donor's single
    tensor goes into both branches of the target; of a donor's two, a target's single tensor gets
    the text branch.

    Args:
        target: the checkpoint whose architecture the output has.
        donor: the checkpoint that is mapped onto it.
        select: which target tensors may be merged: `all`, `language_model` or `linear`.
        vocabulary: `auto` merges embedding and head where both vocabularies are equal; `overlap`
            merges the rows of the tokens that both have; `target` keeps the target's.
        branches: what else feeds the target's `shared`, `text` or `vision` tensors: the donor's
            `text` or `vision` branch, or nothing (`keep`).
        layouts: layouts that the user gave.
        slots: the slots of target and donor, where they are at hand.
        ancestor: whether to run the ancestor test.

    Returns:
        The alignment; ask `reasons` whether it may be used.

    Raises:
        LayoutError: if either checkpoint fits no known layout, or the tokens that `overlap` needs
            cannot be read.
        RecipeError: if `select`, `vocabulary` or `branches` is none of the words above.
    """
    _check_words(select, vocabulary, branches or {})
    if slots is None:
        found, notes = slots_of_all([target, donor], layouts)
        check_used(layouts, found.values())
        slots = found[target], found[donor]
    else:
        notes = []
    ours, theirs = slots
    result = Alignment(target, donor, ours, theirs, geometry(target, ours), geometry(donor, theirs))
    result.notes += notes
    check_geometry(result)
    matcher = _Matcher(result, select, vocabulary, branches or {}, may_read=ancestor)
    matcher.match()
    if ancestor:
        check_ancestor(result)
    matcher.account_for_donor()
    check_completeness(result)
    result.heterogeneity = heterogeneity(result)
    result.check_accounting()
    return result


def _check_words(select: str, vocabulary: str, branches: Mapping[str, str]) -> None:
    words = [("select", select, SELECTIONS), ("vocabulary", vocabulary, VOCABULARIES)]
    words += [("branches", key, BRANCH_KEYS) for key in branches]
    words += [(f"branches.{key}", value, BRANCH_VALUES) for key, value in branches.items()]
    for key, value, known in words:
        if value not in known:
            hint = suggestion(value, known)
            raise RecipeError([f"{key}: {value!r} is none of {', '.join(known)}{hint}"], "the call")


class _Matcher:
    """Finds for every target tensor what of the donor it gets, or why it gets nothing."""

    def __init__(
        self,
        result: Alignment,
        select: str,
        vocabulary: str,
        branches: Mapping[str, str],
        *,
        may_read: bool,
    ) -> None:
        self._result = result
        self._select = select
        self._branches = branches
        self._ours = SlotRows(result.target, result.target_slots, result.target_geometry)
        self._theirs = SlotRows(result.donor, result.donor_slots, result.donor_geometry)
        self._component_reason = {name: component_reason(result, name) for name in COMPONENTS}
        self._head_slot = head_slot(result, may_read=may_read)
        self._vocabulary_reason = vocabulary_reason(result, vocabulary)
        self._runs: dict[str, list[Run]] = {}
        self._misfits: list[str] = []
        if vocabulary == "overlap":
            self._overlap()

    def match(self) -> None:
        result = self._result
        for name, slot in result.target_slots.by_name.items():
            shape = result.target.tensors[name].shape
            reason = unselected(slot, len(shape), self._select)
            if not reason and slot in VOCABULARY_SLOTS:
                reason = self._vocabulary_reason
            reason = reason or self._component_reason[component(slot)] or unmergeable(result, name)
            found = reason or self._find(name, slot)
            if isinstance(found, str):
                result.kept[name] = found
            else:
                result.merged.append(found)
        if self._misfits:
            count, first = len(self._misfits), self._misfits[0]
            more = f"{count} tensors have other shapes, such as: " if count > 1 else ""
            result.refuse("geometry", f"{more}{first}")

    def account_for_donor(self) -> None:
        result = self._result
        used = {source for m in result.merged for source in m.sources}
        for name, slot in result.donor_slots.by_name.items():
            if name not in used:
                result.unused[name] = self._why_unused(name, slot)
        self._account_for_rows()

    def _find(self, name: str, slot: str) -> Merged | str:
        """What the tensor gets from the donor, or why nothing."""
        pieces = self._ours.by_name[name]
        feeds: dict[str, str] = {}
        rules: dict[str, None] = {}
        for piece in pieces:
            if piece.slot not in feeds:
                feed, rule = self._feed(piece.slot)
                if not feed:
                    return rule
                feeds[piece.slot] = feed
                rules[rule] = None
        if wrong := self._misfit(name, feeds):
            return wrong
        rule = ", ".join(each for each in rules if each)
        donor = {ours: self._theirs.by_slot[theirs] for ours, theirs in feeds.items()}
        source = donor[pieces[0].slot][0].name
        whole = len(pieces) == 1 and self._theirs.whole(source) and slot not in self._runs
        if whole:
            op = "tied" if slot == HEAD and feeds[slot] == EMBED else "rename"
            return Merged(name, (source,), op, slot, rule)
        return self._joined(name, slot, pieces, donor, rule)

    def _feed(self, slot: str) -> tuple[str, str]:
        """The donor's slot for a slot of the target, and the rule; or nothing, and why."""
        wanted = self._head_slot if slot == HEAD else slot
        base, branch = split_branch(wanted)
        theirs = self._theirs.by_slot
        policy = self._branches.get(branch or "shared")
        doubled = any(f"{base}@{each}" in theirs for each in BRANCHES)
        if policy == "keep" and (branch or doubled):
            return "", f"branches: {branch or 'shared'}: keep"
        if policy and doubled:
            if f"{base}@{policy}" not in theirs:
                return "", NO_COUNTERPART
            return f"{base}@{policy}", f"branches: the donor's {policy} branch"
        if wanted in theirs:
            return wanted, f"{branch} branch to {branch} branch" if branch else ""
        if branch and base in theirs:
            return base, f"the donor's one tensor into the {branch} branch"
        if not branch and f"{base}@text" in theirs:
            return f"{base}@text", "the donor's text branch"
        tied = self._result.donor_geometry.tied
        if base == HEAD and EMBED in theirs and tied:  # the embedding is the head
            return EMBED, "the donor's head is its embedding"
        return "", NO_COUNTERPART

    def _misfit(self, name: str, feeds: Mapping[str, str]) -> str | None:
        result = self._result
        for slot, feed in feeds.items():
            ours, theirs = self._ours.shape(slot), self._theirs.shape(feed)
            same = ours == theirs
            if slot in self._runs:
                same = (ours or ())[1:] == (theirs or ())[1:]
            source = self._theirs.by_slot[feed][0].name
            if not same:
                if component(slot) == "llm":
                    ours_name = name if self._ours.whole(name) else f"{slot} of {name}"
                    their_name = source if self._theirs.whole(source) else f"{feed} of {source}"
                    self._misfits.append(
                        f"{ours_name} has shape {ours}, the donor's {their_name} {theirs}"
                    )
                return "shapes differ"
            dtype = result.donor.tensors[source].dtype
            if not mergeable(dtype):
                return Lost(f"the donor's is stored as {dtype}")
        slot = next(iter(feeds))
        if slot in self._runs and not self._runs[slot]:
            return "the tokenizers have no token in common"
        return None

    def _joined(
        self,
        name: str,
        slot: str,
        pieces: Sequence[Piece],
        donor: Mapping[str, Sequence[Piece]],
        rule: str,
    ) -> Merged:
        segments: list[Segment] = []
        parts: list[tuple[str, int, int]] = []
        for held, each in compose(pieces, donor, self._runs):
            last = segments[-1] if segments else None
            if last and last.name == each.name and last.offset + last.count == each.offset:
                segments[-1] = Segment(last.start, last.count + each.count, last.name, last.offset)
            else:
                segments.append(each)
            if each.name is None:
                continue
            before, first, length = parts[-1] if parts else ("", 0, 0)
            if before == held and first + length == each.start:
                parts[-1] = (held, first, length + each.count)
            else:
                parts.append((held, each.start, each.count))
        sources = tuple(dict.fromkeys(s.name for s in segments if s.name is not None))
        if slot in self._runs:
            op, rule = "overlap", self._overlap_rule(slot, rule)
        elif self._ours.whole(name):
            op = "split"
        else:
            whole = all(self._theirs.whole(source) for source in sources)
            op = "concat" if whole else "regroup"
        if len(segments) == 1 and self._covers(segments[0], name):
            return Merged(name, sources, "rename", slot, rule, tuple(parts))
        return Merged(name, sources, op, slot, rule, tuple(parts), tuple(segments))

    def _covers(self, segment: Segment, name: str) -> bool:
        """Whether a segment is one donor tensor, whole, in the target's shape."""
        theirs = self._result.donor.tensors[str(segment.name)]
        return segment.offset == 0 and theirs.shape == self._result.target.tensors[name].shape

    def _overlap(self) -> None:
        result = self._result
        rows = shared_rows(result.target.folder, result.donor.folder)
        for slot in VOCABULARY_SLOTS:
            feed, _ = self._feed(slot)
            ours, theirs = self._ours.shape(slot), self._theirs.shape(feed)
            if ours is None or theirs is None or ours[1:] != theirs[1:]:
                continue
            width = ours[1]
            inside = [run for run in rows if run.start < ours[0] and run.source < theirs[0]]
            self._runs[slot] = [
                Run(
                    run.start * width,
                    run.source * width,
                    min(run.count, ours[0] - run.start, theirs[0] - run.source) * width,
                )
                for run in inside
            ]

    def _overlap_rule(self, slot: str, rule: str) -> str:
        shape = self._ours.shape(slot) or (0, 1)
        rows = sum(run.count for run in self._runs[slot]) // shape[1]
        text = f"overlap: {rows:,} of {shape[0]:,} rows"
        return f"{text}, {rule}" if rule else text

    def _why_unused(self, name: str, slot: str) -> str:
        result = self._result
        if is_buffer(name):
            return BUFFER
        if component(slot) != "llm":
            counterpart = result.target_slots.by_slot.get(slot)
            return result.kept.get(counterpart or "", f"{component(slot)} is the target's own")
        pieces = self._theirs.by_name[name]
        reasons = list(dict.fromkeys(self._why_slot_unused(piece.slot) for piece in pieces))
        told = [why for why in reasons if not isinstance(why, Lost)]
        return reasons[0] if len(reasons) == 1 or not told else "; ".join(told)

    def _why_slot_unused(self, slot: str) -> str:
        base, branch = split_branch(slot)
        places = [base, *(f"{base}@{each}" for each in BRANCHES)]
        ours = [piece.name for place in places for piece in self._ours.by_slot.get(place, ())]
        for name in ours:
            why = self._result.kept.get(name)
            if why and isinstance(why, Lost) and not self._ours.whole(name):
                return Lost(f"a part of the target's {name} is lost: {why}")
            if why:
                return why
        if ours and branch:
            return OTHER_BRANCH
        tied = self._result.target_geometry.tied
        return "the target ties its head to the embedding" if slot == HEAD and tied else NO_PLACE

    def _account_for_rows(self) -> None:
        """What of the fused donor tensors goes nowhere, although another part of them is used."""
        used: dict[str, set[str]] = {}
        for merged in self._result.merged:
            for slot, _, _ in merged.parts:
                feed, _ = self._feed(slot)
                for piece in self._theirs.by_slot[feed]:
                    used.setdefault(piece.name, set()).add(feed)
        for name, slots in used.items():
            for piece in self._theirs.by_name[name]:
                if piece.slot not in slots:
                    self._result.unused_parts[piece.slot] = self._why_slot_unused(piece.slot)

"""What is checked before anything is written. Each reason belongs to a gate that can be waived."""

from __future__ import annotations

from collections.abc import Sequence

from omnimerge.arch.alignment import Alignment, Lost, Merged
from omnimerge.arch.ancestor import Sample, measure_ancestor
from omnimerge.arch.family import COMPONENTS, EMBED, HEAD, VOCABULARY_SLOTS
from omnimerge.arch.geometry import Geometry
from omnimerge.arch.layout import component, is_buffer, layer_index
from omnimerge.checkpoint import Checkpoint

# What packed and scaled formats store beside or instead of a weight.
_QUANTIZED = (
    ".qweight",
    ".qzeros",
    ".scales",
    ".g_idx",
    ".weight_scale",
    ".weight_scale_inv",
    ".weight_packed",
    ".absmax",
    ".quant_map",
)

_GEOMETRY_WORDS = {
    "hidden_size": "hidden size",
    "layers": "layer count",
    "heads": "number of heads",
    "kv_heads": "number of key/value heads",
    "head_dim": "head size",
    "intermediate_size": "MLP size",
    "rope_theta": "RoPE base",
    "activation": "activation",
}


def check_geometry(result: Alignment) -> None:
    """Compare sizes and constants of the language models, and refuse quantised weights.

    Args:
        result: the alignment, which collects the refusals.
    """
    ours, theirs = result.target_geometry, result.donor_geometry
    for name, words in _GEOMETRY_WORDS.items():
        a, b = getattr(ours, name), getattr(theirs, name)
        if a is not None and b is not None and a != b:
            result.refuse("geometry", f"{words} differs: target {a}, donor {b}{_SAME_LLM}")
        elif name in _NOTED and (a is None or b is None):
            result.notes.append(f"the {words} could not be compared: no config tells it")
    if ours.rope_scaling != theirs.rope_scaling:
        a, b = (scaling or "none" for scaling in (ours.rope_scaling, theirs.rope_scaling))
        result.refuse("geometry", f"RoPE scaling differs: target {a}, donor {b}{_SAME_LLM}")
    _compare_eps(result, ours.norm_eps, theirs.norm_eps)
    _refuse_quantized(result, "target", result.target, ours)
    _refuse_quantized(result, "donor", result.donor, theirs)


_NOTED = ("heads", "rope_theta")
_SAME_LLM = "; models that can be merged are fine-tunes of one LLM"


def _compare_eps(result: Alignment, ours: float | None, theirs: float | None) -> None:
    """What the norms add to a variance near one: a factor of ten in it changes nothing visible."""
    if ours is None or theirs is None or ours == theirs:
        return
    text = f"epsilon of the norms differs: target {ours}, donor {theirs}"
    if max(ours, theirs) > 10.5 * min(ours, theirs):
        result.refuse("geometry", f"{text}{_SAME_LLM}")
    else:
        result.notes.append(text)


def _refuse_quantized(
    result: Alignment, role: str, checkpoint: Checkpoint, found: Geometry
) -> None:
    packed = next((name for name in checkpoint.tensors if name.endswith(_QUANTIZED)), None)
    if found.quantized or packed:
        why = f"tensor {packed!r}" if packed else "quantization_config in its config.json"
        result.refuse(
            "quantization",
            f"the {role}'s weights are quantised ({why}); merge the original weights",
        )


def check_completeness(result: Alignment) -> None:
    """Refuse a language model that matches in part: it is another one, or in an unknown form.

    Args:
        result: the alignment, which collects the refusals.
    """
    for reasons, checkpoint, slots, words in (
        (result.unused, result.donor, result.donor_slots, "of the donor go nowhere"),
        (result.kept, result.target, result.target_slots, "of the target get nothing"),
    ):
        lost = [n for n, why in reasons.items() if isinstance(why, Lost) and not is_buffer(n)]
        lost = [n for n in lost if component(slots.by_name[n]) == "llm"]
        matrices = [
            n
            for n in lost
            if len(checkpoint.tensors[n].shape) >= 2 and layer_index(slots.by_name[n]) is not None
        ]
        if matrices:
            result.refuse(
                "accounting",
                f"{len(matrices)} matrices {words}, such as {matrices[0]!r} "
                f"({reasons[matrices[0]]}); if they have a counterpart under another name, infer a "
                "layout with `omnimerge layout` and give it with --layout",
            )
        elif lost:
            why = reasons[lost[0]]
            result.notes.append(f"{len(lost)} tensors {words}, such as {lost[0]!r} ({why})")
    _account_for_parts(result)
    if not any(component(m.slot) == "llm" for m in result.merged):
        result.refuse(
            "accounting",
            "no tensor of the language models matches; look at both with `omnimerge inspect`",
        )


def _account_for_parts(result: Alignment) -> None:
    """Parts of fused donor tensors that go nowhere, while other parts of them are used."""
    by_reason: dict[str, list[str]] = {}
    for slot, why in result.unused_parts.items():
        by_reason.setdefault(why, []).append(slot)
    for why, slots in by_reason.items():
        text = f"{len(slots)} parts of fused donor tensors go nowhere, such as {slots[0]} ({why})"
        if isinstance(why, Lost):
            result.refuse("accounting", text)
        else:
            result.notes.append(text)


def check_ancestor(result: Alignment) -> None:
    """Test every component that is merged; one that is not the language model is kept instead.

    Args:
        result: the alignment, which collects the refusals.
    """
    for name in COMPONENTS:
        merged = [m for m in result.merged if component(m.slot) == name]
        matrices = [m for m in merged if m.slot not in VOCABULARY_SLOTS]
        found = measure_ancestor([s for m in matrices for s in _samples(result, m)])
        reason = found.refusal()
        if name == "llm":
            result.ancestor = found
            if reason:
                result.refuse("ancestor", reason)
            else:
                _check_vocabulary(result, [m for m in merged if m.slot in VOCABULARY_SLOTS])
            if found.both_zero and not found.cosines:
                result.refuse(
                    "ancestor",
                    f"all {len(found.both_zero)} sampled matrices are zero: the files may be "
                    "incomplete; check the checkpoints, or go on with --force ancestor",
                )
            elif found.both_zero:
                result.notes.append(
                    f"{len(found.both_zero)} sampled matrices are zero on both sides, such as "
                    f"{found.both_zero[0]!r}; they say nothing of an ancestor"
                )
        elif reason:
            result.kept.update({m.target: f"{name} parts share no ancestor" for m in merged})
            result.merged = [m for m in result.merged if component(m.slot) != name]


def _check_vocabulary(result: Alignment, merged: list[Merged]) -> None:
    """Rows of tokens that correspond are alike, as matrices are; those of others are not."""
    for each in merged:
        found = measure_ancestor(_samples(result, each, windows=8))
        if not found.refusal() or not found.lowest:
            continue
        if each.slot == HEAD and result.donor_slots.by_name[each.sources[0]] == EMBED:
            result.merged.remove(each)
            result.kept[each.target] = "the donor's head is its embedding, which is unlike this one"
            continue
        result.refuse(
            "ancestor",
            f"the rows of {each.target!r} and of the donor's {each.sources[0]!r} do not "
            f"correspond (cosine {found.lowest[1]:.3f}): the vocabularies may be in another "
            "order; use vocabulary: overlap or target, or go on with --force ancestor",
        )


def _samples(result: Alignment, merged: Merged, windows: int = 1) -> list[Sample]:
    """Where to look at a merged tensor: a slice of each slot that it holds."""
    meta = result.target.tensors[merged.target]
    if len(meta.shape) != 2 or not meta.numel or merged.target.endswith(".bias"):
        return []  # norms start at one and biases at zero in every model, without any kinship
    parts = merged.parts or ((merged.slot, 0, meta.numel),)
    if windows > 1:
        ranges = _spread(parts, windows)
    else:
        longest: dict[str, tuple[int, int]] = {}
        for slot, start, count in parts:
            if slot not in longest or count > longest[slot][1]:
                longest[slot] = start, count
        ranges = [(start, start + count) for start, count in longest.values()]
    theirs = result.source(merged)
    return [
        Sample(merged.target, (result.target, merged.target), theirs, start, stop)
        for start, stop in ranges
    ]


def _spread(parts: Sequence[tuple[str, int, int]], windows: int) -> list[tuple[int, int]]:
    """Equal shares of all mapped elements; of a share that lies in several runs, the longest."""
    total = sum(count for _, _, count in parts)
    found: dict[int, tuple[int, int]] = {}
    done = 0
    for _, start, count in parts:
        position = 0
        while position < count:
            window = (done + position) * windows // total
            end = min(count, -(-(window + 1) * total // windows) - done)
            longest = found.get(window, (0, 0))
            if end - position > longest[1] - longest[0]:
                found[window] = start + position, start + end
            position = max(end, position + 1)
        done += count
    return list(found.values())

"""What is checked before anything is written. Each reason belongs to a gate that can be waived."""

from __future__ import annotations

from omnimerge.arch.alignment import Alignment, Merged
from omnimerge.arch.ancestor import Sample, measure_ancestor
from omnimerge.arch.geometry import Geometry
from omnimerge.arch.layout import COMPONENTS, component, is_buffer, layer_index
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

_VOCABULARY_SLOTS = ("llm.embed.weight", "llm.head.weight")


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


def check_completeness(result: Alignment, *, lost: str, lacking: str) -> None:
    """Refuse a language model that matches in part: it is another one, or in an unknown form.

    Args:
        result: the alignment, which collects the refusals.
        lost: the reason of donor tensors without a place.
        lacking: the reason of target tensors without a counterpart.
    """
    for names, checkpoint, slots, words in (
        (
            [n for n, why in result.unused.items() if why == lost and not is_buffer(n)],
            result.donor,
            result.donor_slots,
            "of the donor have no place in the target",
        ),
        (
            [n for n, why in result.kept.items() if why == lacking],
            result.target,
            result.target_slots,
            "of the target have none in the donor",
        ),
    ):
        inner = [n for n in names if layer_index(slots.by_name[n]) is not None]
        matrices = [n for n in inner if len(checkpoint.tensors[n].shape) >= 2]
        if matrices:
            result.refuse(
                "accounting",
                f"{len(matrices)} matrices {words}, such as {matrices[0]!r}; if they have one "
                "under another name, infer a layout with `omnimerge layout` and give it with "
                "--layout",
            )
        elif inner:
            result.notes.append(f"{len(inner)} tensors {words}, such as {inner[0]!r}")
    if not any(component(m.slot) == "llm" for m in result.merged):
        result.refuse(
            "accounting",
            "no tensor of the language models matches; look at both with `omnimerge inspect`",
        )


def check_ancestor(result: Alignment) -> None:
    """Test every component that is merged; one that is not the language model is kept instead.

    Args:
        result: the alignment, which collects the refusals.
    """
    for name in COMPONENTS:
        merged = [m for m in result.merged if component(m.slot) == name]
        matrices = [m for m in merged if m.slot not in _VOCABULARY_SLOTS]
        found = measure_ancestor([s for m in matrices for s in _samples(result, m)])
        reason = found.refusal()
        if name == "llm":
            result.ancestor = found
            if reason:
                result.refuse("ancestor", reason)
            else:
                _check_vocabulary(result, [m for m in merged if m.slot in _VOCABULARY_SLOTS])
        elif reason:
            result.kept.update({m.target: f"{name} parts share no ancestor" for m in merged})
            result.merged = [m for m in result.merged if component(m.slot) != name]


def _check_vocabulary(result: Alignment, merged: list[Merged]) -> None:
    """Rows of tokens that correspond are alike, as matrices are; those of others are not."""
    for each in merged:
        found = measure_ancestor(_samples(result, each, windows=8))
        if found.refusal() and each.op == "tied":
            result.merged.remove(each)
            result.kept[each.target] = "the donor's head is its embedding, which is unlike this one"
        elif found.refusal() and found.lowest:
            result.refuse(
                "ancestor",
                f"the rows of {each.target!r} and of the donor's {each.sources[0]!r} do not "
                f"correspond (cosine {found.lowest[1]:.3f}): the vocabularies may be in another "
                "order; use vocabulary: overlap or target, or go on with --force ancestor",
            )


def _samples(result: Alignment, merged: Merged, windows: int = 1) -> list[Sample]:
    """Where to look at a merged tensor: a slice of each slot that it holds."""
    meta = result.target.tensors[merged.target]
    if len(meta.shape) != 2:
        return []  # norms start at one in every model and are alike without any kinship
    longest: dict[str, tuple[int, int]] = {}
    for slot, start, count in merged.parts or ((merged.slot, 0, meta.numel),):
        if slot not in longest or count > longest[slot][1]:
            longest[slot] = start, count
    checkpoint, name = result.source(merged)
    return [
        Sample(
            merged.target,
            (result.target, merged.target),
            (checkpoint, name),
            start + number * (count // windows),
            start + (number + 1) * (count // windows),
        )
        for start, count in longest.values()
        for number in range(windows)
    ]

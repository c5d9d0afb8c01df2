"""In what two checkpoints over one LLM differ, in the terms of the field."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from omnimerge.arch.alignment import Alignment
from omnimerge.arch.family import split_branch
from omnimerge.arch.geometry import text_config
from omnimerge.arch.layout import SlotMap, component, layer_index
from omnimerge.checkpoint import Checkpoint


def heterogeneity(result: Alignment) -> list[tuple[str, str]]:
    """List the differences between target and donor, and what the mapping makes of each.

    Args:
        result: an alignment whose tensors are matched.

    Returns:
        (kind, detail), in the order in which a checkpoint is read: names, fused tensors, branches,
        vocabulary, constants, and what stays the target's.
    """
    return [(kind, detail) for kind, find in _KINDS for detail in find(result)]


def _prefix(result: Alignment) -> list[str]:
    ours, theirs = (s.layout.layers for s in (result.target_slots, result.donor_slots))
    return [f"{theirs}* becomes {ours}*"] if ours != theirs else []


def _leaf(result: Alignment) -> list[str]:
    pairs: dict[str, None] = {}
    for merged in result.merged:
        if layer_index(merged.slot) is not None and merged.op == "rename":
            ours = _inner(merged.target, result.target_slots)
            theirs = _inner(merged.sources[0], result.donor_slots)
            if ours != theirs:
                pairs[f"{theirs} becomes {ours}"] = None
    return list(pairs)[:12]


def _fused(result: Alignment) -> list[str]:
    found: dict[str, None] = {}
    for merged in result.merged:
        if merged.op in ("split", "concat", "regroup") and layer_index(merged.slot) is not None:
            ours = _inner(merged.target, result.target_slots)
            sources = [_inner(name, result.donor_slots) for name in merged.sources]
            found[f"{' + '.join(sources)} -> {ours} ({merged.op})"] = None
    return list(found)[:12]


def _gqa(result: Alignment) -> list[str]:
    told = [
        f"{found.heads} heads share {found.kv_heads} key/value heads"
        for found in (result.target_geometry, result.donor_geometry)
        if found.heads and found.kv_heads and found.heads != found.kv_heads
    ]
    if len(told) == 2 and told[0] == told[1]:
        return [f"{told[0]} on both sides"]
    return [f"{each} on one side" for each in told]


def _branches(result: Alignment) -> list[str]:
    found = []
    for role, slots in (("target", result.target_slots), ("donor", result.donor_slots)):
        doubled = {
            split_branch(slot)[0].split(".", 3)[-1]
            for slot in slots.by_slot
            if "@" in slot and layer_index(slot) is not None
        }
        if doubled:
            found.append(f"the {role} holds for text and for images: {', '.join(sorted(doubled))}")
    return found


def _vocabulary(result: Alignment) -> list[str]:
    ours, theirs = result.target_geometry.vocab_size, result.donor_geometry.vocab_size
    if ours and theirs and ours != theirs:
        return [f"{ours:,} rows in the target, {theirs:,} in the donor"]
    return []


def _tied(result: Alignment) -> list[str]:
    ours, theirs = result.target_geometry.tied, result.donor_geometry.tied
    if ours == theirs:
        return []
    return [f"the {'target' if ours else 'donor'} ties its head to its embedding, the other not"]


def _rope(result: Alignment) -> list[str]:
    kinds = [_rope_kind(checkpoint) for checkpoint in (result.target, result.donor)]
    return [f"{kinds[0]} in the target, {kinds[1]} in the donor"] if kinds[0] != kinds[1] else []


def _biases(result: Alignment) -> list[str]:
    return _one_sided(result, lambda slot: slot.endswith(".bias"))


def _norms(result: Alignment) -> list[str]:
    return _one_sided(result, lambda slot: slot.endswith("norm.weight"))


def _inserted(result: Alignment) -> list[str]:
    found = []
    for role, slots in (("target", result.target_slots), ("donor", result.donor_slots)):
        numbers = slots.layer_numbers
        if any(index != number for index, number in numbers.items()):
            total = max(numbers) + 1
            found.append(
                f"the {role} has inserted layers: {len(numbers)} of the first {total} are the LLM's"
            )
    return found


def _dtype(result: Alignment) -> list[str]:
    kinds = [
        sorted({checkpoint.tensors[name].dtype for name in names})
        for checkpoint, names in (
            (result.target, [m.target for m in result.merged]),
            (result.donor, [source for m in result.merged for source in m.sources]),
        )
    ]
    if kinds[0] == kinds[1]:
        return []
    return [f"{', '.join(kinds[0])} in the target, {', '.join(kinds[1])} in the donor"]


def _own(result: Alignment) -> list[str]:
    found = []
    merged = {component(m.slot) for m in result.merged}
    for name in ("vision", "audio", "projector", "other"):
        counts = [
            len(slots.by_component.get(name, ()))
            for slots in (result.target_slots, result.donor_slots)
        ]
        if any(counts) and name not in merged:
            ours, theirs = counts
            found.append(f"{name}: the target's {ours} stay, the donor's {theirs} are unused")
    return found


def _container(result: Alignment) -> list[str]:
    kinds = [
        "safetensors" if checkpoint.files[0].suffix == ".safetensors" else "PyTorch pickle"
        for checkpoint in (result.target, result.donor)
    ]
    if kinds[0] == kinds[1]:
        return []
    return [f"{kinds[0]} in the target, {kinds[1]} in the donor"]


_KINDS = (
    ("prefix", _prefix),
    ("leaf name", _leaf),
    ("fused tensors", _fused),
    ("grouped-query attention", _gqa),
    ("duplicated branches", _branches),
    ("inserted layers", _inserted),
    ("vocabulary", _vocabulary),
    ("tied head", _tied),
    ("RoPE variant", _rope),
    ("biases", _biases),
    ("extra norms", _norms),
    ("dtype", _dtype),
    ("container", _container),
    ("own components", _own),
)


def _inner(name: str, slots: SlotMap) -> str:
    """A tensor's name inside its layer, without the leaf."""
    before, _, after = slots.layout.layers.partition("{i}")
    rest = name.removeprefix(before)
    return rest[rest.index(after) + len(after) :].rpartition(".")[0] if after in rest else name


def _one_sided(result: Alignment, wanted: Callable[[str], bool]) -> list[str]:
    found = []
    for names, slots, words in (
        (result.kept, result.target_slots, "only the target has"),
        (result.unused, result.donor_slots, "only the donor has"),
    ):
        inner = {
            slots.by_name[name].split(".", 3)[-1]
            for name in names
            if layer_index(slots.by_name[name]) is not None and wanted(slots.by_name[name])
        }
        if inner:
            found.append(f"{words} {', '.join(sorted(inner))}")
    return found


def _rope_kind(checkpoint: Checkpoint) -> str:
    config = text_config(checkpoint)
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    if isinstance(rope, Mapping) and "mrope_section" in rope:
        return "interleaved multimodal RoPE" if rope.get("mrope_interleaved") else "multimodal RoPE"
    return "RoPE"

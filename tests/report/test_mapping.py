"""The picture of an alignment: every tensor counted once, in the right box, row and group."""

import re
from collections import Counter
from functools import lru_cache
from xml.etree import ElementTree

import pytest

import omnimerge
from omnimerge.report import component_rows, slot_rows, write_mapping_report
from omnimerge.report.mapping import (
    by_reason,
    count_flows,
    count_parts,
    display_name,
    place,
    ranges,
    reasons_by_part,
)
from omnimerge.report.picture import Flow, Picture, box_state

EVIL = "<script>alert(1)</script>"
LLM = {"layers": 80, "hidden_size": 64, "tied": False, "rope_theta": 1e6, "vocab_size": 96}


def merged(target, sources, slot, op="rename", rule="", source_slots=None):
    """An entry of an alignment; its sources have the target's slot, unless told otherwise."""
    found = {"target": target, "sources": sources, "source_slots": source_slots or [slot]}
    assert len(found["source_slots"]) == len(sources)
    return {**found, "slot": slot, "op": op, "rule": rule}


def made(layers=80, **changes):
    """An alignment with fused matrices, a tied donor, and a fourth of the layers merged in part."""
    lists = {"merged": [], "kept": [], "unused": []}
    for i in range(layers):
        ours, theirs, slot = (f"{p}.{i}." for p in ("model.layers", "lm.layers", "llm.layers"))
        for leaf in ("attn.q.weight", "attn.o.weight", "input_norm.weight"):
            lists["merged"].append(merged(ours + leaf, [theirs + leaf], slot + leaf))
        lists["merged"].append(
            merged(
                f"{ours}mlp.gate_up.weight",
                [f"{theirs}mlp.gate.weight", f"{theirs}mlp.up.weight"],
                f"{slot}mlp.gate+mlp.up.weight",
                "concat",
                source_slots=[f"{slot}mlp.gate.weight", f"{slot}mlp.up.weight"],
            )
        )
        if i % 4 == 3:
            own = {"target": f"{ours}q_norm.weight", "slot": f"{slot}attn.q_norm.weight"}
            lists["kept"].append({**own, "reason": "the donor has no such tensor"})
        own = {"source": f"{theirs}attn.q.bias", "slot": f"{slot}attn.q.bias"}
        lists["unused"].append({**own, "reason": "the target has no such tensor"})
    embed = {"target": "model.embed.weight", "slot": "llm.embed.weight"}
    tied = merged(
        "head.weight", ["lm.embed.weight"], "llm.head.weight", "tied", source_slots=[embed["slot"]]
    )
    lists["merged"].append(tied)
    lists["kept"].append({**embed, "reason": "vocabularies differ"})
    for i in range(20):
        own = {"slot": f"vision.blocks.{i}.weight", "reason": "vision is the target's own"}
        lists["kept"].append({**own, "target": f"visual.blocks.{i}.weight"})
    sides = {side: {"path": f"/models/{side}", "layout": "plain"} for side in ("target", "donor")}
    for side in sides.values():
        side.update(model_type="some", tensors=0, llm=dict(LLM))
    return {
        "mergeable": True,
        "reasons": [],
        "gates": [],
        "notes": [],
        "heterogeneity": [{"kind": "fused tensors", "detail": "gate + up -> gate_up (concat)"}],
        "ancestor": {"cosine_median": 0.98, "cosine_min": 0.9, "sampled": 12},
        **sides,
        **lists,
        **changes,
    }


def picture(alignment):
    counts = {side: count_parts(alignment, side) for side in ("donor", "target")}
    return Picture(counts, count_flows(alignment), reasons_by_part(alignment))


def page(alignment, folder):
    file = folder / "map.html"
    assert write_mapping_report(alignment, file) == file
    return file.read_text(encoding="utf-8")


@lru_cache
def doubled(golden):
    """mPLUG-Owl2, with keys, values and norms twice, into CogVLM, with the matrices twice."""
    folder = golden / "adamms" / "mplug_owl2_into_cogvlm"
    return omnimerge.align(folder / "target", folder / "donor").to_dict()


@pytest.mark.parametrize(
    ("slot", "expected"),
    [
        ("llm.layers.13.attn.q+attn.k.weight@vision", ("llm.layers.13", "vision")),
        ("llm.layers.0.mlp.up.weight", ("llm.layers.0", "")),
        ("llm.layers.0.odd@name.weight", ("llm.layers.0", "")),
        ("llm.embed.weight", ("llm.embed", "")),
        ("vision.layers.3.w@text", ("vision", "")),
    ],
)
def test_place(slot, expected):
    assert place(slot) == expected


def test_every_tensor_is_counted_once_in_its_part():
    target, donor = (count_parts(made(), side) for side in ("target", "donor"))
    assert target["llm.layers.3"] == {"": {"merged": 3, "rearranged": 1, "kept": 1}}
    assert target["llm.layers.4"] == {"": {"merged": 3, "rearranged": 1}}
    assert donor["llm.layers.4"] == {"": {"merged": 3, "rearranged": 2, "unused": 1}}
    assert donor["llm.embed"] == {"": {"rearranged": 1}}  # it feeds the target's head
    assert "llm.head" not in donor
    assert target["vision"] == {"": {"kept": 20}}
    totals = [
        sum(counts.total() for lanes in side.values() for counts in lanes.values())
        for side in (target, donor)
    ]
    assert totals == [80 * 4 + 20 + 1 + 1 + 20, 80 * 6 + 1]


def test_branches_of_a_real_pair(golden):
    alignment = doubled(golden)
    target, donor = (count_parts(alignment, side) for side in ("target", "donor"))
    assert target["llm.layers.1"] == {
        "": {"merged": 2},
        "text": {"merged": 4, "rearranged": 1},
        "vision": {"merged": 4, "rearranged": 1},
    }
    assert donor["llm.layers.1"] == {
        "": {"merged": 4, "rearranged": 1, "buffer": 1},
        "text": {"merged": 2, "rearranged": 2},
        "vision": {"rearranged": 2, "unused": 2},
    }
    here = "llm.layers.1"
    flows = {
        (flow.donor[1], flow.target[1], flow.state): pairs
        for flow, pairs in count_flows(alignment).items()
        if flow.target[0] == here
    }
    assert flows == {
        ("text", "", "merged"): 2,
        ("", "text", "merged"): 4,
        ("", "text", "rearranged"): 1,
        ("text", "text", "rearranged"): 2,
        ("", "vision", "merged"): 4,
        ("", "vision", "rearranged"): 1,
        ("vision", "vision", "rearranged"): 2,
    }


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({"merged": 3}, "merged"),
        ({"merged": 3, "rearranged": 1}, "rearranged"),
        ({"merged": 3, "kept": 1}, "partly"),
        ({"rearranged": 3, "unused": 1}, "partly"),
        ({"merged": 3, "buffer": 1}, "merged"),
        ({"kept": 2, "buffer": 1}, "kept"),
        ({"buffer": 1}, "buffer"),
        ({}, "absent"),
    ],
)
def test_box_state(counts, expected):
    assert box_state(Counter(counts)) == expected


def test_rows_fold_the_layers():
    rows = {row.slot: row for row in slot_rows(made())}
    assert list(rows) == [
        "embed.weight",
        "attn.q.weight",
        "attn.o.weight",
        "input_norm.weight",
        "mlp.gate+mlp.up.weight",
        "attn.q_norm.weight",
        "attn.q.bias",
        "head.weight",
    ]
    fused = rows["mlp.gate+mlp.up.weight"]
    assert (fused.count("merged", "rearranged"), fused.count("kept")) == (80, 0)
    (route,) = fused.routes
    assert route.sources == ("lm.layers.{i}.mlp.gate.weight", "lm.layers.{i}.mlp.up.weight")
    assert (route.target, route.op) == ("model.layers.{i}.mlp.gate_up.weight", "concat")
    assert (route.state, route.where) == ("rearranged", "0–79")
    assert rows["attn.q_norm.weight"].count("kept") == 20
    assert rows["attn.q.bias"].count("unused") == 80
    assert rows["head.weight"].count("rearranged") == 1 and not rows["head.weight"].layered


def test_rows_fold_experts_and_keep_other_numbers():
    entries = [
        merged(f"m.layers.{i}.{leaf}", [f"d.layers.{i}.{leaf}"], f"llm.layers.{i}.{leaf}")
        for i in range(3)
        for leaf in [f"mlp.experts.{j}.up.weight" for j in range(4)] + ["k.multiway.1.weight"]
    ]
    experts, other = slot_rows(made(0, merged=entries, kept=[], unused=[]))
    assert (experts.slot, experts.count("merged")) == ("mlp.experts.{j}.up.weight", 3)
    assert experts.routes[0].tensors == 12
    assert experts.routes[0].sources == ("d.layers.{i}.mlp.experts.{j}.up.weight",)
    assert other.routes[0].target == "m.layers.{i}.k.multiway.1.weight"


def test_rows_keep_the_branches_apart(golden):
    rows = {(row.slot, row.lane): row for row in slot_rows(doubled(golden))}
    for lane in ("text", "vision"):
        (route,) = rows["attn.q+attn.k+attn.v.weight", lane].routes
        assert (route.op, route.layers, len(route.sources)) == ("concat", {0, 1}, 3)
        assert "multiway.{i}" not in " ".join(route.sources)


def test_other_parts_and_groups():
    (row,) = component_rows(made())
    assert (row.label, row.target, row.donor) == ("Vision tower", {"kept": 20}, {})
    assert row.reasons == {"vision is the target's own": 20}
    groups = by_reason(made(), "kept")
    assert [(reason, count, len(names)) for reason, count, names in groups] == [
        ("the donor has no such tensor", 20, 8),
        ("vision is the target's own", 20, 8),
        ("vocabularies differ", 1, 1),
    ]
    ((_, count, names),) = by_reason(made(), "unused")
    assert count == 80 and names[0] == "lm.layers.0.attn.q.bias"


def test_picture_of_many_layers():
    drawn = picture(made())
    assert len(drawn.boxes) == 2 * (1 + 80 + 2)
    assert [box.label for box in drawn.boxes if box.state == "absent"] == [
        "no vision tower",
        "no head",
    ]
    assert len(drawn.ribbons) == 80 * 2 + 1  # as they are and fused, and the tied head
    (tied,) = (ribbon for ribbon in drawn.ribbons if "Head" in ribbon.title)
    assert tied.title == "Embedding → Head: 1 tensor merged, rearranged"
    third = next(box for box in drawn.boxes if box.name == "Layer 3 of the target")
    assert third.title == (
        "Layer 3 of the target: 5 tensors\n"
        "3 merged as they are\n1 merged, rearranged\n1 kept: the target's own"
    )
    assert [(state, round(width / third.width, 3)) for state, _, width in third.fills] == [
        ("merged", 0.6),
        ("rearranged", 0.2),
        ("kept", 0.2),
    ]
    assert [lines for _, lines in drawn.notes] == [["vision is the target's own"]]
    assert drawn.height < 2000
    for cell in drawn.frames + drawn.boxes:
        assert cell.x >= 0 and cell.x + cell.width <= drawn.width
        assert cell.y >= 0 and cell.y + cell.height <= drawn.height


def test_ribbons_fill_the_edges_of_their_lanes(golden):
    drawn = picture(doubled(golden))
    assert len(drawn.lanes) == 2 * 2 * 3
    for lane in drawn.lanes:
        edges = [
            edge
            for edge in drawn.edges
            if edge.side == lane.side and lane.y - 0.01 <= edge.y < lane.y + lane.height - 0.01
        ]
        assert sum(edge.height for edge in edges) == pytest.approx(lane.height)
    into_images = [r for r in drawn.ribbons if r.title.partition(":")[0].endswith("1, image")]
    assert [ribbon.title for ribbon in into_images] == [
        "Layer 1 → Layer 1, image: 4 tensors merged as they are",
        "Layer 1 → Layer 1, image: 1 tensor merged, rearranged",
        "Layer 1, image → Layer 1, image: 2 tensors merged, rearranged",
    ]


@pytest.mark.parametrize("rule", ["", "the donor's vision branch", "the head is its embedding"])
def test_a_reworded_rule_moves_no_ribbon(golden, rule):
    for alignment in (doubled(golden), made()):
        entries = [{**entry, "rule": rule} for entry in alignment["merged"]]
        drawn, expected = picture({**alignment, "merged": entries}), picture(alignment)
        assert drawn.ribbons and drawn.ribbons == expected.ribbons
        assert drawn.lanes == expected.lanes


def test_a_pair_without_anything_in_common():
    alignment = made(2, merged=[], ancestor=None)
    drawn = picture(alignment)
    assert not drawn.ribbons and {edge.state for edge in drawn.edges} == {"kept", "unused"}
    assert ["the target has no such tensor"] in [lines for _, lines in drawn.notes]


def test_page(tmp_path, golden):
    text = page(doubled(golden), tmp_path)
    assert "<b>Mergeable.</b>" in text and "Refused" not in text
    assert text.startswith("<!doctype html>")
    numbers = ["23", "4", "2", "8", "0.9099", "0.8803", "28"]
    assert re.findall(r"<dd>([\d.]+)", text) == numbers
    assert text.count("<details") == 1 + 2 + 4
    svg = ElementTree.fromstring(text[text.index("<svg") : text.index("</svg>") + 6])
    assert len(svg.findall(".//path")) == 3 + 2 * 7


def test_a_refused_pair_shows_each_reason(tmp_path):
    reasons = ["layers: target 80, donor 60", "they share no ancestor"]
    text = page(made(2, mergeable=False, reasons=reasons, gates=["ancestor", "geometry"]), tmp_path)
    assert "<b>Refused.</b>" in text and "Mergeable" not in text
    assert all(f"<li>{reason}</li>" in text for reason in reasons)


def test_a_waived_gate_is_named(tmp_path):
    assert "were waived: ancestor." in page(made(1, gates=["ancestor"]), tmp_path)


def test_the_page_needs_no_network_and_runs_nothing(tmp_path):
    side = {"path": f"/x/{EVIL}", "layout": EVIL, "model_type": EVIL, "tensors": 1, "llm": {}}
    alignment = made(
        1, target=side, donor={**side, "llm": {"activation": EVIL}}, notes=[EVIL], reasons=[EVIL]
    )
    alignment |= {"mergeable": False, "heterogeneity": [{"kind": EVIL, "detail": EVIL}]}
    for state, key in (("kept", "target"), ("unused", "source")):
        for slot in (f"llm.{EVIL}", f"{EVIL}.x", f"llm.layers.0.{EVIL}"):
            alignment[state].append({key: EVIL + state, "slot": slot, "reason": EVIL})
    alignment["merged"].append(merged(EVIL, [EVIL], f"llm.layers.0.x{EVIL}", EVIL, EVIL))
    text = page(alignment, tmp_path)
    assert "<script" not in text and "&lt;script&gt;alert(1)" in text
    assert not re.search(r"https?:|url\(|@import|(src|href)=", text)
    ElementTree.fromstring(text[text.index("<svg") : text.index("</svg>") + 6])


def test_a_name_that_is_no_text_is_written_all_the_same(tmp_path):
    odd = {"target": "a\ud800", "slot": "other.a\ud800", "reason": "odd"}
    assert "a\\ud800" in page(made(1, kept=[odd]), tmp_path)


def test_an_ancestor_that_was_not_tested(tmp_path):
    assert "Not tested." in page(made(1, ancestor=None), tmp_path)
    nothing = {"cosine_median": None, "cosine_min": None, "sampled": 0}
    assert "no matrix could be sampled" in page(made(1, ancestor=nothing), tmp_path)


def test_the_same_alignment_gives_the_same_page(tmp_path):
    assert page(made(), tmp_path) == page(made(), tmp_path)


def test_names_and_numbers_for_people():
    cached = "/c/hub/models--Qwen--Qwen2-VL-7B/snapshots/0123abc"
    assert display_name(cached) == "Qwen/Qwen2-VL-7B"
    assert display_name(f"{cached} + /tmp/lora/") == "Qwen/Qwen2-VL-7B + lora"
    assert ranges([5, 0, 1, 2]) == "0–2, 5"
    assert ranges([]) == ""
    assert Flow(("a", ""), ("b", "text"), "merged").at("target") == ("b", "text")

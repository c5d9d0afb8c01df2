"""The pages people read: self-contained, true to the result, safe with hostile answers."""

import base64
import hashlib
import json
import re
import shutil
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnimerge.errors import SearchError
from omnimerge.report import render_card, write_search_report
from omnimerge.report.answers import Answers
from omnimerge.report.plots import draw_curve, heat_map, nice_ticks
from omnimerge.report.search import mapping_summary
from omnimerge.report.words import marked, words
from omnimerge.search import read_result

EVIL = "</script><script>alert(1)</script><!-- &amp;"
# q0 is the same everywhere, q1 case aside; q2 changes once, q3 between 0.1 and 0.2.
FOUR = {
    (0.0,): ["red", "Two", EVIL, "a red bus"],
    (0.1,): ["red", "two", "b", "a red bus"],
    (0.2,): ["red", "two", "b", "a blue bus"],
    (0.3,): ["red", "two", "b", "a blue bus"],
}
SCORES = (None, 2.0, 1.0, None)
ACCURACIES = (0.5, 0.75, 0.625, 0.25)


@pytest.fixture
def four(make, tmp_path):
    """Makes a search of four points, 0.2 chosen."""
    return lambda **changes: make(tmp_path, FOUR, SCORES, (0.2,), **changes)


def page_of(folder):
    return write_search_report(folder).read_text(encoding="utf-8")


def body(page):
    """What a reader sees: without style and scripts, tags and white space folded."""
    text = re.sub(r"<(style|script)\b.*?</\1>", "", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", text)).replace("&#39;", "'")


def data_of(page):
    return json.loads(re.search(r'id="answers-data">(.*?)</script>', page, re.DOTALL)[1])


def test_the_choice_the_scores_and_the_counts(four):
    page = page_of(four(accuracies=ACCURACIES))
    said = body(page)
    assert "Chosen: alpha = 0.2." in said
    assert "by unanimity with exact comparison on 4 prompts without labels" in said
    assert "rests on the 2 prompts that are not answered the same at all points" in said
    assert "The best, 75.0 %, is at alpha 0.1." in said
    assert page.count('<tr class="chosen">') == 1
    rows = re.findall(
        r"<tr(?: class=\"\w+\")?>\s*<td class=\"count axis\">.*?</tr>", page, re.DOTALL
    )
    cells = [re.findall(r'<td class="count[^>]*>([^<]*)<', row) for row in rows]
    assert [row[:3] for row in cells] == [
        ["0", "–", "50.0\xa0%"],
        ["0.1", "2", "75.0\xa0%"],
        ["0.2", "1", "62.5\xa0%"],
        ["0.3", "–", "25.0\xa0%"],
    ]


def test_without_labels_nothing_speaks_of_accuracy(four):
    assert "accuracy" not in page_of(four()).split("</style>")[1].lower()


def test_the_guards_in_words(four, noise, bootstrap):
    diagnostics = {
        "noise": noise,
        "bootstrap": bootstrap,
        "warnings": ("all points are tied",),
        "notes": ("the donor alone was not asked: <no> processor",),
    }
    parents = {"target": FOUR[0.0,], "donor": FOUR[0.3,]}
    page = page_of(four(diagnostics=diagnostics, parents=parents))
    said = body(page)
    assert "Chosen, with doubts: alpha = 0.2." in said
    assert '<li class="warning">all points are tied</li>' in page
    assert "not asked: &lt;no&gt; processor" in page
    assert "Of 1,000 draws of the prompts, in 88 % the chosen point alone is best" in said
    assert "95 % choose alpha 0.1 to 0.2." in said
    assert "1 answer of 4 changed when the chosen point was answered a second time" in said
    assert "25 % of the prompts are answered as the target alone does, 50 %" in said
    assert "0 of the 4 answers are empty; 4 are different from each other" in said


def test_guards_that_were_not_asked_for(four):
    said = body(page_of(four()))
    assert "Not computed." in said and "Not measured." in said
    assert "Not known: the parents were not asked." in said


def test_answers_beside_the_chosen_points(four):
    page = page_of(four())
    assert (
        "1 prompt of 4 is not answered the same by alpha 0.1, alpha 0.2 (chosen), alpha 0.3."
        in (body(page))
    )
    assert re.findall(r"<mark>(.*?)</mark>", page) == ["red"]
    assert "3 prompts are answered the same by all of them" in page
    pairs = dict(re.findall(r'data-pair="a=([\d.]+)&amp;b=0.2"[^>]*>(\d+)<', page))
    assert pairs == {"0": "2", "0.1": "1", "0.3": "0"}


@pytest.mark.parametrize(
    ("beside", "note"),
    [
        ("a red", "lacks words of the chosen answer"),
        ("A  red\nbus", "differs in white space only"),
        ("a red bus" + " or so" * 200, ""),
        ("", ""),
    ],
)
def test_differences_that_no_mark_tells(make, tmp_path, beside, note):
    answers = {(0.1,): ["a red bus"], (0.2,): ["a red bus"], (0.3,): [beside]}
    folder = make(tmp_path, answers, (None, 1.0, None), (0.2,))
    cells = Answers(folder, read_result(folder)).table().rows[0][1]
    assert [cell.kind for cell in cells] == ["alike", "chosen", ""]
    assert [cell.note for cell in cells] == ["", "", note]


def test_a_difference_behind_the_end_of_what_is_shown(make, tmp_path):
    long = "word " * 300
    answers = {(0.1,): [long], (0.2,): [long + "a"], (0.3,): [long + "b"]}
    folder = make(tmp_path, answers, (None, 1.0, None), (0.2,))
    cells = Answers(folder, read_result(folder)).table().rows[0][1]
    assert [cell.note for cell in cells] == ["differs further on", "", "differs further on"]
    assert [cell.more for cell in cells] == [500, 501, 501]


def test_every_text_is_packed_once(four):
    data = data_of(page_of(four()))
    assert [column["key"] for column in data["columns"]] == ["0", "0.1", "0.2", "0.3"]
    assert (data["a"], data["b"]) == (1, 2)  # the previous point, and the chosen one
    assert data["ids"] == ["q0", "q1", "q2", "q3"]
    texts, kinds = data["texts"], data["kinds"]
    assert len(texts) == len(set(texts)) == 7
    answers = [[texts[n] for n in row] for row in data["rows"]]
    assert answers == [list(row) for row in zip(*FOUR.values(), strict=True)]
    assert kinds[texts.index("Two")] == kinds[texts.index("two")]  # case aside
    assert len(set(kinds)) == 6


def test_a_page_needs_no_network_and_runs_its_own_script_only(four):
    page = page_of(four())
    assert "<script>alert" not in page and EVIL not in page
    assert page.count("<script") == page.count("</script>") == 2  # the data, and the script
    links = re.findall(r"\b(?:src|href|action)=(\S)(.*?)\1", page)
    assert {link for _, link in links if link[0] != "#"} == {"data:,"}
    assert not re.search(r"@import|url\(|https?:", page.split("</style>")[0])
    rule = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert "default-src 'none'" in rule
    script = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in rule
    assert "innerHTML" not in script and "fetch" not in script and "XMLHttp" not in script


def test_a_hostile_answer_is_text_in_the_table_too(make, tmp_path):
    answers = {(0.1,): [EVIL], (0.2,): ["b"], (0.3,): ["\x00\x1b[31m\ud800 c"]}
    page = page_of(make(tmp_path, answers, (None, 1.0, None), (0.2,)))
    assert "<script>alert" not in page
    assert "&lt;" in page and "&amp;amp;" in page
    assert "\u2400\u241b" in page and "\x00" not in page and "\x1b" not in page


def test_the_same_result_gives_the_same_page(four):
    folder = four()
    assert page_of(folder) == page_of(folder)


def test_another_file_and_the_result_itself_as_source(four, tmp_path):
    file = write_search_report(four() / "search.json", tmp_path / "new" / "a.html")
    assert file == tmp_path / "new" / "a.html"
    assert "alpha 0.2 (chosen)" in file.read_text()
    assert not (tmp_path / "report.html").exists()


def test_a_folder_without_a_result_is_refused(tmp_path):
    with pytest.raises(SearchError, match=r"search\.json .*; run the search first"):
        write_search_report(tmp_path)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"selected": {"alpha": 0.25}}, "the chosen point, 0.25, is none of its points"),
        ({"axes": []}, "a point has other axes than the search"),
    ],
)
def test_a_result_that_contradicts_itself_is_refused(four, change, problem):
    file = four() / "search.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(SearchError, match=problem):
        write_search_report(file)


def test_a_page_that_cannot_be_written_is_named(four, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(SearchError, match=r"cannot write .*folder"):
        write_search_report(four(), tmp_path / "folder")


def test_missing_answers_are_said(four, tmp_path):
    folder = four()
    (folder / "responses" / "alpha_0.10.jsonl").unlink()
    (folder / "responses" / "alpha_0.30.jsonl").write_text('{"id": 1')
    page = page_of(folder)
    said = body(page)
    assert (
        "responses/alpha_0.10.jsonl cannot be read (No such file or directory): "
        "no answers of alpha 0.1" in said
    )
    assert "responses/alpha_0.30.jsonl holds no answers that can be read: none of alpha 0.3" in said
    assert "alpha 0, alpha 0.2 (chosen)." in said  # the neighbour that is left
    assert [column["key"] for column in data_of(page)["columns"]] == ["0", "0.2"]


@pytest.mark.parametrize("gone", ["alpha_0.20.jsonl", "*.jsonl"])
def test_without_the_chosen_answers_there_is_a_page(four, gone):
    folder = four()
    for file in (folder / "responses").glob(gone):
        file.unlink()
    said = body(page_of(folder))
    if gone == "*.jsonl":
        assert "No answers can be read from this folder, so none are shown." in said
    else:
        assert "The chosen point's answers, or any to compare them with, are not in" in said


def test_a_prompt_that_the_chosen_point_did_not_answer(four):
    """Its file lacks a line: what the others say alike is not compared with it."""
    folder = four()
    file = folder / "responses" / "alpha_0.20.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    for number in range(4):
        file.write_text("".join(lines[:number] + lines[number + 1 :]))
        found = Answers(folder, read_result(folder)).table()
        assert f"q{number}" not in [prompt for prompt, _ in found.same]
        assert page_of(folder)


def test_answers_to_other_prompts_and_of_other_folders_are_not_shown(four, tmp_path):
    folder = four(parents={"donor": ["x"] * 4})
    file = folder / "checks" / "donor.jsonl"
    file.write_text(file.read_text().replace('"q', '"other'))
    result = read_result(folder)
    points = list(result.points)
    shutil.copy(folder / points[1].responses, tmp_path.parent / "stolen.jsonl")
    points[1] = points[1].model_copy(update={"responses": "../stolen.jsonl"})
    found = Answers(folder, result.model_copy(update={"points": tuple(points)}))
    assert [column.key for column in found.columns] == ["0", "0.2", "0.3"]
    assert found.problems == [
        "../stolen.jsonl holds no answers that can be read: none of alpha 0.1",
        "checks/donor.jsonl answers other prompts: no answers of the donor alone",
    ]


def test_a_prompt_that_one_point_did_not_answer(four):
    folder = four()
    file = folder / "responses" / "alpha_0.10.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:3]))
    page = page_of(folder)
    assert data_of(page)["rows"][3][1] == -1
    assert "no answer in the folder" not in page.split('id="plain"')[1].split("<script")[0]
    found = Answers(folder, read_result(folder))
    assert found.differing(*found.columns[:2]) == 1  # q2; nothing is known of q3


def test_the_parents_are_compared_too(four):
    parents = {"target": FOUR[0.0,], "donor": ["blue", "two", "b", "a blue bus"]}
    folder = four(parents=parents)
    found = Answers(folder, read_result(folder))
    assert [column.key for column in found.columns] == ["0", "0.1", "0.2", "0.3", "target", "donor"]
    assert found.pairs()[2] == [2, 1, 0, 0, 2, 1]
    assert found.changing == ["q0", "q2", "q3"]  # q0: the donor says blue


def test_neighbours_lie_along_each_axis(make, tmp_path):
    points = [(a, d) for a in (0.0, 0.1, 0.2) for d in (0.2, 0.5, 0.8)]
    scores = [1.0 if point == (0.1, 0.5) else None for point in points]
    answers = {point: [str(point)] for point in points}
    folder = make(tmp_path, answers, scores, (0.1, 0.5), axes=("alpha", "density"))
    found = Answers(folder, read_result(folder))
    assert [column.key for column in found.beside] == [
        "alpha 0, density 0.5",
        "alpha 0.2, density 0.5",
        "alpha 0.1, density 0.2",
        "alpha 0.1, density 0.8",
    ]


def test_a_hundred_prompts_and_seven_points_are_below_two_megabytes(make, tmp_path):
    answers = {
        (i / 10,): [f"{i} {j} " + "word " * 400 for j in range(100)] for i in range(7)
    }  # 2,000 characters each, none the same
    folder = make(tmp_path, answers, (None, *[100.0] * 5, None), (0.1,))
    file = write_search_report(folder)
    assert 1_400_000 < file.stat().st_size < 2_000_000
    data = data_of(file.read_text())
    assert len(data["ids"]) == 100 and data["missing"] == 0 and data["more"] == {}


def test_what_is_too_much_is_left_out_and_said(make, tmp_path):
    answers = {
        (i / 100,): [f"{i} {j} " + "中" * 2000 if j else "the same" for j in range(60)]
        for i in range(30)
    }
    folder = make(tmp_path, answers, (None, *[59.0] * 28, None), (0.01,))
    file = write_search_report(folder)
    page = file.read_text(encoding="utf-8")
    assert file.stat().st_size < 2_600_000
    data = data_of(page)
    # 30 answers of 6 KB a prompt: 1.5 MB hold eight of them, and the 51 others change, too.
    assert (len(data["ids"]), data["missing"]) == (8, 51)
    assert "q0" not in data["ids"]  # it does not change
    assert "This page holds the answers to 8 prompts" in body(page)
    assert "51 more prompts that change would take it over 1.5 MB" in body(page)


def test_what_changes_around_the_choice_goes_first(four):
    found = Answers(folder := four(), read_result(folder))
    assert json.loads(found.pack(limit=0).text)["ids"] == ["q3"]
    assert json.loads(found.pack(limit=200).text)["ids"] == ["q2", "q3"]


def test_long_answers_are_cut_and_many_points_left_out(make, tmp_path):
    answers = {(i / 100,): [f"{i}" + "x" * 4100] for i in range(100)}
    folder = make(tmp_path, answers, (None, *[1.0] * 98, None), (0.9,))
    page = page_of(folder)
    data = data_of(page)
    assert len(data["columns"]) == 60
    keys = [column["key"] for column in data["columns"]]
    assert keys[0] == "0.4" and keys[-1] == "0.99" and "0.9" in keys
    assert {len(text) for text in data["texts"]} == {4000}
    assert set(data["more"].values()) == {102}
    said = body(page)
    assert "Answers are cut after 4,000 characters." in said
    assert "It holds the 60 points nearest to the choice, of 100." in said
    assert "and 3,102 more characters" in said  # the table that needs no script has 1,000


def test_the_recipe_with_the_choice_or_without(four):
    folder = four()
    page = page_of(folder)
    assert "recipe.yaml is not there" in page and "target: t/target" in page
    (folder / "recipe.yaml").write_text("# chosen\nmethod: adamms # <b>\n", encoding="utf-8")
    page = page_of(folder)
    assert "<pre># chosen\nmethod: adamms # &lt;b&gt;\n</pre>" in page
    assert "target: t/target" not in page


def alignment():
    layer = {"slot": "llm.layers.3.attn.q.weight", "op": "rename", "rule": ""}
    fused = {**layer, "slot": "llm.layers.4.attn.q.weight", "op": "concat"}
    own = {"slot": "vision.a.weight", "reason": "vision is the target's <own>"}
    sides = {side: {"path": f"/m/{side}"} for side in ("target", "donor")}
    return {
        "merged": [
            {**layer, "target": "a", "sources": ["x"], "source_slots": [layer["slot"]]},
            {**fused, "target": "b", "sources": ["y"], "source_slots": [fused["slot"]]},
        ],
        "kept": [{**own, "target": "c"}, {**own, "target": "d"}],
        "unused": [{**own, "source": "z"}],
        "heterogeneity": [{"kind": "prefix", "detail": "x becomes a"}],
        "notes": [],
        **sides,
    }


def test_the_mapping_is_counted_by_part(four):
    found = mapping_summary(alignment())
    rows = {part.label: (dict(part.target), dict(part.donor)) for part in found["parts"]}
    assert rows == {
        "Vision tower": ({"kept": 2}, {"unused": 1}),
        "2 layers": ({"merged": 1, "rearranged": 1}, {"merged": 1, "rearranged": 1}),
    }
    folder = four()
    assert "mapping.json is not there" in page_of(folder)
    (folder / "mapping.json").write_text(json.dumps(alignment()))
    page = page_of(folder)
    assert "2 kept · vision is the target&#39;s &lt;own&gt;" in page
    assert "x becomes a" in page and "What of donor goes where in target" in body(page)


@pytest.mark.parametrize("text", ["{", "[]", '{"merged": [{"slot": 1}]}'])
def test_a_damaged_mapping_is_said(four, text):
    folder = four()
    (folder / "mapping.json").write_text(text)
    assert "mapping.json holds no mapping that can be read." in page_of(folder)


def test_other_distances_are_told(four):
    page = page_of(four(distance="edit", per_step=True, criterion="pairwise"))
    said = body(page)
    assert "by pairwise with edit comparison" in said
    assert "edit distance between neighbouring points' answers, summed, each over the step" in said


def test_the_curve_is_where_the_numbers_are(four, noise, bootstrap):
    diagnostics = {"noise": noise, "bootstrap": bootstrap}
    folder = four(accuracies=ACCURACIES, diagnostics=diagnostics, tie_set=({"alpha": 0.2},))
    curve = draw_curve(read_result(folder), 360.0)
    score, accuracy = curve.panels
    assert [dot.kind for dot in score.dots] == ["unscored", "plain", "chosen", "unscored"]
    assert [dot.text for dot in score.dots] == ["", "2", "1", ""]
    assert score.dots[0].title == "alpha 0: not scored"
    xs = [dot.x for dot in score.dots]
    steps = [b - a for a, b in pairwise(xs)]
    assert max(steps) - min(steps) < 1e-6 and curve.left < xs[0] and xs[-1] < curve.right
    assert curve.chosen == xs[2]
    start, width = curve.band
    assert xs[0] < start < xs[1] and xs[2] < start + width < xs[3]  # from 0.1 to 0.2
    assert score.noise == score.dots[2].y  # one answer, as the score of 0.2
    two, one = score.dots[1].y, score.dots[2].y
    assert score.top < two < one < score.bottom
    assert abs((score.bottom - one) * 2 - (score.bottom - two)) < 1e-6  # from zero
    assert len(score.lines) == 1 and len(score.lines[0].split()) == 2
    assert [dot.kind for dot in accuracy.dots] == ["plain", "plain", "chosen", "plain"]
    assert accuracy.dots[1].y == min(dot.y for dot in accuracy.dots)
    assert [text for _, text in curve.ticks] == ["0", "0.1", "0.2", "0.3"]


def test_the_noise_floor_is_drawn_among_counts_only(four, noise):
    folder = four(diagnostics={"noise": noise}, distance="edit")
    assert draw_curve(read_result(folder), 360.0).panels[0].noise is None


def test_ticks_of_a_fine_grid_keep_apart(make, tmp_path):
    answers = {(i / 40,): ["x"] for i in range(41)}
    folder = make(tmp_path, answers, (None, *[0.0] * 39, None), (0.025,))
    curve = draw_curve(read_result(folder), 336.0)
    xs = [x for x, _ in curve.ticks]
    assert min(b - a for a, b in pairwise(xs)) >= 30
    assert not any(dot.text for dot in curve.panels[0].dots)  # no room for numbers
    assert [dot.kind for dot in curve.panels[0].dots].count("tied") == 38


def test_two_axes_are_a_map(make, tmp_path):
    points = [(a, d) for a in (0.0, 0.1, 0.2) for d in (0.5, 1.0)][:5]  # one was not tried
    scores = (None, 4.0, 2.0, 2.0, 3.0)
    accuracies = (0.1, 0.2, 0.3, 0.2, 0.1)
    answers = {point: ["a"] for point in points}
    axes = ("alpha", "density")
    folder = make(tmp_path, answers, scores, (0.1, 0.5), axes=axes, accuracies=accuracies)
    result = read_result(folder)
    found = heat_map(result, "score")
    assert (found.down, found.across, found.heads) == ("alpha", "density", ["0.5", "1"])
    rows = [[f and (f.text, f.kind, f.heat) for f in fields] for _, fields in found.rows]
    assert rows == [
        [("–", "unscored", 0.0), ("4", "plain", 0.0)],
        [("2", "chosen", 1.0), ("2", "tied", 1.0)],
        [("3", "plain", 0.5), None],
    ]
    best = heat_map(result, "accuracy").rows[1][1][0]
    assert (best.text, best.heat, best.kind) == ("30.0", 1.0, "chosen")
    page = page_of(folder)
    assert page.count('<figure class="heat">') == 2 and 'class="curve' not in page
    assert "Chosen: alpha 0.1, density 0.5." in body(page)


def test_more_axes_are_a_table(make, tmp_path):
    answers = {(0.1, 0.2, 0.3): ["a"], (0.1, 0.2, 0.4): ["a"]}
    axes = ("alpha@layers:0-13", "beta", "density")
    page = page_of(make(tmp_path, answers, (1.0, 2.0), (0.1, 0.2, 0.3), axes=axes))
    assert "3 coefficients were searched" in page
    assert "<svg class" not in page and '<figure class="heat">' not in page


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 17, [0, 5, 10, 15, 20]),
        (0, 4, [0, 1, 2, 3, 4]),
        (0, 0, [0, 0.5, 1]),
        (0.719, 0.89, [0.7, 0.75, 0.8, 0.85, 0.9]),
        (0.5, 0.5, [0, 0.2, 0.4, 0.6]),
        (-3, 2, [-4, -2, 0, 2]),
    ],
)
def test_round_ticks(low, high, ticks):
    assert nice_ticks(low, high) == ticks


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a red  bus.", ["a ", "red  ", "bus", "."]),
        ("snake_case 3.5", ["snake_case ", "3", ".", "5"]),
        ("赤い bus です", ["赤", "い ", "bus ", "で", "す"]),
        ("ป้ายนี้", ["ป้", "า", "ย", "นี้"]),
        ("한국어 답", ["한국어 ", "답"]),
        ("می\u200cروم", ["می\u200cروم"]),
        ("👩\u200d🔬 👍🏽", ["👩\u200d🔬 ", "👍🏽"]),
        ("e\u0301t\u00e9", ["e\u0301t\u00e9"]),
        ("", []),
    ],
)
def test_words(text, expected):
    assert words(text) == expected


@given(st.text())
def test_words_lose_nothing(text):
    assert "".join(words(text)) == text


@given(st.text(alphabet="ab 中."), st.text(alphabet="ab 中."))
def test_marks_lose_nothing_and_what_is_left_is_common(a, b):
    pieces = marked(a, b)
    assert "".join(piece for piece, _ in pieces) == a
    kept = [w.strip() for piece, differs in pieces if not differs for w in words(piece)]
    theirs = iter([w.strip() for w in words(b)])
    assert all(word in theirs for word in kept if word)  # in order


def test_marks():
    assert marked("The red bus", "the BLUE bus") == [
        ("The ", False),
        ("red", True),
        (" ", False),
        ("bus", False),
    ]
    assert marked("same", "SAME") == [("same", False)]
    assert marked("a b", "a b c") == [("a b", False)]
    assert marked("", "a") == []
    assert [piece for piece, differs in marked("图中有红色的车", "图中有蓝色的车") if differs] == [
        "红"
    ]


def test_answers_that_repeat_themselves_do_not_take_long():
    a, b = "start " + "ha he " * 400 + "end", "start " + "he ha " * 300 + "end"
    started = time.perf_counter()
    pieces = marked(a, b)
    assert time.perf_counter() - started < 1
    assert [piece for piece, differs in pieces if not differs] == ["start ", " ", "end"]


def test_card_names_hub_models_and_the_recipe():
    card = render_card(
        {
            "recipe": {
                "method": "adamms",
                "target": f"Qwen/Qwen2-VL-7B-Instruct@{'a' * 40}",
                "models": [{"model": "./local|donor"}],
                "parameters": {"alpha": 0.1},
            },
            "inputs": {
                "target": {
                    "reference": "Qwen/Qwen2-VL-7B-Instruct",
                    "revision": "a" * 40,
                    "license": {"license": "apache-2.0"},
                },
                "models.0": {"reference": "./local|donor"},
            },
            "versions": {"omnimerge": "1.2"},
            "counts": {"adamms": 5, "kept": 2},
            "kept_reasons": {"vision is | the target's own": 2},
        }
    )
    assert "base_model:\n- Qwen/Qwen2-VL-7B-Instruct\nbase_model_relation: merge" in card
    assert "\nlicense:" not in card  # the donor's is not known
    assert f"| Qwen/Qwen2-VL-7B-Instruct | {'a' * 40} | apache-2.0 |" in card
    assert "| ./local\\|donor | - | - |" in card
    assert "# Qwen2-VL-7B-Instruct + local|donor" in card
    assert "| kept: vision is \\| the target's own | 2 |" in card
    assert "alpha: 0.1" in card

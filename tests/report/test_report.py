"""The pages people read: self-contained, true to the result, safe with hostile answers."""

import json
import re

import pytest

from omnimerge.errors import SearchError
from omnimerge.report import render_card, write_search_report
from omnimerge.search.result import (
    Diagnostics,
    Point,
    PointDiagnostics,
    PromptSource,
    SearchResult,
)

GRID = (0.0, 0.1, 0.2, 0.3)
EVIL = "<script>alert(1)</script>"


def make(folder, *, labelled=True, warnings=()):
    """A result of four points, with the answers of three prompts, one of them hostile."""
    answers = [["red", "two", EVIL], ["red", "two", "b"], ["red", "two", "c"], ["red", "one", "c"]]
    points = []
    for alpha, score, texts in zip(GRID, (None, 1.0, 2.0, None), answers, strict=True):
        file = folder / "responses" / f"alpha_{alpha:.2f}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = [{"id": f"q{i}", "response": t, "tokens": [1]} for i, t in enumerate(texts)]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        accuracy = 0.5 + alpha if labelled else None
        name = file.relative_to(folder).as_posix()
        points.append(Point(alpha=alpha, score=score, responses=name, accuracy=accuracy))
    source = PromptSource(file="p.jsonl", sha256="0" * 64, count=3, sample=None, seed=0)
    seen = [PointDiagnostics(alpha=a, distinct_rate=1, empty_rate=0, mean_tokens=1) for a in GRID]
    result = SearchResult(
        points=tuple(points),
        selected=0.1,
        criterion="unanimity",
        parameter="alpha",
        tie_set=(0.1,),
        grid="0:0.3:0.1",
        prompts=source,
        heldout=source if labelled else None,
        max_new_tokens=4,
        diagnostics=Diagnostics(points=tuple(seen), changed_prompts=2, warnings=tuple(warnings)),
        recipe={"method": "adamms", "target": EVIL},
        versions={"omnimerge": "0"},
        elapsed_s=1.5,
    )
    result.write(folder)
    return folder


def test_search_report(tmp_path):
    page = write_search_report(make(tmp_path)).read_text()
    assert "alpha = 0.1</b>" in page
    assert "alpha = 0.3. These labels are only shown" in page  # the best accuracy
    assert page.count('<tr class="chosen">') == 1
    assert "2 of 3 prompts are answered differently" in page
    assert re.findall(r'muted">(q\d)', page) == ["q1", "q2"]  # q0 is the same everywhere
    assert "<svg" in page and "accuracy on held-out labels" not in page.split("<svg")[0]


def test_without_labels_nothing_speaks_of_accuracy(tmp_path):
    page = write_search_report(make(tmp_path, labelled=False)).read_text()
    assert "accuracy" not in page.lower()


def test_a_page_needs_no_network_and_runs_no_script(tmp_path):
    page = write_search_report(make(tmp_path, warnings=["all points are tied"])).read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert not re.search(r'(src|href)="(https?:)?//', page)
    assert "@import" not in page
    assert '<p class="warning">all points are tied</p>' in page


def test_the_same_result_gives_the_same_page(tmp_path):
    first = write_search_report(make(tmp_path)).read_text()
    assert write_search_report(tmp_path).read_text() == first


def test_a_folder_without_a_result_is_refused(tmp_path):
    with pytest.raises(SearchError, match="run the search first"):
        write_search_report(tmp_path)


def test_card_names_hub_models_and_the_recipe():
    card = render_card(
        {
            "recipe": {"method": "adamms", "parameters": {"alpha": 0.1}},
            "inputs": {
                "target": {"reference": "Qwen/Qwen2-VL-7B-Instruct"},
                "models.0": {"reference": "./local|donor"},
            },
            "versions": {"omnimerge": "1.2"},
            "counts": {"adamms": 5, "kept": 2},
            "kept_reasons": {"vision is | the target's own": 2},
        }
    )
    assert "base_model:\n- Qwen/Qwen2-VL-7B-Instruct\nbase_model_relation: merge" in card
    assert "# Qwen2-VL-7B-Instruct + local|donor" in card
    assert "| kept: vision is \\| the target's own | 2 |" in card
    assert "alpha: 0.1" in card

"""Dashboards: what is accepted, where things are drawn, and that the page is safe."""

import base64
import hashlib
import json
import re

import pytest

from omnimerge.errors import OmnimergeError
from omnimerge.report import write_dashboard
from omnimerge.report.dashboard import read_dashboard, render_dashboard
from omnimerge.report.dashboard_charts import draw_bars, draw_histogram, draw_lines, draw_radars
from omnimerge.report.dashboard_scales import fixed, log_ticks, significant, with_deviation
from omnimerge.report.dashboard_schema import (
    Bars,
    Dashboard,
    Heatmap,
    Histogram,
    Lines,
    Radar,
)

EVIL = "</script><script>alert(1)</script>\"'<b>"
TABLE = {
    "kind": "table",
    "title": "Scores",
    "head": "model",
    "columns": [{"name": "VQA", "unit": "%"}, {"name": "size"}],
    "rows": [
        {"name": "base", "cells": [{"value": 50.25, "deviation": 0.5}, None]},
        {
            "name": "ties",
            "cells": [{"value": 61.0, "best": True}, {"value": 12e6, "text": "12 MB"}],
        },
    ],
}
BARS = {
    "kind": "bars",
    "title": "Average",
    "head": "model",
    "categories": ["base", "ties"],
    "series": [{"name": "average", "values": [50.0, 100.0], "deviations": [5.0, None]}],
    "emphasis": ["ties"],
}
RADAR = {
    "kind": "radar",
    "title": "By task",
    "axes": ["up", "right", "down", "left"],
    "series": [{"name": "a", "values": [100, 50, 0, 25]}, {"name": "b", "values": [1, 2, None, 4]}],
    "high": 100,
}
LINES = {
    "kind": "lines",
    "title": "Curve",
    "x": "step",
    "y": "norm",
    "lines": [
        {
            "name": "a",
            "x": [0, 1, 10, 100],
            "y": [1, 2, None, 4],
            "low": [0, 1, None, 3],
            "high": [2, 3, None, 5],
        },
        {"name": "b", "x": [1, 100], "y": [1.5, 2.5]},
    ],
    "levels": {"start": 1.0},
}  # fmt: skip
HEAT = {
    "kind": "heatmap",
    "title": "Cosine",
    "rows": ["r1", "r2"],
    "columns": ["c1", "c2"],
    "values": [[1.0, -0.5], [None, 0.0]],
}
HISTOGRAM = {
    "kind": "histogram",
    "title": "Spread",
    "x": "magnitude",
    "y": "share",
    "edges": [0.01, 0.1, 1.0],
    "log_x": True,
    "series": [{"name": "a", "values": [0.25, 0.75]}],
}
ALL = [TABLE, BARS, RADAR, {**RADAR, "apart": True, "references": ["b"]}, LINES, HEAT, HISTOGRAM]


def page(*sections, **changes):
    return render_dashboard(
        Dashboard.model_validate({"title": "T", "sections": sections or ALL, **changes})
    )


def points(text):
    return [tuple(map(float, pair.split(","))) for pair in text.split()]


def text_of(html):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", html))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sections": []}, "sections: Tuple should have at least 1 item"),
        ({"titel": "x"}, "titel: Extra inputs are not permitted"),
        ({"sections": [{**TABLE, "kind": "pie"}]}, "sections.0: Input tag 'pie'"),
        (
            {"sections": [{**TABLE, "rows": [{"name": "r", "cells": [None]}]}]},
            "sections.0.table: row 'r' has 1 cells, not one per column",
        ),
        (
            {"sections": [{**BARS, "series": [{"name": "s", "values": [1]}]}]},
            "series 's': not one value per category",
        ),
        ({"sections": [{**RADAR, "references": ["z"]}]}, "references: no series 'z'"),
        ({"sections": [{**RADAR, "low": 100}]}, "low: not below high"),
        (
            {"sections": [{**LINES, "lines": [{"name": "l", "x": [1, 1], "y": [1, 2]}]}]},
            "line 'l': x has to increase",
        ),
        ({"sections": [{**LINES, "log_y": True}]}, "log_y: a value is not above 0"),
        ({"sections": [{**HEAT, "values": [[1, 2]]}]}, "values: not one per row and column"),
        ({"sections": [{**HISTOGRAM, "edges": [0, 1, 2]}]}, "edges: have to be above 0"),
        (
            {"sections": [{**HEAT, "values": [[float("nan"), 1], [1, 1]]}]},
            "Input should be a finite number",
        ),
    ],
)
def test_what_is_no_dashboard(change, message):
    with pytest.raises(OmnimergeError, match=re.escape(message)):
        read_dashboard({"title": "T", "sections": [TABLE], **change})


def test_files(tmp_path):
    file = tmp_path / "d.json"
    with pytest.raises(OmnimergeError, match="cannot read"):
        read_dashboard(file)
    file.write_text("{")
    with pytest.raises(OmnimergeError, match="holds no JSON"):
        read_dashboard(file)
    file.write_text(json.dumps({"title": "half \ud83d", "sections": ALL}))
    out = write_dashboard(file, tmp_path / "out" / "d.html")
    assert out.read_text("utf-8").startswith("<!doctype html>")
    assert "half \\ud83d" in out.read_text("utf-8")


def test_the_page_asks_for_nothing_and_runs_only_its_script():
    html = page()
    script = re.search(r"<script>(.*?)</script>", html, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html and "default-src 'none'" in html
    assert not re.search(r"(?:src|href)=\"(?!#|data:,)", html)
    assert html.count("<script") == 1 and "@import" not in html and "url(" not in html


def test_everything_is_escaped():
    def poison(value):
        if isinstance(value, dict):
            return {k: v if k == "kind" else poison(v) for k, v in value.items()}
        if isinstance(value, list):
            return [poison(v) for v in value]
        return f"{value}{EVIL}" if isinstance(value, str) else value

    html = page(
        *(
            poison({**each, "text": ["t"], "notes": ["n"], "command": "c", "group": "g"})
            for each in ALL
        ),
        intro=[EVIL],
        eyebrow=EVIL,
        facts=[{"name": EVIL, "value": EVIL, "detail": EVIL}],
    )

    assert html.count("<script") == 1 and "<b>" not in html
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in html


def test_a_table_has_heads_with_scope_and_keys_to_sort_by():
    html = page(TABLE)
    assert '<th scope="col">model</th>' in html
    assert '<th scope="row">base</th>' in html
    assert re.search(r'<td class="count" data-key="50.25">50.2\xa0±\xa00.5</td>', html)
    assert re.search(
        r'<td class="count best" data-key="61.0">61.0<span class="unseen"> \(best\)', html
    )
    assert '<td class="count" data-key="12000000.0">12 MB</td>' in html
    assert '<table class="data sortable">' in html
    assert '<table class="data">' in page({**TABLE, "sortable": False})


def test_groups_have_one_heading():
    sections = [{**TABLE, "group": g, "title": t} for g, t in (("A", "1"), ("A", "2"), ("B", "3"))]
    html = page(*sections)
    assert re.findall(r'<h2 id="(g\d)">(\w)</h2>', html) == [("g1", "A"), ("g2", "B")]
    assert re.findall(r'<section id="(s\d)"', html) == ["s1", "s2", "s3"]
    assert '<a href="#s3">3</a>' in html and '<a class="group" href="#g2">B</a>' in html


def test_bars_are_as_long_as_their_values():
    chart = draw_bars(Bars.model_validate(BARS), 620)
    short, long = chart.strokes[0].marks
    assert long.width == pytest.approx(2 * short.width)
    left, right = short.whisker
    assert (left + right) / 2 == pytest.approx(short.x + short.width)
    assert right - left == pytest.approx(short.width / 5)  # ± 5 of 50
    assert long.whisker is None and short.text == "50.0\xa0±\xa05.0"
    assert [tick for _, tick in chart.x_ticks][-1] == "100"
    assert chart.labels[1][2:] == ("ties", "end", True)


def test_bars_below_zero_start_at_zero():
    section = {**BARS, "series": [{"name": "s", "values": [-20, 40]}]}
    down, up = draw_bars(Bars.model_validate(section), 960).strokes[0].marks
    assert down.x + down.width == pytest.approx(up.x)
    assert up.width == pytest.approx(2 * down.width)


def test_long_labels_are_above_the_bars_where_it_is_narrow():
    section = Bars.model_validate({**BARS, "categories": ["a rather long name of a model", "ties"]})
    narrow, wide = draw_bars(section, 336), draw_bars(section, 960)
    assert narrow.labels[0][3] == "start" and narrow.labels[0][1] < narrow.strokes[0].marks[0].y
    assert wide.labels[0][3] == "end" and narrow.height > wide.height


def test_a_radar_by_hand():
    (chart,) = draw_radars(Radar.model_validate(RADAR))
    x, y = chart.middle
    up, right, down, left = points(chart.strokes[0].areas[0])
    assert up[0] == pytest.approx(x, abs=0.1) and y - up[1] == pytest.approx(122, abs=0.1)
    assert right == (pytest.approx(x + 61, abs=0.1), pytest.approx(y, abs=0.1))
    assert down == (pytest.approx(x, abs=0.1), pytest.approx(y, abs=0.1))
    assert left[0] == pytest.approx(x - 30.5, abs=0.1)
    assert not chart.strokes[1].areas and len(chart.strokes[1].marks) == 3  # one value is missing


def test_radars_apart_show_the_references_in_each():
    section = {**RADAR, "apart": True, "references": ["b"]}
    section["series"] = [*RADAR["series"], {"name": "c", "values": [1, 1, 1, 1]}]
    charts = draw_radars(Radar.model_validate(section))
    assert [chart.name for chart in charts] == ["a", "c"]
    assert [[s.name for s in chart.strokes] for chart in charts] == [["b", "a"], ["b", "c"]]
    assert [s.reference for s in charts[0].strokes] == [True, False]


def test_lines_have_gaps_bands_and_a_place_for_zero():
    chart = draw_lines(Lines.model_validate({**LINES, "log_x": True}), 620)
    first, second = chart.strokes
    assert len(first.lines) == 2 and len(first.areas) == 2 and not second.areas
    (x0, y0), (x1, y1) = points(first.lines[0])
    assert x0 < x1 == pytest.approx(points(second.lines[0])[0][0])
    # ticks 0 to 5: one unit of y is a fifth of the height
    assert y0 - y1 == pytest.approx((chart.bottom - chart.top) / 5, abs=0.11)
    assert chart.levels == [(pytest.approx(y0, abs=0.1), "start")]
    xs = {text: x for x, text in chart.x_ticks}
    assert xs["10"] - xs["1"] == pytest.approx(xs["100"] - xs["10"])
    assert xs["0"] < xs["1"]
    assert first.marks[0].title == "a, step 0: 1 (0 to 2)"


def test_a_logarithmic_height():
    section = {**LINES, "log_y": True, "lines": [{"name": "a", "x": [1, 2, 3], "y": [1, 10, 100]}]}
    chart = draw_lines(Lines.model_validate(section), 960)
    low, middle, high = (y for _, y in points(chart.strokes[0].lines[0]))
    assert low - middle == pytest.approx(middle - high, abs=0.2)


def test_a_histogram_is_steps():
    chart = draw_histogram(Histogram.model_validate(HISTOGRAM), 336)
    drawn = points(chart.strokes[0].lines[0])
    assert len(drawn) == 6 and drawn[0][1] == drawn[-1][1] == pytest.approx(chart.bottom)
    heights = [chart.bottom - y for _, y in drawn[1:5]]
    assert heights[2] == pytest.approx(3 * heights[0], abs=0.3)
    assert drawn[2][0] - drawn[1][0] == pytest.approx(drawn[4][0] - drawn[3][0], abs=0.2)


def test_colours_of_a_heat_map():
    html = page(HEAT)
    heats = re.findall(r'<td class="(\w*)" style="--heat: ([\d.]+)"', html)
    assert heats == [("", "0.62"), ("below", "0.31"), ("", "0.0")]
    assert "<td></td>" in html and ">−0.50<" in html
    assert '<span>−1.00</span><i class="both"></i><span>1.00</span>' in html
    one = render_dashboard(
        Dashboard(
            title="t",
            sections=(
                Heatmap(title="h", rows=("r",), columns=("a", "b"), values=((2.0, 4.0),), low=2.0),
            ),
        )
    )
    assert re.findall(r"--heat: ([\d.]+)", one) == ["0.0", "0.62"]


@pytest.mark.parametrize("section", [BARS, RADAR, LINES, HISTOGRAM], ids=lambda s: s["kind"])
def test_every_chart_has_its_numbers_in_a_table(section):
    html = page(section)
    inside = re.search(r'<details class="exact">(.*?)</details>', html, re.DOTALL)[1]
    cells = [text_of(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", inside, re.DOTALL)]
    assert (
        cells
        == {
            "bars": ["50.0 ± 5.0", "100.0"],
            "radar": ["100.0", "50.0", "0.0", "25.0", "1.0", "2.0", "–", "4.0"],
            "lines": ["1 (0 to 2)", "–", "2 (1 to 3)", "1.5", "–", "–", "4 (3 to 5)", "2.5"],
            "histogram": ["0.25", "0.75"],
        }[section["kind"]]
    )


def test_more_series_than_colours_are_dashed():
    lines = [{"name": f"l{i}", "x": [0, 1], "y": [i, i]} for i in range(10)]
    html = page({**LINES, "lines": lines})
    assert '<g class="s0 again" data-series="8">' in html
    assert '<g class="s1" data-series="1">' in html


@pytest.mark.parametrize(
    ("value", "text"), [(1234.56, "1,234.6"), (-0.04, "0.0"), (-2.25, "−2.2"), (None, "–")]
)
def test_fixed(value, text):
    assert fixed(value, 1) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.00012345, "0.0001234"), (1e-5, "1e−5"), (123456, "123,456"), (2.5e9, "2.5e9"), (None, "–")],
)
def test_significant(value, text):
    assert significant(value) == text


def test_with_deviation():
    assert with_deviation(61.24, 0.36, 1, "%") == "61.2\xa0±\xa00.4\xa0%"
    assert with_deviation(61.24, None, 1, "%") == "61.2\xa0%"


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(1e-6, 1, [1e-6, 1e-4, 1e-2, 1]), (3, 40, [2, 5, 10, 20, 50]), (1, 1000, [1, 10, 100, 1000])],
)
def test_logarithmic_ticks(low, high, ticks):
    assert log_ticks(low, high, 4) == ticks

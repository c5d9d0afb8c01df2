"""The page of a dashboard in headless Chromium: sorting, hiding, and how it looks.

Run with OMNIMERGE_BROWSER=1, where Debian's `chromium` is installed; never in CI.
"""

import re
import shutil
import subprocess

import pytest
from browser import CHROMIUM, need_chromium
from PIL import Image

from omnimerge.report import write_dashboard

pytestmark = pytest.mark.browser
need_chromium()

TASKS = ["VQA", "Geometry", "Chart", "OCR", "Grounding"]
METHODS = ["base", "task_arithmetic", "ties", "optmerge", "a_method_with_a_rather_long_name"]
SCORES = [[40.0, 41, 42, 43, 44], [50, 61, 52, 63, 54], [55, 56, 57, 58, 59], [60] * 5, [45] * 5]
STEPS = [0, 1, 10, 100]
DATA = {
    "title": "Five capabilities",
    "facts": [{"name": f"fact {i}", "value": "61.2", "detail": "of optmerge"} for i in range(4)],
    "sections": [
        {
            "kind": "table",
            "group": "A line",
            "title": "Scores",
            "head": "model",
            "columns": [*({"name": task, "unit": "%"} for task in TASKS), {"name": "time"}],
            "rows": [
                {
                    "name": name,
                    "cells": [
                        *({"value": v, "deviation": 0.5} for v in row),
                        {"value": row[0]} if i else None,
                    ],
                }
                for i, (name, row) in enumerate(zip(METHODS, SCORES, strict=True))
            ],
            "command": "omnimerge bench run --line internvl --methods all --scales 0.1,0.3,0.5",
        },
        {
            "kind": "bars",
            "group": "A line",
            "title": "Average",
            "categories": METHODS,
            "series": [{"name": "average", "values": [sum(row) / 5 for row in SCORES]}],
        },
        {
            "kind": "radar",
            "group": "A line",
            "title": "By task",
            "axes": TASKS,
            "series": [{"name": n, "values": v} for n, v in zip(METHODS, SCORES, strict=True)],
            "high": 70,
            "apart": True,
            "references": ["base"],
        },
        {
            "kind": "lines",
            "group": "Experiments",
            "title": "Norm",
            "x": "iteration",
            "y": "norm",
            "log_x": True,
            "lines": [
                {"name": f"curve {i}", "x": STEPS, "y": [i, i + 1, i + 2, i + 3]} for i in range(9)
            ],
        },
        {
            "kind": "heatmap",
            "group": "Experiments",
            "title": "Cosine",
            "down": "layer",
            "across": "matrix",
            "rows": [str(i) for i in range(8)],
            "columns": [f"self_attention.matrix_{i}" for i in range(9)],
            "values": [[(i - j) / 9 for j in range(9)] for i in range(8)],
        },
        {
            "kind": "histogram",
            "group": "Experiments",
            "title": "Spread",
            "x": "magnitude",
            "y": "share",
            "edges": [1e-4, 1e-3, 1e-2],
            "log_x": True,
            "series": [{"name": "a", "values": [0.25, 0.75]}, {"name": "b", "values": [0.5, 0.5]}],
        },
    ],
}  # fmt: skip


@pytest.fixture
def page(tmp_path):
    return write_dashboard(DATA, tmp_path / "made.html")


def chromium(file, *arguments, size=(1000, 900)):
    """What Chromium prints about a page, in a profile of its own."""
    profile = file.parent / "profile"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={profile}", "--virtual-time-budget=5000"]
    command += [f"--window-size={size[0]},{size[1]}", *arguments, file.as_uri()]
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    shutil.rmtree(profile, ignore_errors=True)
    return done.stdout.decode()


def dom(file, *arguments, **options):
    return chromium(file, "--dump-dom", *arguments, **options)


def altered(page, *, allow=True, inside=""):
    """A copy of the page whose script is forbidden, or has more at its end."""
    text = page.read_text(encoding="utf-8")
    rule = "'unsafe-inline'" if allow else "'none'"
    text = re.sub(r"script-src '[^']*'", f"script-src {rule}", text)
    copy = page.with_name("page.html")
    copy.write_text(text.replace("})();\n</script>", f"{inside}}})();\n</script>"), "utf-8")
    return copy


def body(found):
    """What is between the style and the script."""
    return found.split("</style>")[1].split("<script>")[0]


def order(found):
    table = re.search(r'<table class="data sortable">(.*?)</table>', found, re.DOTALL)[1]
    return re.findall(r'<th scope="row">([^<]*)', table)


@pytest.mark.parametrize(
    ("column", "clicks", "expected", "state"),
    [
        (1, 1, [3, 2, 1, 4, 0], "descending"),
        (1, 2, [0, 4, 1, 2, 3], "ascending"),
        (1, 3, [0, 1, 2, 3, 4], "none"),
        (0, 1, [4, 0, 3, 1, 2], "ascending"),
        (6, 1, [3, 2, 1, 4, 0], "descending"),  # what has no value is last both ways
        (6, 2, [4, 1, 2, 3, 0], "ascending"),
    ],
)
def test_tables_sort(page, column, clicks, expected, state):
    head = f"document.querySelectorAll('thead th')[{column}]"
    copy = altered(page, inside=f"for (let i = 0; i < {clicks}; i++) {head}.firstChild.click();")

    found = dom(copy)

    assert order(found) == [METHODS[i] for i in expected]
    states = re.findall(r'<th scope="col"[^>]*aria-sort="(\w+)"', found)
    assert states == [state if i == column else "none" for i in range(7)]


def test_series_are_hidden_and_shown(page):
    button = "document.querySelector('.legend.series li[data-number=\"3\"] button')"
    pressed = altered(page, inside=f"{button}.click();")
    found = dom(pressed)
    assert found.count('class="s3 away" data-series="3"') == 3  # one for each width
    assert body(found).count('aria-pressed="false"') == 1
    again = dom(altered(page, inside=f"{button}.click(); {button}.click();"))
    assert "away" not in body(again) and 'aria-pressed="false"' not in body(again)


def test_the_script_runs_under_the_rule_of_the_page(page):
    found = dom(page)
    assert body(found).count('aria-sort="none"') == 7
    assert body(found).count('aria-pressed="true"') == 12  # 1 reference, 9 curves, 2 distributions


def test_without_script_everything_is_there(page):
    found = dom(altered(page, allow=False))
    assert "<button" not in found.split("<script>")[0] and order(found) == METHODS
    assert found.count('<svg class="curve') == 9
    assert "The exact numbers" in found


@pytest.mark.parametrize("width", [360, 800, 1200])
@pytest.mark.parametrize("allow", [True, False], ids=["script", "no script"])
def test_the_page_is_never_wider_than_the_screen(page, tmp_path, width, allow):
    altered(
        page,
        allow=allow,
        inside="for (const d of document.querySelectorAll('details')) d.open = true;",
    )
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<body><iframe style="width:{width}px;height:3000px;border:0" src="page.html"></iframe>'
        "<script>onload = () => { const inside = frames[0].document.documentElement;"
        "document.title = inside.scrollWidth + ' ' + inside.clientWidth }</script>"
    )
    found = dom(frame, "--allow-file-access-from-files", size=(1400, 3100))
    assert re.search(r"<title>(.*?)</title>", found)[1] == f"{width} {width}"


@pytest.mark.parametrize("width", [360, 800, 1200])
def test_one_drawing_is_shown_at_each_width(page, tmp_path, width):
    altered(page)
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<body><iframe style="width:{width}px;height:3000px;border:0" src="page.html"></iframe>'
        "<script>onload = () => {"
        "const all = [...frames[0].document.querySelectorAll('svg.curve')];"
        "document.title = all.filter((e) => e.getBoundingClientRect().width)"
        ".map((e) => e.getAttribute('class')).join() }</script>"
    )
    found = dom(frame, "--allow-file-access-from-files", size=(1400, 3100))
    name = {360: "narrow", 800: "middle", 1200: "wide"}[width]
    assert re.search(r"<title>(.*?)</title>", found)[1] == ",".join([f"curve {name}"] * 3)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [500, 800, 1200])
def test_screenshots_show_something(page, tmp_path, width, dark):
    file = tmp_path / "shot.png"
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    chromium(page, f"--screenshot={file}", *scheme, size=(width, 2500))
    with Image.open(file) as image:
        assert image.size == (width, 2500)
        colours = image.convert("RGB").getcolors(maxcolors=1 << 24)
    count, background = max(colours)
    assert background == ((21, 25, 30) if dark else (255, 255, 255))
    assert len(colours) > 100 and count < 0.97 * width * 2500

"""The benchmark's own page in headless Chromium: every column of its tables of scores sorts.

Run with OMNIMERGE_BROWSER=1, where Debian's `chromium` is installed; never in CI.
"""

import html
import json
import re
import subprocess
from pathlib import Path

import pytest
from browser import CHROMIUM, need_chromium
from click.testing import CliRunner

from omnimerge.cli import main

pytestmark = pytest.mark.browser
need_chromium()

COMMITTED = Path(__file__).parents[2] / "benchmarks" / "results" / "bench"
NOTHING = ("", "\N{EN DASH}")
LINES = sorted(folder.name for folder in COMMITTED.iterdir())

# Clicks every head of every table of scores twice, and writes down the cells after each click.
SCRIPT = """
addEventListener("load", () => {
  const tables = [...document.querySelectorAll("table.sortable")].filter(
    (t) => [...t.tHead.rows[0].cells].some((c) => c.textContent.startsWith("Average"))
      && t.tHead.rows[0].cells[0].textContent.startsWith("model"));
  const cells = (t, i) => [...t.tBodies[0].rows].map((r) =>
    i ? [r.cells[i].textContent, r.cells[i].dataset.key ?? null] : [r.cells[i].textContent, null]);
  const found = tables.map((t) => [...t.tHead.rows[0].cells].map((head, i) => {
    const turns = [];
    for (let click = 0; click < 3; click++) {
      head.querySelector("button").click();
      turns.push([head.getAttribute("aria-sort"), cells(t, i)]);
    }
    return [head.querySelector("button").textContent, turns];
  }));
  const made = document.createElement("pre");
  made.id = "found";
  made.textContent = JSON.stringify(found);
  document.body.append(made);
});
"""


@pytest.fixture(scope="module")
def clicked(tmp_path_factory):
    """Table -> head -> what each of three clicks left: the state, and (text, key) by row."""
    page = tmp_path_factory.mktemp("page") / "page.html"
    run = CliRunner().invoke(main, ["bench", "report", str(COMMITTED), "-o", str(page)])
    assert run.exit_code == 0, run.output
    text = page.read_text("utf-8")
    text = re.sub(r"script-src '[^']*'", "script-src 'unsafe-inline'", text)
    page.write_text(text.replace("</body>", f"<script>{SCRIPT}</script></body>"), "utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={page.parent / 'profile'}", "--virtual-time-budget=20000"]
    done = subprocess.run(
        [*command, page.as_uri()], capture_output=True, timeout=180, check=True
    ).stdout.decode()
    found = re.search(r'<pre id="found">(.*?)</pre>', done, re.DOTALL)[1]
    return json.loads(html.unescape(found))


def test_each_line_has_its_table_of_scores(clicked):
    assert len(clicked) == len(LINES) >= 2
    for table in clicked:
        heads = [head for head, _ in table]
        assert heads[0].startswith("model") and {"λ", "memory"} <= set(heads)


def test_every_column_of_scores_sorts(clicked):
    for table in clicked:
        for head, turns in table[1:]:
            states = [state for state, _ in turns]
            assert states == ["descending", "ascending", "none"], head
            for state, cells in turns[:2]:
                keys = [float(key) for _, key in cells if key]
                assert len(set(keys)) > 1, head
                # Every cell that shows something sorts by a number; the others are last.
                assert all((text.strip() in NOTHING) != bool(key) for text, key in cells), head
                assert [bool(key) for _, key in cells] == sorted(
                    [bool(key) for _, key in cells], reverse=True
                ), head
                assert keys == sorted(keys, reverse=state == "descending"), head


def test_names_sort_and_the_third_click_restores(clicked):
    for table in clicked:
        _, turns = table[0]
        (first, up), (_, down), (last, back) = turns
        assert (first, last) == ("ascending", "none")
        assert [name for name, _ in up] == [name for name, _ in reversed(down)]
        assert back[0][0].startswith("base")
        for _, others in table[1:]:
            assert len(others[2][1]) == len(back)

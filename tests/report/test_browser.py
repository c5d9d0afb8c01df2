"""The page of a search in headless Chromium: what its script does, and how it looks.

Run with OMNIMERGE_BROWSER=1, where Debian's `chromium` is installed; never in CI.
"""

import json
import re
import shutil
import subprocess

import pytest
from browser import CHROMIUM, need_chromium
from PIL import Image

from omnimerge.report import write_search_report
from omnimerge.report.answers import Answers
from omnimerge.report.words import words
from omnimerge.search import read_result

pytestmark = pytest.mark.browser
need_chromium()

EVIL = "</script><img src=x onerror=\"document.title='caught'\"><b>bold</b>"
LONG = "the quick brown fox jumps over the lazy dog " * 8 + "https://example.com/" + "x" * 200
ANSWERS = {
    (0.0,): ["red", "Two", EVIL, "a red bus stops", "赤い車", "كلب صغير", "", LONG],
    (0.1,): ["red", "two", "b", "a red bus stops", "赤い車", "كلب صغير", "", LONG],
    (0.2,): ["red", "two", "b", "a blue bus", "青い車", "قطة صغيرة", "no", LONG + " end"],
    (0.3,): ["red", "two", "b", "a blue bus", "青い車", "قطة صغيرة", "no", LONG],
}
DONOR = ["blue", "two", "b", "a BLUE bus", "青い車", "قطة", "no", "short"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("search")


@pytest.fixture
def page(make, folder, noise, bootstrap):
    scores, accuracies = (None, 6.0, 5.0, None), (0.5, 0.75, 0.625, 0.25)
    about = {"noise": noise, "bootstrap": bootstrap, "warnings": ("look at <b>this</b>",)}
    made = make(
        folder,
        ANSWERS,
        scores,
        (0.2,),
        accuracies=accuracies,
        diagnostics=about,
        parents={"donor": DONOR},
    )
    return write_search_report(made)


def chromium(file, *arguments, address="", size=(1000, 900)):
    """What Chromium prints about a page, in a profile of its own."""
    profile = file.parent / "profile"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={profile}", "--virtual-time-budget=5000"]
    command += [f"--window-size={size[0]},{size[1]}", *arguments, f"{file.as_uri()}{address}"]
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    shutil.rmtree(profile, ignore_errors=True)
    return done.stdout.decode()


def dom(file, address="", *arguments, **options):
    return chromium(file, "--dump-dom", *arguments, address=address, **options)


def section(found, name):
    """What is inside of an element with an id, up to its known end."""
    ends = {"told": "</p>", "differences": "<details", "plain": "<h2", "alike": "</details>"}
    return re.search(rf'id="{name}"[^>]*>(.*?){ends[name]}', found, re.DOTALL)[1]


def marks(found, tag):
    return re.findall(rf"<{tag}>(.*?)</{tag}>", section(found, "differences"))


def test_the_address_chooses_two_points(page):
    found = dom(page, "#a=0&b=0.3")
    said = section(found, "told")
    assert said == "5 of 8 prompts are answered differently by alpha 0 and alpha 0.3."
    rows = re.findall(r'class="id">(q\d)<', section(found, "differences"))
    assert rows == ["q2", "q3", "q4", "q5", "q6"]
    assert marks(found, "del")[-4:] == ["red", "stops", "赤", "كلب صغير"]
    assert marks(found, "ins")[-4:] == ["blue", "青", "قطة صغيرة", "no"]
    assert "3 prompts are answered the same by both" in section(found, "alike")


def test_the_chosen_point_and_the_one_before_it_come_first(page):
    found = dom(page)
    assert section(found, "told") == (
        "5 of 8 prompts are answered differently by alpha 0.1 and alpha 0.2."
    )
    assert re.search(r'<div id="plain" hidden="">', found)
    assert not re.search(r'<div id="compare"[^>]*hidden', found)
    assert found.count("<option") == 10


@pytest.mark.parametrize(
    ("address", "names"),
    [
        ("#a=donor&b=0.10", "the donor alone and alpha 0.1"),
        ("#b=0.3", "alpha 0.1 and alpha 0.3"),
        ("#a=9&b=%3Cscript%3E", "alpha 0.1 and alpha 0.2"),
        ("#guards", "alpha 0.1 and alpha 0.2"),
    ],
)
def test_other_addresses(page, address, names):
    assert section(dom(page, address), "told").endswith(f"differently by {names}.")


def test_case_and_order_do_not_matter_to_marks(page):
    found = dom(page, "#a=donor&b=0.3")
    assert "q3" not in re.findall(r'class="id">(q\d)<', section(found, "differences"))
    assert section(found, "told").startswith("3 of 8 prompts")  # q0, q5, q7


def test_answers_with_html_are_text(page):
    found = dom(page, "#a=0&b=0.1")
    assert "<title>omnimerge search: alpha = 0.2</title>" in found
    assert "<img" not in found and "<b>bold" not in found
    text = re.sub(r"<[^>]*>", "", section(found, "differences"))
    assert "&lt;/script&gt;&lt;img src=x onerror=" in text


def test_the_script_marks_what_the_table_marks(page, folder):
    found = dom(page, "#a=0.1&b=0.2")
    table = Answers(folder, read_result(folder)).table()
    expected = [
        text for _, cells in table.rows for text, differs in cells[0].pieces if differs
    ]  # cells[0]: 0.1
    assert marks(found, "del") == expected == ["red", "stops", "赤", "كلب صغير"]


def test_words_are_split_alike_in_both_languages(page, tmp_path):
    texts = [
        "a red  bus. 3.5%", "snake_case", "赤い bus です", "ป้ายนี้เขียน", "한국어 답", "می\u200cروم",
        "👩\u200d🔬 👍🏽 ok", "e\u0301t\u00e9 na\u00efve", "don't (stop)",
        " lead", "हिन्दी में", "မြန်မာ", "\u2028x",
    ]  # fmt: skip
    script = (
        "const texts = " + json.dumps(texts) + ";"
        "document.body.textContent = JSON.stringify(texts.map((text) => words(text)));"
    )
    copy = altered(page, tmp_path, inside=script)
    body = re.search(r"<body>(.*)</body>", dom(copy), re.DOTALL)[1]
    assert json.loads(body.replace("&nbsp;", "\xa0")) == [words(text) for text in texts]


def test_without_javascript_the_table_is_there(page, tmp_path):
    copy = altered(page, tmp_path, allow=False)
    found = dom(copy)
    assert re.search(r'<div id="compare" hidden="">', found)
    assert re.search(r'<div id="plain">', found)
    assert "<mark>red</mark>" in section(found, "plain")
    assert "With JavaScript any two points can be compared" in section(found, "plain")


@pytest.mark.parametrize("width", [360, 800, 1200])
@pytest.mark.parametrize("allow", [True, False], ids=["script", "no script"])
def test_the_page_is_never_wider_than_the_screen(page, tmp_path, width, allow):
    wide = f'<iframe style="width:{width}px;height:3000px;border:0" src="page.html#a=0&b=0.3">'
    inner = altered(page, tmp_path, allow=allow)
    frame = tmp_path / "frame.html"
    frame.write_text(
        f"<body>{wide}</iframe><script>onload = () => {{"
        "const inside = frames[0].document.documentElement;"
        "document.title = inside.scrollWidth + ' ' + inside.clientWidth }</script>"
    )
    assert inner.name == "page.html"
    found = dom(frame, "", "--allow-file-access-from-files", size=(1400, 3100))
    assert re.search(r"<title>(.*?)</title>", found)[1] == f"{width} {width}"


@pytest.mark.parametrize("width", [360, 800, 1200])
def test_screenshots_show_something(page, tmp_path, width):
    file = tmp_path / "shot.png"
    chromium(page, f"--screenshot={file}", size=(width, 2000))
    with Image.open(file) as image:
        assert image.size == (width, 2000)
        colours = image.convert("RGB").getcolors(maxcolors=1 << 24)
    assert len(colours) > 100
    assert max(count for count, _ in colours) < 0.97 * width * 2000


def altered(page, folder, *, allow=True, inside=""):
    """A copy of the page whose script is forbidden, or has more at its end."""
    text = page.read_text(encoding="utf-8")
    rule = "'unsafe-inline'" if allow else "'none'"
    text = re.sub(r"script-src '[^']*'", f"script-src {rule}", text)
    if inside:
        text = text.replace("})();\n</script>", f"{inside}}})();\n</script>")
    copy = folder / "page.html"
    copy.write_text(text, encoding="utf-8")
    return copy

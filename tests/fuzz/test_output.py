"""What names, paths and answers of strangers may do where they are shown: nothing."""

import json
import re
from html.parser import HTMLParser

import hostile
import pytest
import yaml
from click.testing import CliRunner

from omnimerge import errors
from omnimerge.cli import _console, main
from omnimerge.errors import ConversionError, OmnimergeError, RecipeError, printable
from omnimerge.report.card import render_card
from omnimerge.report.mapping import write_mapping_report

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\u202eabc\u2028\ud800\nError: no"
SCRIPT = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&lt;"


def run(*arguments):
    return CliRunner().invoke(main, [str(each) for each in arguments])


def shows_nothing(text):
    bad = {each for line in text.split("\n") for each in line if not each.isprintable()}
    assert not bad, bad
    assert "\nError: no" not in text


def model(folder, name):
    """The small model with one more tensor of that name."""
    hostile.write_model(folder)
    head, body = hostile.split_header(hostile.model_bytes())
    head[name] = {"dtype": "U8", "shape": [0], "data_offsets": [len(body), len(body)]}
    raw = json.dumps(head).encode()
    (folder / "model.safetensors").write_bytes(hostile.with_header(raw, body))
    return folder


def test_printable_by_hand():
    assert printable("θ é 名 a\\b") == "θ é 名 a\\b"
    assert printable("\x1b[2J\n\x9b\u202e\ud800") == r"\x1b[2J\n\x9b\u202e\ud800"


@pytest.mark.parametrize(
    "kind",
    [each for each in vars(errors).values() if isinstance(each, type)
     and issubclass(each, OmnimergeError)],
)  # fmt: skip
def test_every_error_is_printable(kind):
    try:
        error = kind(EVIL)
    except TypeError:
        error = kind([EVIL, EVIL]) if kind is not errors.UnknownMethodError else kind(EVIL, [EVIL])
    shows_nothing(str(error))


def test_problems_stay_as_they_are():
    error = RecipeError([EVIL], EVIL)
    assert error.problems == (EVIL,)
    shows_nothing(str(ConversionError([EVIL, "two"], EVIL)))
    assert str(ConversionError(["one", "two"], "x")).count("\n") == 2


@pytest.mark.parametrize("as_json", [True, False])
def test_names_on_the_terminal(tmp_path, as_json):
    first, second = model(tmp_path / "one", EVIL), model(tmp_path / "two", "visual." + EVIL)
    config = {**hostile.CONFIG, "model_type": EVIL.replace("\ud800", ""), "architectures": [EVIL]}
    (first / "config.json").write_text(json.dumps(config))
    more = ["--json"] if as_json else []
    for arguments in (["inspect", first], ["map", first, second], ["map", second, first]):
        done = run(*arguments, *more)
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exc_info
        shows_nothing(done.output)
        if as_json and done.exit_code == 0:
            json.loads(done.output)


def test_files_with_line_breaks_in_their_names(tmp_path):
    odd = tmp_path / "a\nError: no\x1b[2J"
    done = run("inspect", odd)
    assert done.exit_code == 1
    shows_nothing(done.output)
    assert len(done.output.splitlines()) == 1
    hostile.write_model(odd)
    done = run("inspect", odd)
    assert done.exit_code == 0
    shows_nothing(done.output)


def test_what_the_console_prints(capsys):
    _console.echo(EVIL)
    _console.echo(EVIL, err=True)
    _console.echo_text("a: 1\nb: \x1b[2J\n")
    _console.table([EVIL], [[EVIL], ["[red]x[/red]"]])
    _console.print_json({EVIL: [EVIL, "θ"]})
    out, err = capsys.readouterr()
    shows_nothing(out)
    shows_nothing(err)
    assert "[red]x[/red]" in out and "a: 1\nb: \\x1b[2J\n" in out
    start = out.index("{\n")
    assert json.loads(out[start:]) == {EVIL: [EVIL, "θ"]}


class Page(HTMLParser):
    """The elements of a page, with their attributes."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_names_in_the_map(tmp_path):
    first, second = model(tmp_path / "one", SCRIPT), model(tmp_path / "two", f"visual.{SCRIPT}")
    for folder in (first, second):
        (folder / "config.json").write_text(json.dumps({**hostile.CONFIG, "hidden_act": SCRIPT}))
    done = run("map", first, second, "--html", tmp_path / "map.html")
    page = (tmp_path / "map.html").read_text()
    assert (tmp_path / "map.html").is_file(), done.output
    assert "&lt;script&gt;alert" in page
    harmless(page)


def test_directions_in_the_map(tmp_path):
    """A name cannot turn around what stands beside it, nor hold what is no text."""
    odd = "a\u202e\x1b[2J\u2066b"
    first, second = model(tmp_path / "one", odd), model(tmp_path / "two", f"visual.{odd}")
    done = run("map", first, second, "--html", tmp_path / "map.html")
    page = (tmp_path / "map.html").read_text()
    assert (tmp_path / "map.html").is_file(), done.output
    assert r"a\u202e\x1b[2J\u2066b" in page
    assert not set(odd) & set(page) - set("a[2Jb")


def harmless(text):
    tags = Page(text).found
    assert not [tag for tag, _ in tags if tag in ("script", "img", "iframe", "object")]
    assert not [key for _, attributes in tags for key in attributes if key.startswith("on")]


def test_everything_in_the_map(tmp_path):
    """Every text of an alignment, not only the names that headers hold."""
    first = model(tmp_path / "one", "x")
    done = run("map", first, first, "--json")
    alignment = json.loads(done.output)

    def spoil(value, key=""):
        if isinstance(value, dict):
            return {k: spoil(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [spoil(each, key) for each in value]
        fixed = key in ("op", "slot", "source_slots", "state")
        return f"{value}{SCRIPT}" if isinstance(value, str) and not fixed else value

    file = write_mapping_report(spoil(alignment), tmp_path / "map.html")
    harmless(file.read_text())


TICKS = "x\n```\n# injected\n<script>alert(1)</script>\n| a `b` [c](javascript:alert(1)) ![](x)"


def test_the_model_card():
    manifest = {
        "inputs": {
            "target": {"reference": TICKS, "revision": TICKS, "license": {"license": TICKS}},
            "models.0": {"reference": "me/model", "adapter": {"reference": TICKS}},
        },
        "recipe": {"method": "linear", "target": TICKS, "models": [{"model": TICKS}]},
        "counts": {"linear": 1},
        "kept_reasons": {TICKS: 3},
        "versions": {},
    }
    card = render_card(manifest)
    _, front, body = card.split("---\n", 2)
    yaml.safe_load(front)
    fence = re.search("^(`{4,})yaml$", body, re.MULTILINE).group(1)
    before, recipe, after = re.split(f"^{fence}(?:yaml)?$", body, flags=re.MULTILINE)
    assert yaml.safe_load(recipe) == manifest["recipe"]
    for text in (before, after):
        assert "<script" not in re.sub("`[^`].*?`", "", text)
        assert not re.search("^# injected|^```[^`]*$", text, re.MULTILINE)
        assert not re.search(r"(?<!\\)\]\(javascript", re.sub("`+ .*? `+", "", text))
    title = next(line for line in body.splitlines() if line.startswith("# "))
    assert "\\[c\\](javascript" in title and "&lt;script" in before

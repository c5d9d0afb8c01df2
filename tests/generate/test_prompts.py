"""Prompt files: what is read, and that everything wrong is said at once."""

import json
import subprocess
import sys

import pytest

from omnimerge.errors import PromptError
from omnimerge.generate import Prompt, read_prompts, sample, without_answers


def write(folder, *lines):
    file = folder / "prompts.jsonl"
    file.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return file


def test_reads_every_key_and_resolves_images_beside_the_file(tmp_path):
    (tmp_path / "a.png").touch()
    (tmp_path / "b.png").touch()
    file = write(
        tmp_path,
        {"id": "1", "prompt": "What?", "image": "a.png", "answer": "red", "kind": "colour"},
        "",
        {"id": "2", "prompt": "Both?", "image": ["a.png", "b.png"]},
        {"id": "3", "prompt": "Text\u2028only"},
    )

    assert read_prompts(file) == [
        Prompt("1", "What?", (tmp_path / "a.png",), "red", "colour"),
        Prompt("2", "Both?", (tmp_path / "a.png", tmp_path / "b.png")),
        Prompt("3", "Text\u2028only"),
    ]


def test_sounds_and_videos(tmp_path):
    (tmp_path / "frames").mkdir()
    for name in ("a.wav", "b.wav", "c.gif"):
        (tmp_path / name).touch()
    file = write(
        tmp_path,
        {"id": "1", "prompt": "x", "audio": "a.wav", "video": ["c.gif", "frames"]},
        {"id": "2", "prompt": "x", "audio": ["a.wav", "b.wav"], "video": []},
    )
    a, b, c, frames = (tmp_path / name for name in ("a.wav", "b.wav", "c.gif", "frames"))
    assert read_prompts(file) == [
        Prompt("1", "x", audios=(a,), videos=(c, frames)),
        Prompt("2", "x", audios=(a, b)),
    ]


def test_numbers_survive_as_they_are_written(tmp_path):
    file = write(tmp_path, '{"id": 7, "prompt": "How much?", "answer": 1.0}')
    assert read_prompts(file) == [Prompt("7", "How much?", answer="1.0")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "line 2: not JSON"),
        ("[1]", "line 2: not a JSON object"),
        ('{"id": "2"}', "line 2: no 'prompt'; add it"),
        ('{"prompt": "x"}', "line 2: no 'id'; add it"),
        ('{"id": "2", "prompt": "x", "imag": "a"}', "unknown key 'imag', did you mean 'image'?"),
        ('{"id": "2", "prompt": "x", "zzz": 1}', "unknown key 'zzz'; known: id, prompt, image"),
        ('{"id": "1", "prompt": "x"}', "line 2: id '1' was used on line 1; give unique ids"),
        ('{"id": "2", "prompt": "x", "image": "no.png"}', "line 2: image 'no.png' is not a file"),
        ('{"id": "2", "prompt": "x", "image": {}}', "is not a path or a list of paths"),
        ('{"id": "2", "prompt": "x", "image": "."}', "line 2: image '.' is not a file"),
        ('{"id": "2", "prompt": "x", "audio": "no.wav"}', "line 2: audio 'no.wav' is not a file"),
        ('{"id": "2", "prompt": "x", "video": ["a", null]}', 'video ["a", null] is not a path'),
        ('{"id": "2", "prompt": "x", "video": "a"}', "video 'a' is not a file or a folder of fr"),
        ('{"id": "2", "prompt": ["x"]}', 'prompt ["x"] is not text'),
        ('{"id": "2", "prompt": "x", "answer": true}', "answer true is not text"),
    ],
)
def test_mistakes_name_file_line_and_way_out(tmp_path, line, message):
    file = write(tmp_path, '{"id": "1", "prompt": "x"}', line)
    with pytest.raises(PromptError) as error:
        read_prompts(file)
    assert str(file) in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_all_mistakes_are_reported_at_once_the_first_five_in_full(tmp_path):
    file = write(tmp_path, *(f'{{"id": "{i}"}}' for i in range(8)))
    with pytest.raises(PromptError) as error:
        read_prompts(file)
    assert str(error.value).count("no 'prompt'") == 5
    assert str(error.value).endswith("; and 3 more")


def test_empty_missing_and_undecodable_files(tmp_path):
    with pytest.raises(PromptError, match="holds no prompt"):
        read_prompts(write(tmp_path, ""))
    with pytest.raises(PromptError, match="no such file"):
        read_prompts(tmp_path / "none.jsonl")
    with pytest.raises(PromptError, match="cannot be read"):
        read_prompts(tmp_path)
    (tmp_path / "latin.jsonl").write_bytes('{"id": "é"}'.encode("latin-1"))
    with pytest.raises(PromptError, match="not UTF-8"):
        read_prompts(tmp_path / "latin.jsonl")


def test_samples_are_nested_ordered_and_depend_on_the_seed_only():
    prompts = [Prompt(str(i), "?") for i in range(50)]
    twenty = sample(prompts, 20, seed=0)

    assert len(twenty) == 20
    assert twenty == sorted(twenty, key=lambda p: int(p.id))
    assert {p.id for p in sample(prompts[::-1], 20, seed=0)} == {p.id for p in twenty}
    assert set(sample(prompts, 10, seed=0)) < set(twenty)
    assert sample(prompts, 20, seed=1) != twenty
    assert sample(prompts, 500, seed=0) == prompts
    with pytest.raises(PromptError, match="give a number of 1 or more"):
        sample(prompts, 0, seed=0)


def test_answers_can_be_taken_out():
    assert without_answers([Prompt("1", "?", answer="x")]) == [Prompt("1", "?")]


def test_importing_the_rooms_loads_neither_torch_nor_transformers():
    code = """
import sys
import omnimerge.generate, omnimerge.search
from omnimerge.generate import Prompt, Response, read_prompts
from omnimerge.search import CRITERIA, accuracy, parse_grid, read_result, select
assert not {"torch", "transformers", "datasets", "soundfile"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)

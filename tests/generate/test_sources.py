"""Prompts from datasets on disk, TSVs of VLMEvalKit, and JSON lines with other names."""

import base64
import csv
import hashlib
import io
import json
import subprocess
import sys

import datasets
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from omnimerge.errors import PromptError
from omnimerge.generate import Prompt, read_prompts
from omnimerge.generate.sources import dataset as dataset_source
from omnimerge.generate.sources.embedded import MediaFolder

# pandas writes a lone carriage return as it is, and takes it for the end of the row on reading; csv
# of Python 3.10 refuses null bytes.
_CHARACTERS = st.characters(codec="utf-8", exclude_characters="\r\0")


@pytest.fixture(scope="module")
def pictures():
    """Three PNG files as bytes."""
    found = []
    for seed in range(3):
        pixels = np.random.default_rng(seed).integers(0, 255, (8, 9, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "png")
        found.append(buffer.getvalue())
    return found


def named(data, suffix=".png"):
    return hashlib.sha256(data).hexdigest() + suffix


def b64(data):
    return base64.b64encode(data).decode()


def save(rows, folder, **features):
    known = datasets.Features(features) if features else None
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows, features=known).save_to_disk(str(folder))
    return folder


def tsv(folder, header, *rows, name="bench.tsv"):
    file = folder / name
    with file.open("w", newline="", encoding="utf-8") as opened:
        csv.writer(opened, delimiter="\t", lineterminator="\n").writerows([header, *rows])
    return file


class TestJsonLines:
    def test_other_keys_with_a_map(self, tmp_path):
        (tmp_path / "a.png").touch()
        file = tmp_path / "q.jsonl"
        record = {"question_id": 7, "text": "NA", "image": "a.png", "category": "c", "label": "x"}
        file.write_text(json.dumps(record))
        columns = {"id": "question_id", "prompt": "text", "kind": "category"}

        [prompt] = read_prompts(file, columns=columns)

        assert prompt == Prompt("7", "NA", (tmp_path / "a.png",), None, "c")

    def test_a_mapped_key_that_is_not_there(self, tmp_path):
        file = tmp_path / "q.jsonl"
        file.write_text('{"id": "1", "prompt": "x"}')
        with pytest.raises(PromptError, match="line 1: no 'text'; add it"):
            read_prompts(file, columns={"prompt": "text"})

    def test_a_field_that_prompts_do_not_have(self, tmp_path):
        with pytest.raises(PromptError, match=r"no field 'promt'.* did you mean 'prompt'\?"):
            read_prompts(tmp_path / "q.jsonl", columns={"promt": "text"})

    def test_without_a_suffix_the_first_line_decides(self, tmp_path):
        file = tmp_path / "prompts"
        file.write_text('\n{"id": "1",\t"prompt": "x"}')
        assert read_prompts(file) == [Prompt("1", "x")]


class TestDataset:
    def test_embedded_images_become_files_named_by_their_content(self, pictures, tmp_path):
        rows = [
            {"id": i, "prompt": f"p{i}", "image": {"bytes": pictures[n], "path": "same.png"}}
            for i, n in enumerate((0, 1, 0))
        ]
        integer, text = datasets.Value("int64"), datasets.Value("string")
        folder = save(rows, tmp_path / "d", id=integer, prompt=text, image=datasets.Image())

        prompts = read_prompts(folder, media=tmp_path / "media")

        assert [p.id for p in prompts] == ["0", "1", "2"]
        assert [p.images[0].read_bytes() for p in prompts] == [pictures[n] for n in (0, 1, 0)]
        written = sorted(file.name for file in (tmp_path / "media").iterdir())
        assert written == sorted(named(data) for data in pictures[:2])

    @pytest.mark.parametrize("kind", ["pil", "bytes", "base64", "data url", "struct", "path"])
    def test_every_way_to_hold_an_image(self, pictures, tmp_path, kind):
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / "beside.png").write_bytes(pictures[0])
        value = {
            "pil": Image.open(io.BytesIO(pictures[0])),
            "bytes": pictures[0],
            "base64": b64(pictures[0]),
            "data url": "data:image/png;base64," + b64(pictures[0]),
            "struct": {"bytes": pictures[0], "path": None},
            "path": "beside.png",
        }[kind]
        features = {"prompt": datasets.Value("string"), "image": datasets.Image()}
        rows = [{"prompt": "x", "image": value}]
        folder = save(rows, tmp_path / "d", **(features if kind == "pil" else {}))

        [prompt] = read_prompts(folder, media=tmp_path / "media")

        [image] = prompt.images
        assert image.name == ("beside.png" if kind == "path" else named(image.read_bytes()))
        with Image.open(image) as found, Image.open(io.BytesIO(pictures[0])) as expected:
            assert found.tobytes() == expected.tobytes()

    def test_lists_and_sounds(self, pictures, tmp_path):
        sound = b"RIFF\x00\x00\x00\x00WAVEfmt "
        rows = [{"prompt": "x", "image": pictures[:2], "audio": [{"bytes": sound, "path": "a"}]}]
        folder = save(rows, tmp_path / "d")

        [prompt] = read_prompts(folder, media=tmp_path / "media")

        assert [file.name for file in prompt.images] == [named(data) for data in pictures[:2]]
        assert [file.name for file in prompt.audios] == [named(sound, ".wav")]

    def test_ids_and_texts_stay_as_they_are(self, tmp_path):
        rows = [{"id": "007", "prompt": "None"}, {"id": "1.0", "prompt": "NA"}]
        rows.append({"id": "NaN", "prompt": " null\n"})
        prompts = read_prompts(save(rows, tmp_path / "d"))
        assert [(p.id, p.prompt) for p in prompts] == [tuple(row.values()) for row in rows]

    def test_without_ids_the_row_number_is_one(self, tmp_path):
        folder = save([{"prompt": "a"}, {"prompt": "b"}], tmp_path / "d")
        assert [p.id for p in read_prompts(folder)] == ["0", "1"]

    def test_answers_are_read_on_request_only(self, tmp_path, monkeypatch):
        rows = [{"q": "x", "answer": "red", "group": 1}, {"q": "y", "answer": None, "group": 0}]
        columns = {"prompt": "q", "kind": "group"}
        names = datasets.ClassLabel(names=["easy", "hard"])
        text = datasets.Value("string")
        folder = save(rows, tmp_path / "d", q=text, answer=text, group=names)
        touched = []
        rows_of = dataset_source._rows
        monkeypatch.setattr(
            dataset_source, "_rows", lambda table, of: touched.append(of) or rows_of(table, of)
        )

        assert [p.answer for p in read_prompts(folder, columns=columns)] == [None, None]
        assert touched == [["group", "q"]]
        labelled = read_prompts(folder, columns=columns, labels=True)
        assert [(p.answer, p.kind) for p in labelled] == [("red", "hard"), (None, "easy")]

    def test_splits(self, tmp_path):
        sets = {
            name: datasets.Dataset.from_list([{"prompt": name}]) for name in ("train", "validation")
        }
        datasets.disable_progress_bars()
        datasets.DatasetDict(sets).save_to_disk(str(tmp_path / "two"))
        datasets.DatasetDict({"all": sets["train"]}).save_to_disk(str(tmp_path / "one"))

        [prompt] = read_prompts(tmp_path / "two#validation")

        assert prompt.prompt == "validation"
        assert read_prompts(tmp_path / "one") == read_prompts(tmp_path / "one#all")
        with pytest.raises(PromptError, match=r"has the splits train, validation; say which.*#tr"):
            read_prompts(tmp_path / "two")
        with pytest.raises(PromptError, match=r"no split 'valid', did you mean 'validation'\?"):
            read_prompts(tmp_path / "two#valid")
        with pytest.raises(PromptError, match="without splits; leave out #train"):
            read_prompts(tmp_path / "two" / "train#train")

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            ({}, "has no column 'prompt', only 'key', 'question', 'picture', 'answer'; say which"),
            ({"prompt": "qestion"}, "no column 'qestion', did you mean 'question'?"),
            ({"prompt": "question", "image": "zzz"}, "no column 'zzz'; it has 'key', 'question'"),
            ({"prompt": "picture"}, "prompt is a bytes, not text; choose another column"),
            ({"prompt": "question", "image": "key"}, "image is a int, not a path, bytes"),
            ({"prompt": "question", "image": "question"}, "image 'x' is not a file"),
            ({"prompt": "question", "id": "answer"}, "row 2: id 'same' was used on row 1"),
            ({"prompt": "question", "image": "picture"}, "row 2: prompt '1': image of 9 bytes"),
        ],
    )
    def test_mistakes_name_the_column_or_the_row(self, pictures, tmp_path, columns, message):
        rows = [
            {"key": i, "question": "x", "picture": data, "answer": "same"}
            for i, data in enumerate((pictures[0], b"no image!"))
        ]
        folder = save(rows, tmp_path / "d")
        with pytest.raises(PromptError) as error:
            read_prompts(folder, columns=columns, labels=True, media=tmp_path / "media")
        assert message in str(error.value)
        assert str(folder) in str(error.value)
        assert "\n" not in str(error.value)

    def test_a_folder_that_is_none_and_one_that_is_broken(self, tmp_path):
        with pytest.raises(PromptError, match=r"cannot be read \(a folder without state\.json"):
            read_prompts(tmp_path)
        folder = save([{"prompt": "x"}], tmp_path / "d")
        [shard] = folder.glob("*.arrow")
        shard.write_bytes(b"nothing of the kind")
        with pytest.raises(PromptError, match="cannot be read as a dataset"):
            read_prompts(folder)

    def test_without_the_library(self, tmp_path, monkeypatch):
        folder = save([{"prompt": "x"}], tmp_path / "d")
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(PromptError, match=r"pip install 'omnimerge\[datasets\]'"):
            read_prompts(folder)


class TestTsv:
    def test_the_prompt_of_vlmevalkit(self, pictures, tmp_path):
        header = ["index", "hint", "question", "A", "B", "C", "answer", "category", "image"]
        file = tsv(
            tmp_path,
            header,
            ["007", "Look.", "What?", "None", "NA", "", "B", "colour", b64(pictures[0])],
            ["1", "", "Who\tis\n it?", "a", "b", "c", "A", "", b64(pictures[1])],
            ["2", "", "Open?", "", "", "", "", "", ""],
        )

        first, second, third = read_prompts(file, media=tmp_path / "media")

        assert first == Prompt(
            "007",
            "Hint: Look.\nQuestion: What?\nOptions:\nA. None\nB. NA\n"
            "Please select the correct answer from the options above. \n",
            (tmp_path / "media" / named(pictures[0]),),
            None,
            "colour",
        )
        assert second.prompt == (
            "Question: Who\tis\n it?\nOptions:\nA. a\nB. b\nC. c\n"
            "Please select the correct answer from the options above. \n"
        )
        assert second.kind is None
        assert third == Prompt("2", "Question: Open?\n")

    def test_questions_without_options_are_asked_as_they_are(self, pictures, tmp_path):
        file = tsv(
            tmp_path, ["index", "image", "question"], ["1", b64(pictures[0]), "NA"], name="vqa"
        )
        assert read_prompts(file, media=tmp_path)[0].prompt == "NA"

    def test_answers_are_read_on_request_only(self, tmp_path):
        file = tsv(tmp_path, ["index", "question", "answer"], ["1", "x", "None"], ["2", "y", ""])
        assert [p.answer for p in read_prompts(file)] == [None, None]
        assert [p.answer for p in read_prompts(file, labels=True)] == ["None", None]

    def test_images_of_other_rows_lists_and_paths(self, pictures, tmp_path):
        (tmp_path / "a.png").write_bytes(pictures[2])
        both = str([b64(pictures[0]), b64(pictures[1])])
        file = tsv(
            tmp_path,
            ["index", "image", "question", "image_path"],
            ["1", "3", "as in row 3", "ignored.png"],
            ["2", both, "two", "['x.png', 'y.png']"],
            ["3", b64(pictures[0]), "one", ""],
            ["4", "", "a path", "a.png"],
            ["5", "", "paths", "['a.png', 'a.png']"],
        )

        images = [p.images for p in read_prompts(file, media=tmp_path / "media")]

        first, second = (tmp_path / "media" / named(data) for data in pictures[:2])
        beside = tmp_path / "a.png"
        assert images == [(first,), (first, second), (first,), (beside,), (beside, beside)]

    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.text(_CHARACTERS, min_size=1), min_size=1))
    def test_texts_written_by_pandas_come_back(self, tmp_path_factory, texts):
        table = pd.DataFrame({"index": range(len(texts)), "question": texts, "answer": "?"})
        file = tmp_path_factory.getbasetemp() / "pandas.tsv"
        table.to_csv(file, sep="\t", index=False)
        assert [p.prompt for p in read_prompts(file)] == texts

    def test_columns_of_other_names(self, tmp_path):
        file = tsv(tmp_path, ["qid", "text", "A", "B"], ["x1", "Which?", "one", "two"])
        [prompt] = read_prompts(file, columns={"id": "qid", "prompt": "text"})
        assert (prompt.id, prompt.prompt.splitlines()[0]) == ("x1", "Question: Which?")

    def test_lines_of_many_megabytes(self, tmp_path):
        pixels = np.random.default_rng(0).integers(0, 255, (1200, 1200, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "png")
        limit = csv.field_size_limit()
        file = tsv(tmp_path, ["index", "image", "question"], ["1", b64(buffer.getvalue()), "x"])
        assert file.stat().st_size > 5_000_000

        [prompt] = read_prompts(file, media=tmp_path / "media")

        assert prompt.images[0].read_bytes() == buffer.getvalue()
        assert csv.field_size_limit() == limit

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            (
                ["2", "?" * 80, "x"],
                "row 2: prompt '2': image '????????????????????????????????????",
            ),
            (["2", "A" * 82, "x"], "nor base64 (Incorrect padding)"),
            (["2", b64(b"no image at all" * 9), "x"], "row 2: prompt '2': image of 135 bytes"),
            (["2", "99", "x"], "row 2: prompt '2': image '99' is not a file; paths are relative"),
            (["2", "", ""], "row 2: prompt '2': no prompt; add it"),
            (["", "", "x"], "row 2: no id; add it"),
            (["1", "", "x"], "row 2: id '1' was used on row 1; give unique ids"),
            (["2", ""], "row 2: has 2 fields, the header 3"),
        ],
    )
    def test_mistakes_name_the_row_and_its_id(self, pictures, tmp_path, row, message):
        header = ["index", "image", "question"]
        file = tsv(tmp_path, header, ["1", b64(pictures[0]), "x"], row, ["3", "", "y"])
        with pytest.raises(PromptError) as error:
            read_prompts(file, media=tmp_path / "media")
        assert message in str(error.value)
        assert "\n" not in str(error.value)

    def test_a_truncated_image(self, pictures, tmp_path):
        file = tsv(tmp_path, ["index", "image", "question"], ["x", b64(pictures[0][:90]), "?"])
        with pytest.raises(PromptError, match="prompt 'x': image of 90 bytes cannot be decoded"):
            read_prompts(file, media=tmp_path / "media")

    def test_files_that_are_no_table(self, tmp_path):
        file = tmp_path / "a.tsv"
        with pytest.raises(PromptError, match="no such file"):
            read_prompts(file)
        file.write_text("")
        with pytest.raises(PromptError, match="holds no rows"):
            read_prompts(file)
        file.write_text("index\tindex\nx\ty\n")
        with pytest.raises(PromptError, match="two columns 'index'"):
            read_prompts(file)
        file.write_text('index\tquestion\n1\t"open\n')
        with pytest.raises(PromptError, match="row 1: is no TSV row"):
            read_prompts(file)
        file.write_bytes("index\tquestion\n1\té\n".encode("latin-1"))
        with pytest.raises(PromptError, match="not UTF-8"):
            read_prompts(file)
        file.write_text("index\ttext\n1\tx\n")
        with pytest.raises(PromptError, match="has no column 'question', only 'index', 'text'"):
            read_prompts(file)


class TestMediaFolder:
    def test_the_default_lives_as_long_as_the_process(self, pictures, tmp_path):
        file = tsv(tmp_path, ["index", "image", "question"], ["1", b64(pictures[0]), "x"])
        code = (
            "import sys; from pathlib import Path; from omnimerge.generate import read_prompts\n"
            "image = read_prompts(Path(sys.argv[1]))[0].images[0]\n"
            "assert image.is_file(); print(image)"
        )
        command = [sys.executable, "-c", code, str(file)]
        image = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        assert image.endswith(named(pictures[0]))
        assert not (tmp_path / image).parent.exists()

    def test_a_file_cut_short_is_written_again_and_a_whole_one_is_not(self, tmp_path):
        folder = MediaFolder(tmp_path)
        file = folder.keep(b"something")
        before = file.stat().st_mtime_ns
        assert folder.keep(b"something").stat().st_mtime_ns == before
        file.write_bytes(b"some")
        assert folder.keep(b"something").read_bytes() == b"something"
        assert list(tmp_path.iterdir()) == [file]

    def test_a_folder_that_cannot_be_made(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(PromptError, match="give another folder for embedded media"):
            MediaFolder(tmp_path / "file").keep(b"x")

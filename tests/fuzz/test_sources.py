"""Prompts, logs and journals that somebody else wrote: named attacks."""

import json
import zipfile

import pytest

from omnimerge.checkpoint.journal import journal_key, read_journal
from omnimerge.errors import PromptError, SearchError
from omnimerge.generate import read_prompts
from omnimerge.search.logs import lmms_eval
from omnimerge.search.logs.workbook import read_workbook


def test_a_header_that_is_no_tsv(tmp_path):
    file = tmp_path / "p.tsv"
    file.write_text('"a":x\tq\n')
    with pytest.raises(PromptError, match="is no TSV row"):
        read_prompts(file)


def test_an_image_path_that_is_no_list(tmp_path):
    file = tmp_path / "p.tsv"
    file.write_text("index\tquestion\timage_path\n1\twhat\t[{[]:1}]\n")
    with pytest.raises(PromptError, match=r"\[\{\[\]:1\}\]"):
        read_prompts(file)


def test_answers_in_deep_lists():
    deep = "x"
    for _ in range(100_000):
        deep = [deep]
    assert lmms_eval._leaves(deep) == ["x"]
    assert not lmms_eval._is_likelihood(deep)
    assert lmms_eval._leaves([1, [2, [3, 4]], 5]) == [1, 2, 3, 4, 5]
    assert lmms_eval._is_likelihood([[[-1.5, "False"]]])


def test_a_workbook_that_unpacks_to_gigabytes(tmp_path):
    file = tmp_path / "w.xlsx"
    with (
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("xl/worksheets/sheet1.xml", "w", force_zip64=True) as out,
    ):
        for _ in range(501):
            out.write(b" " * 10**6)
    with pytest.raises(SearchError, match=r"501,000,000 bytes when unpacked"):
        read_workbook(file, file.read_bytes())


@pytest.mark.parametrize("name", ["../other", "/etc", "..", "a/b"])
def test_splits_that_leave_the_folder(tmp_path, name):
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": [name]}))
    with pytest.raises(PromptError, match="which is no folder in it"):
        read_prompts(tmp_path)


def test_a_journal_of_brackets(tmp_path):
    file = tmp_path / "j"
    file.write_bytes(b"[" * 100_000 + b"\n")
    assert read_journal(file) == ("", []) and journal_key(file) == ""
    file.write_bytes(b'{"merge":"k"}\n[[[0,5]]]\n' + b"[" * 100_000 + b"\n")
    assert read_journal(file) == ("k", [[[0, 5]]])

"""Distances: worked examples, the edit distance against the table of the textbook."""

import re
import sys
import time
from types import ModuleType
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omnimerge.errors import SearchError
from omnimerge.search.distances import (
    DISTANCES,
    EDIT,
    EXACT,
    NORMALIZED,
    get_distance,
    levenshtein,
    normalize,
)


def one(distance, a, b):
    (value,) = distance.between([a], [b])
    assert distance.between([b], [a]) == [value]
    return value


def test_exact_forgives_case_alone():
    assert EXACT.between(["Red", "1", "1.0", " a"], ["rED", "1", "1", "a"]) == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("Yes.", "yes"),
        ("  a   dog\n", "A dog"),
        ("**B**", "b"),
        ("(A)", "A."),
        ('"a cat!"', "a cat"),
        ("1,000", "1000"),
        ("1000.0", "1,000"),
        ("1,234,567.50", "1234567.5"),
        ("12,34,567", "1234567"),
        (".5", "0.50"),
        ("-5.", "-5"),
        ("−5", "-5"),
        ("$1,000", "$1000"),
        ("５", "5"),
        ("１，０００", "1000"),
        ("３．０", "3"),
        ("٣", "3"),
        ("50％", "50%"),
        # Korean and Chinese, which have no case and may have no spaces
        ("네.", "네"),
        ("한글", "\u1112\u1161\u11ab\u1100\u1173\u11af"),  # composed and decomposed
        ("1,000명", "1000명"),
        ("  고양이  두 마리 ", "고양이 두 마리"),
        ("猫。", "猫"),
        ("「猫」", "猫"),
        ("答案：３只", "答案:3只"),
        ("约1,000元", "约1000.0元"),
        ("STRASSE", "straße"),
    ],
)
def test_form_is_normalized_away(a, b):
    assert normalize(a) == normalize(b)
    assert one(NORMALIZED, a, b) == 0


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("a dog", "the dog"),
        ("a dog", "dog"),
        ("-5", "5"),
        (".5", "5"),
        ("5%", "5"),
        ("007", "7"),
        ("1,00", "100"),
        ("1,5", "1.5"),
        ("10.0.0.1", "10.0.0"),
        ("10.0.1", "10.1"),
        ("C#", "C"),
        ("C++", "C"),
        ("it's", "its"),
        ("A B", "AB"),
        ("三", "3"),
        ("汉", "漢"),
        ("고양이 두 마리", "고양이두마리"),
        ("네", "아니요"),
        ("?", "!"),
        ("", "."),
        ("None", ""),
        ("[100,200,300]", "[100,20,300]"),
    ],
)
def test_content_is_not(a, b):
    assert normalize(a) != normalize(b)
    assert one(NORMALIZED, a, b) == 1


@given(st.text())
def test_white_space_around_any_text_is_form(text):
    assert one(NORMALIZED, text, f"  {text}\n") == 0 or not text.strip()


def table(a, b):
    """Wagner and Fischer, 1974."""
    before = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        here = [i]
        for j, y in enumerate(b, start=1):
            here.append(min(before[j] + 1, here[-1] + 1, before[j - 1] + (x != y)))
        before = here
    return before[-1]


def test_edits_of_known_words():
    assert levenshtein("kitten", "sitting") == 3
    assert levenshtein("", "abc") == 3
    assert levenshtein("고양이", "고양이들") == 1
    assert one(EDIT, "Kitten", "sitting") == 3 / 7
    assert one(EDIT, "", "") == 0
    assert one(EDIT, "", "a") == 1
    assert one(EDIT, "ABC", "abc") == 0


@settings(max_examples=300)
@given(st.text("abc가", max_size=70), st.text("abc가", max_size=70))
def test_edits_are_those_of_the_table(a, b):
    assert levenshtein(a, b) == levenshtein(b, a) == table(a, b)


def test_a_thousand_answers_of_two_hundred_characters_are_quick():
    letters = np.random.default_rng(0).choice(list("abcdefgh "), (2, 1000, 200))
    a, b = (["".join(row) for row in rows] for rows in letters)
    start = time.perf_counter()
    values = EDIT.between(a, b)
    assert time.perf_counter() - start < 5  # 0.2 s on an idle machine
    assert values[0] == table(a[0], b[0]) / 200


@pytest.mark.parametrize("name", DISTANCES)
def test_distances_are_found_by_name(name):
    distance = get_distance(name)
    assert distance.name == name
    assert distance.between([], []) == []
    assert one(distance, "a", "a") == 0
    assert 0 <= one(distance, "a", "completely other") <= 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exat", "unknown distance 'exat', did you mean 'exact'?; known: exact, normalized, edit"),
        ("embedding", "it names no model; write embedding:FOLDER"),
        ("embedding:/no/such", "'/no/such' is no folder"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(SearchError, match=re.escape(message)):
        get_distance(name)


class Embedder:
    """Counts letters; remembers what it was asked."""

    loaded: ClassVar[list] = []

    def __init__(self, path, local_files_only):
        assert local_files_only
        self.loaded.append(path)
        self.asked = []

    def encode(self, texts, normalize_embeddings, show_progress_bar):
        assert normalize_embeddings and not show_progress_bar
        self.asked += texts
        counts = np.array([[text.count(c) for c in "abc"] for text in texts], dtype=np.float32)
        return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-9)


def test_embeddings_are_read_once_from_a_local_folder(tmp_path, monkeypatch):
    library = ModuleType("sentence_transformers")
    library.SentenceTransformer = Embedder
    monkeypatch.setitem(sys.modules, "sentence_transformers", library)
    distance = get_distance(f"embedding:{tmp_path}")
    assert distance.name == f"embedding:{tmp_path}"
    assert Embedder.loaded == []  # not before it is needed
    values = distance.between(["a", "a", "ab", "", "x"], ["a", "b", "a", "a", "x"])
    assert values == [0, 1, pytest.approx(1 - 0.5**0.5), 1, 0]
    distance.between(["a"], ["b"])
    assert Embedder.loaded == [str(tmp_path)]
    assert distance._model.asked == ["a", "ab", "", "x", "b"]


def test_embeddings_without_the_library_or_with_a_broken_model(tmp_path, monkeypatch):
    distance = get_distance(f"embedding:{tmp_path}")
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(SearchError, match=r'pip install "omnimerge\[embedding\]"'):
        distance.between(["a"], ["b"])

    def broken(*_args, **_options):
        raise OSError("no config.json\nmore")

    library = ModuleType("sentence_transformers")
    library.SentenceTransformer = broken
    monkeypatch.setitem(sys.modules, "sentence_transformers", library)
    with pytest.raises(SearchError, match=r"cannot load it \(no config.json\)"):
        distance.between(["a"], ["b"])


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("1,234,567", "1234567", True),
        ("12,34,567", "1234567", True),  # as in India
        ("100,20,300", "10020300", False),  # no groups of thousands
        ("[100,200]", "100200", False),
        ("[100,200]", "[100, 200]", True),
        ("at [1,200] of 1,200", "at [1, 200] of 1200", True),
        ("1,000 (in words: a thousand)", "1000 (in words: a thousand)", True),
        ("python 3.10", "python 3.1", True),  # told in the docstring: it looks like a number
        ("python 3.10.0", "python 3.1.0", False),
    ],
)
def test_groups_of_digits(one, other, same):
    assert (normalize(one) == normalize(other)) is same

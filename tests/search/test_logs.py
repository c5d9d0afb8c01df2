"""Logs of two harnesses, in all their formats: the same answers come out of each.

The files are in `logs/`; `logs/make_fixtures.py` made them, those of lmms-eval 0.7.3 with its own
command.
"""

import json
import sys
import zipfile
from decimal import Decimal
from pathlib import Path

import openpyxl
import pytest

from omnimerge.errors import SearchError
from omnimerge.search.logs import Log, find_logs, join, open_log, parse_alpha, read_log

LOGS = Path(__file__).parent / "logs"
ANSWERS = {
    "0.0": ["cat", "2", "네", "None", ""],
    "0.1": ["Cat", "3", "네", "NA", ""],
    "0.2": ["dog", "3", "네.", "NA", "=1+1"],
    "0.3": ["dog", "3", "아니요", "NA", 'a\tb\n"c"\u2028d'],
}
FORMATS = [
    ("lmms-eval-0.2.3", "*_merged_{alpha}_*/demo_vqa.json"),
    ("lmms-eval-0.3.5", "checkpoints__merged-{alpha}/*.jsonl"),
    ("lmms-eval-0.6.1", "*merged-{alpha}/*_samples_demo_vqa.jsonl"),
    ("lmms-eval-0.7.3", "merged-{alpha}"),
    ("vlmevalkit", "merged-{alpha}/merged-{alpha}_DEMO.xlsx"),
    ("vlmevalkit", "merged-{alpha}/merged-{alpha}_DEMO.tsv"),
    ("vlmevalkit", "merged-{alpha}/*.json"),
]


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def lines(path, rows):
    return write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


@pytest.mark.parametrize(("folder", "pattern"), FORMATS)
def test_every_format_holds_the_same_answers(folder, pattern):
    found = find_logs(LOGS / folder, pattern)
    assert list(found) == [Decimal(alpha) for alpha in ANSWERS]
    first = 100 if folder == "vlmevalkit" else 0
    for path, answers in zip(found.values(), ANSWERS.values(), strict=True):
        assert read_log(path) == {str(first + i): text for i, text in enumerate(answers)}


@pytest.mark.parametrize(("folder", "pattern"), FORMATS)
def test_the_prompts_are_known_where_they_were_logged(folder, pattern):
    log = open_log(find_logs(LOGS / folder, pattern)[Decimal("0.1")])
    told = {prompt for prompt, _ in log.asked.values()}
    assert ("How many?" in told) is (folder != "lmms-eval-0.2.3")
    # lmms-eval hashes no document, so that its hash says nothing
    assert {source for _, source in log.asked.values()} == {None}


def test_thoughts_are_what_the_model_said_and_filtered_answers_are_not():
    log = LOGS / "lmms-eval-0.7.3" / "thoughts.jsonl"
    said = ["<think>fur</think>cat", "2", "<think>yes</think>네", "None", ""]
    assert list(read_log(log).values()) == said
    kept = ["cat", "2", "네", "None", ""]
    assert list(open_log(log, filtered=True).answers.values()) == kept


def test_two_filters_agree_on_what_the_model_said_alone():
    log = LOGS / "lmms-eval-0.6.1" / "two-filters.jsonl"
    assert read_log(log) == {"0": "The answer is B.", "1": "7"}
    with pytest.raises(SearchError, match=r"id '0' has two answers \(line 1 and line 3\)"):
        open_log(log, filtered=True)
    assert "2 rows repeat another" in open_log(log).notes[0]


NESTED = [
    ({"filtered_resps": ["cat"]}, "cat"),
    ({"filtered_resps": "cat"}, "cat"),
    ({"resps": [" cat."], "filtered_resps": "cat"}, " cat."),
    ({"resps": [[" cat."]], "filtered_resps": ["cat"]}, " cat."),
    ({"resps": "<think>x</think>B", "filtered_resps": "B"}, "<think>x</think>B"),
    ({"filtered_resps": [["a", "b", "a"]]}, '["a", "b", "a"]'),
    ({"filtered_resps": ["a", "b", "a"]}, '["a", "b", "a"]'),
    ({"resps": [[["a"]]]}, "a"),
    ({"resps": []}, ""),
    ({"resps": [[None]], "filtered_resps": [None]}, ""),
    ({"resps": [["1.0"]]}, "1.0"),
    ({"resps": [[1.50]]}, "1.5"),
    ({"resps": [["True", "False"]]}, '["True", "False"]'),
]


@pytest.mark.parametrize(("sample", "answer"), NESTED)
def test_nesting(tmp_path, sample, answer):
    assert read_log(lines(tmp_path / "x", [{"doc_id": 7, **sample}])) == {"7": answer}


@pytest.mark.parametrize(
    "choices",
    [[["-1.2", "False"], ["-3", "True"]], [[[-1.2, False]], [[-3.0, True]]], ["-1.2", "False"]],
)
def test_log_likelihoods_are_no_answers(tmp_path, choices):
    with pytest.raises(SearchError, match="log-likelihoods of choices, not an answer"):
        read_log(lines(tmp_path / "x", [{"doc_id": 0, "resps": choices}]))


def test_labels_and_scores_are_not_looked_at(tmp_path):
    """Take them out, or turn them into nonsense: the same is read."""
    source = LOGS / "lmms-eval-0.7.3" / "merged-0.1" / "20260218_101500_samples_demo_vqa.jsonl"
    rows = [json.loads(line) for line in source.read_text().split("\n") if line]
    bare = [{k: r[k] for k in ("doc_id", "filtered_resps", "input")} for r in rows]
    odd = [{**row, "target": {"x": [i]}, "exact_match": "?"} for i, row in enumerate(rows)]
    assert open_log(lines(tmp_path / "bare", bare)).answers == open_log(source).answers
    assert open_log(lines(tmp_path / "odd", odd)).answers == open_log(source).answers

    source = LOGS / "vlmevalkit" / "merged-0.1" / "merged-0.1_DEMO.json"
    rows = json.loads(source.read_text())
    bare = [{k: r[k] for k in ("index", "prediction")} for r in rows]
    assert read_log(write(tmp_path / "bare.json", json.dumps(bare))) == read_log(source)


def test_texts_that_look_like_numbers_or_nothing_stay_texts(tmp_path):
    for suffix in ("xlsx", "tsv"):
        log = LOGS / "vlmevalkit" / "numbers" / f"numbers_DEMO.{suffix}"
        assert list(read_log(log).values()) == ["1", "02", "3.0", "1,000", "-5"]
    texts = ["None", "NA", "nan", "N/A", "null", "", "007", "1e3", "TRUE", " x "]
    table = "index\tprediction\n" + "".join(f'{i}\t"{t}"\n' for i, t in enumerate(texts))
    assert list(read_log(write(tmp_path / "a.tsv", table)).values()) == texts
    rows = [{"index": i, "prediction": t} for i, t in enumerate(texts)]
    assert list(read_log(write(tmp_path / "a.json", json.dumps(rows))).values()) == texts
    book = openpyxl.Workbook()
    for row in [["index", "prediction"], *enumerate(texts)]:
        book.active.append(row)
    book.save(tmp_path / "a.xlsx")
    assert list(read_log(tmp_path / "a.xlsx").values()) == texts


def test_a_workbook_that_was_edited_has_numbers_as_the_cells_have_them():
    log = LOGS / "vlmevalkit" / "edited.xlsx"
    assert read_log(log) == {"100": "1", "101": "2", "102": "3", "103": "1000", "104": "0.1"}


def test_numbers_in_json_are_kept_as_written(tmp_path):
    file = write(tmp_path / "x.json", '[{"index": 3.0, "prediction": 1.50},\n{"index": 4, ')
    with pytest.raises(SearchError, match="damaged or cut off"):
        read_log(file)
    write(file, '[{"index": 3.0, "prediction": 1.50}, {"index": 4, "prediction": NaN}]')
    assert read_log(file) == {"3": "1.50", "4": ""}


def test_our_own_answers_are_read(tmp_path):
    rows = [("a", "x\u2028y", [1, 2]), ("1.0", "", [])]
    text = "".join(json.dumps({"id": i, "response": r, "tokens": t}) + "\n" for i, r, t in rows)
    file = write(tmp_path / "alpha_0.30.jsonl", text)
    assert read_log(file) == {"a": "x\u2028y", "1.0": ""}


def test_tables_keep_tabs_quotes_and_long_fields(tmp_path):
    long = "x" * 200_000
    table = f'"index"\t"note"\t"prediction"\n"1"\t""\t"a\tb ""c""\r\nd"\n"2"\t""\t"{long}"\n'
    file = tmp_path / "x.tsv"
    file.write_bytes(b"\xef\xbb\xbf" + table.encode())
    assert read_log(file) == {"1": 'a\tb "c"\r\nd', "2": long}
    assert read_log(write(tmp_path / "x.csv", 'index,prediction\n1,"a,b"\n')) == {"1": "a,b"}


def test_answers_that_are_none_or_may_be_cut_are_noted(tmp_path):
    rows = [{"index": 1, "prediction": "Failed to obtain answer: <class 'RuntimeError'>"}]
    assert "1 answers say 'Failed" in open_log(lines(tmp_path / "x", rows)).notes[0]
    book = openpyxl.Workbook()
    book.active.append(["index", "prediction"])
    book.active.append([1, "x" * 32767])
    book.save(tmp_path / "x.xlsx")
    assert "1 cells are full" in open_log(tmp_path / "x.xlsx").notes[0]


def test_rows_appended_twice_count_once(tmp_path):
    row = {"doc_id": 0, "filtered_resps": "a", "input": "?"}
    assert read_log(lines(tmp_path / "x", [row, row])) == {"0": "a"}
    with pytest.raises(SearchError, match=r"two answers .*two runs were appended"):
        read_log(lines(tmp_path / "x", [row, {**row, "filtered_resps": "A"}]))
    with pytest.raises(SearchError, match="two prompts"):
        read_log(lines(tmp_path / "x", [row, {**row, "input": "!"}]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "x.log is empty; was the run stopped"),
        ("\n \n", "is empty"),
        ("[]", "holds no answer"),
        ('{"logs": []}', "holds no answer"),
        ('{"id": 1, "response": "a"}\n{"id": 2, "respo', r"line 2: cut off \(Untermin"),
        ('{"id": 1, "response": "a"}\n{"id": 2\n{"id": 3}', "line 2: not JSON"),
        ('{"id": 1, "response": "a"}\n[1]\n', "line 2: not a JSON object"),
        ('{"logs": [{"doc_id": 0, "resps"', "damaged or cut off"),
        ('{\n    "results": {}\n}', "no ids with answers: it has 'results'; needed: 'index'"),
        ('[{"question": "?", "prediction": "a"}]', "it has 'question', 'prediction'; needed"),
        ("[1]", "entry 1: not a JSON object"),
        ('{"id": 1, "response": "a"}\n{"id": 2}', "line 2: no 'response'"),
        ('{"id": 1, "response": "a"}\n{"id": "", "response": "b"}', "line 2: no 'id'"),
        ('{"doc_id": 1, "resps": "a"}\n{"doc_id": 2}', "line 2: no 'filtered_resps'"),
        ('{"doc_id": null, "resps": "a"}', "no 'doc_id'; run lmms-eval with --log_samples"),
        ("question\tprediction\n?\ta\n", "it has 'question', 'prediction'; needed: 'index'"),
        ("index\tprediction\n1\ta\n2\n", "row 2: 1 of 2 columns"),
        ("hello", r"unknown format \(it begins 'hello'\); known: lmms-eval"),
        (b"\x80\x05\x95", "is a pickle, which can run code"),
        (b"\xff\xfe\x00", r"unknown format \(byte 0 is not UTF-8\)"),
        (b"PK\x03\x04 and nothing", "damaged or cut-off workbook"),
    ],
)
def test_what_is_no_log_is_explained_in_one_line(tmp_path, content, message):
    file = tmp_path / "x.log"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SearchError, match=message) as caught:
        open_log(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_another_zip_and_a_cut_workbook(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.xlsx", "w") as other:
        other.writestr("a.txt", "a")
    with pytest.raises(SearchError, match="another zip file"):
        open_log(tmp_path / "x.xlsx")
    whole = (LOGS / "vlmevalkit" / "edited.xlsx").read_bytes()
    (tmp_path / "y.xlsx").write_bytes(whole[:2000])
    with pytest.raises(SearchError, match="cut-off workbook"):
        open_log(tmp_path / "y.xlsx")


def test_without_openpyxl_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(SearchError, match=r'pip install "omnimerge\[xlsx\]".*PRED_FORMAT=tsv'):
        open_log(LOGS / "vlmevalkit" / "edited.xlsx")


def test_no_such_file_and_filtered_answers_where_there_are_none(tmp_path):
    with pytest.raises(SearchError, match=r"none.jsonl: no such file"):
        open_log(tmp_path / "none.jsonl")
    with pytest.raises(SearchError, match="VLMEvalKit has no filtered answers; leave --filtered"):
        open_log(LOGS / "vlmevalkit" / "edited.xlsx", filtered=True)


def test_of_a_folder_the_newest_run_of_every_task_is_taken(tmp_path):
    model = tmp_path / "out" / "merged"
    for name, answer in {
        "20260101_000000_samples_mme.jsonl": "old",
        "20260218_101500_samples_mme.jsonl": "new",
        "samples_mme_20251231_000000.jsonl": "older",
    }.items():
        lines(model / name, [{"doc_id": 0, "filtered_resps": answer}])
    write(model / "20260218_101500_results.json", "{}")
    log = open_log(tmp_path / "out")
    assert log.answers == {"0": "new"} and "newest of 3 runs" in log.notes[0]

    lines(model / "20260101_000000_samples_ok_vqa_val.jsonl", [{"doc_id": 0, "resps": "x"}])
    log = open_log(tmp_path / "out")
    assert log.answers == {"mme/0": "new", "ok_vqa_val/0": "x"}
    assert log.kind == "lmms-eval, tasks mme, ok_vqa_val"

    other = lines(tmp_path / "out" / "two" / "20260101_000000_samples_gqa.jsonl", [{}])
    with pytest.raises(SearchError, match=r"logs of two models \(merged, two\)"):
        open_log(tmp_path / "out")
    other.unlink()


def test_a_folder_with_one_file_or_with_several(tmp_path):
    run = next((LOGS / "lmms-eval-0.2.3").glob("*0.1*"))
    assert list(read_log(run).values()) == ANSWERS["0.1"]
    tasks = tmp_path / "run"
    for task in ("mme", "gqa"):
        write(tasks / f"{task}.json", (run / "demo_vqa.json").read_text())
    write(tasks / "results.json", "{}")
    assert list(read_log(tasks))[:2] == ["gqa/0", "gqa/1"]
    write(tasks / "scores.json", "{}")
    with pytest.raises(SearchError, match=r"several files \(gqa.json, mme.json, scores.json\)"):
        read_log(tasks)
    with pytest.raises(SearchError, match=r"several files .*DEMO.json.*give the one to read"):
        read_log(LOGS / "vlmevalkit" / "merged-0.1")
    with pytest.raises(SearchError, match="holds no log"):
        read_log(tmp_path)


@pytest.mark.parametrize(
    ("names", "pattern", "found"),
    [
        (["m-0.1.jsonl", "m-0.25.jsonl"], "m-{alpha}.jsonl", ["0.1", "0.25"]),
        (["m_0.10_x", "m_1_x"], "m_{alpha}_*", ["0.10", "1"]),
        (["llava-1.5-0.3"], "llava-1.5-{alpha}", ["0.3"]),
        (["a-0.1/a-0.1_M.tsv", "a-0.2/a-0.1_M.tsv"], "a-{alpha}/a-{alpha}_*.tsv", ["0.1"]),
        (["0.1/x/y/s.jsonl", "0.2/s.jsonl"], "{alpha}/**/s.jsonl", ["0.1", "0.2"]),
        (["alpha=0.1[a].jsonl"], "alpha={alpha}[a].jsonl", ["0.1"]),
        (["v2.0.3", "v2.0.4"], "v2.{alpha}", ["0.3", "0.4"]),
        (["m0.1.5x", "m0.2.6x"], "m{alpha}.5x", ["0.1"]),
        ([".m-0.1.jsonl", "~$-0.2.xlsx", "m-0.3.jsonl"], "*{alpha}.*", ["0.3"]),
    ],
)
def test_patterns(tmp_path, names, pattern, found):
    for name in names:
        write(tmp_path / name, "x")
    assert find_logs(tmp_path, pattern).keys() == {Decimal(alpha) for alpha in found}


def test_two_names_of_one_coefficient(tmp_path):
    for name in ("m0.3", "m0.30"):
        write(tmp_path / name, "x")
    with pytest.raises(SearchError, match=r"fits m0.3 and m0.30 at 0.3; write more of the name"):
        find_logs(tmp_path, "m{alpha}")


def test_signs_and_exponents_of_coefficients(tmp_path):
    for name in ("m_-0.10.jsonl", "m_0.00.jsonl", "m_5e-07.jsonl", "m_0.10.jsonl"):
        write(tmp_path / name, "x")
    for pattern in ("m_{alpha}.jsonl", "*{alpha}.jsonl", "m_{alpha}*"):
        found = find_logs(tmp_path, pattern)
        assert [float(alpha) for alpha in found] == [-0.1, 0.0, 5e-07, 0.1]
        assert [path.name[2:-6] for path in found.values()] == ["-0.10", "0.00", "5e-07", "0.10"]


@pytest.mark.parametrize(
    ("name", "pattern", "alpha"),
    [
        ("merged-0.1", "*{alpha}", 0.1),  # after a letter a minus is no sign
        ("merged-0.1", "merged{alpha}", -0.1),  # unless the pattern says so
        ("merged--0.1", "*{alpha}", -0.1),
        ("-0.1", "*{alpha}", -0.1),
        ("a/-0.1", "**/{alpha}", -0.1),
    ],
)
def test_what_a_minus_is(tmp_path, name, pattern, alpha):
    write(tmp_path / name, "x")
    assert [float(found) for found in find_logs(tmp_path, pattern)] == [alpha]


def test_two_names_of_one_float(tmp_path):
    assert parse_alpha("0.10") == parse_alpha("0.10000000000000001") == Decimal("0.1")
    assert str(parse_alpha("-0")) == "0.0"
    for name in ("m0.2", "m0.20000000000000001"):
        write(tmp_path / name, "x")
    with pytest.raises(SearchError, match=r"fits m0.2 and m0.20000000000000001 at 0.2"):
        find_logs(tmp_path, "m{alpha}")


def test_a_file_and_the_link_to_it_are_one(tmp_path):
    real = write(tmp_path / "m-0.1" / "T20260218-101500" / "m-0.1_MME.xlsx", "x")
    (tmp_path / "m-0.1" / "m-0.1_MME.xlsx").symlink_to(real)
    assert len(find_logs(tmp_path, "m-{alpha}/**/m-{alpha}_MME.xlsx")) == 1


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("*.jsonl", "write a path inside --logs with {alpha}"),
        ("/x/{alpha}", "write a path inside --logs"),
        ("n-{alpha}.jsonl", "fits 'n-{alpha}.jsonl'; it holds llava-1.5-0.1"),
        ("*{alpha}*", "in llava-1.5-0.1 {alpha} may be 0.1 or 1.5; write more of the name"),
    ],
)
def test_patterns_that_do_not_tell(tmp_path, pattern, message):
    write(tmp_path / "llava-1.5-0.1", "x")
    with pytest.raises(SearchError) as caught:
        find_logs(tmp_path, pattern)
    assert message in str(caught.value)
    with pytest.raises(SearchError, match="is no folder"):
        find_logs(tmp_path / "none", "{alpha}")


@pytest.mark.parametrize("text", ["", "x", "nan", "inf", "0,1"])
def test_coefficients_are_numbers(text):
    with pytest.raises(SearchError, match="is no coefficient"):
        parse_alpha(text)
    assert parse_alpha(" 0.10") == Decimal("0.1")


def log(name, answers, asked=None):
    known = dict.fromkeys(answers, (None, None)) if asked is None else asked
    return Log(Path(name), "test", answers, known)


def test_answers_are_joined_on_ids():
    joined = join({0.1: log("b", {"y": "3", "x": "4"}), 0.0: log("a", {"x": "1", "y": "2"})})
    assert (joined.points, joined.ids) == ((0.0, 0.1), ("x", "y"))
    assert joined.answers == (("1", "2"), ("4", "3"))


def test_missing_ids_are_named_and_left_out_on_demand():
    logs = {0.0: log("a", {"x": "1", "y": "2"}), 0.1: log("b", {"x": "1", "z": "2"})}
    with pytest.raises(SearchError) as caught:
        join(logs)
    assert "2 ids are missing: 'y' at 0.1; 'z' at 0; complete" in str(caught.value)
    assert "--allow-missing compares the 1 common ones" in str(caught.value)
    joined = join(logs, allow_missing=True)
    assert (joined.ids, joined.missing) == (("x",), 2)
    apart = {0.0: log("a", {"x": "1"}), 0.1: log("b", {"z": "2"})}
    with pytest.raises(SearchError, match="no id is in all of them: are these logs of one task"):
        join(apart, allow_missing=True)


def test_the_same_id_of_another_prompt_is_refused():
    first = log("a", {"0": "x"}, {"0": ("Which?", "ab")})
    with pytest.raises(SearchError, match="different prompts in a and b"):
        join({0.0: first, 0.1: log("b", {"0": "x"}, {"0": ("Who?", "ab")})})
    with pytest.raises(SearchError, match=r"different documents \(doc_hash\) in a and b"):
        join({0.0: first, 0.1: log("b", {"0": "x"}, {"0": ("Which?", "cd")})})
    assert join({0.0: first, 0.1: log("b", {"0": "x"})}).ids == ("0",)


def test_real_hashes_of_documents_are_compared(tmp_path):
    for name, digest in (("a", "1" * 64), ("b", "2" * 64)):
        lines(tmp_path / name, [{"doc_id": 0, "resps": "x", "doc_hash": digest}])
    with pytest.raises(SearchError, match="doc_hash"):
        join({0.0: open_log(tmp_path / "a"), 0.1: open_log(tmp_path / "b")})

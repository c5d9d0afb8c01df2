"""A user's own numbers beside the published ones."""

import json

import pytest

from omnimerge.bench.published import tables
from omnimerge.bench.published.compare import compare
from omnimerge.bench.published.results import ResultsError, read_results

QWEN = tables.table("optmerge-3")


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


RECORDS = [
    {"method": "optmerge", "column": "VizWiz", "value": 42.61},
    {"method": "optmerge", "column": "TextVQA_VAL", "value": "80.54"},
    {"method": "my method", "column": "GQA", "value": 60},
]


@pytest.mark.parametrize("content", [RECORDS, {"results": RECORDS}], ids=["list", "object"])
def test_records_of_json(content, tmp_path):
    found = read_results(write(tmp_path / "r.json", content))
    assert found == {"optmerge": {"VizWiz": 42.61, "TextVQA_VAL": 80.54}, "my method": {"GQA": 60}}


def test_records_of_csv(tmp_path):
    lines = "method,column,value\noptmerge,VizWiz,42.61\n\n TIES ,refcoco+,65\n"
    found = read_results(write(tmp_path / "r.csv", lines))
    assert found == {"optmerge": {"VizWiz": 42.61}, "TIES": {"refcoco+": 65.0}}
    assert read_results(write(tmp_path / "s.csv", lines[:42]), "x") == {"x": {"VizWiz": 42.61}}


def test_differences(tmp_path):
    comparison = compare(QWEN, read_results(write(tmp_path / "r.json", RECORDS)))
    first, second = comparison.rows
    assert (first.method, first.row) == ("optmerge", "OptMerge")
    assert first.published["VizWiz"] == 41.61
    assert first.difference == pytest.approx({"VizWiz": 1.0, "TextVQA": -1.0})
    assert "Avg" not in first.yours  # not all ten are there
    assert (second.row, second.yours, second.difference) == (None, {"GQA": 60.0}, {})


def test_mean_of_complete_results():
    values = dict(zip(QWEN.column_names[:10], [50.0] * 9 + [60.0], strict=True))
    (row,) = compare(QWEN, {"Weight average": values}).rows
    assert row.row == "Weight Average"
    assert row.yours["Avg"] == pytest.approx(51.0)
    assert row.difference["Avg"] == pytest.approx(51.0 - 60.55)
    (row,) = compare(QWEN, {"ties": {**values, "Avg": 51.5}}).rows
    assert row.yours["Avg"] == 51.5  # the user's own, where it is given


def test_sum_and_gain_of_adamms():
    table = tables.table("adamms-1")
    values = dict.fromkeys(table.column_names[:8], 70.0)
    (row,) = compare(table, {"adamms": values}).rows
    assert row.yours["SUM"] == pytest.approx(560.0)
    assert row.yours["gain"] == pytest.approx(560.0 - (559.07 + 514.37) / 2)


def test_what_the_table_lacks_is_named():
    comparison = compare(QWEN, {"a": {"GQA": 50.0, "POPE": 80.0}, "b": {"POPE": 81.0}})
    assert comparison.left_out == ("POPE",)
    with pytest.raises(ResultsError, match="none of the columns POPE is in this table: VizWiz"):
        compare(QWEN, {"a": {"POPE": 80.0}})
    with pytest.raises(ResultsError, match="multiply by 100"):
        compare(QWEN, {"a": {"GQA": 0.5}})
    with pytest.raises(ResultsError, match="two columns are GQA, the second is 'gqa'"):
        compare(QWEN, {"a": {"GQA": 50.0, "gqa": 51.0}})


def test_lmms_eval(tmp_path):
    content = {
        "results": {
            "gqa": {"alias": "gqa", "exact_match,none": 0.6116, "exact_match_stderr,none": 0.01},
            "refcoco+_bbox_rec_val": {"refcoco_ACC@0.5,none": 0.659, "refcoco_IoU,none": 0.6},
            "mme": {"mme_percetion_score,none": 1700.0, "mme_cognition_score,none": 604.0},
            "pope": {"pope_accuracy,none": 0.9},
        },
        "config": {"model": "qwen2_vl", "model_args": "pretrained=out/merged-0.1,max_pixels=9"},
        "model_name": "qwen2_vl",
    }
    path = write(tmp_path / "x_results.json", content)
    (found,) = read_results(path).items()
    assert found[0] == "merged-0.1"
    assert found[1] == pytest.approx({"GQA": 61.16, "RefCOCO+": 65.9, "MME": 2304 / 28})
    (row,) = compare(QWEN, read_results(path, "optmerge")).rows
    assert row.difference == pytest.approx({"GQA": 0.0, "RefCOCO+": 0.0}, abs=1e-9)
    del content["config"], content["model_name"]
    with pytest.raises(ResultsError, match=r"does not say what was evaluated; write METHOD="):
        read_results(write(tmp_path / "y.json", content))


def test_vlmevalkit(tmp_path):
    path = write(tmp_path / "merged_TextVQA_VAL_acc.csv", '"Overall"\n"81.54"\n')
    assert read_results(path, "m") == {"m": {"TextVQA": 81.54}}
    with pytest.raises(ResultsError, match="does not say what was evaluated"):
        read_results(path)
    lines = "Task&Skill,tot,prefetch,hit,prefetch_rate,acc\nOverall,1000,0,600,0,60.0\n"
    lines += "geometry reasoning,239,0,1,0,48.0\nalgebraic reasoning,281,0,1,0,46.0\n"
    lines += "geometry problem solving,208,0,1,0,50.0\n"
    path = write(tmp_path / "merged_MathVista_MINI_gpt-4o-mini_score.csv", lines)
    assert read_results(path, "m") == {"m": {"MathVista": 48.0}}  # not the overall 60.0
    with pytest.raises(ResultsError, match="has no row 'algebraic reasoning'"):
        read_results(write(path, lines.replace("algebraic", "other")), "m")
    path = write(tmp_path / "merged_ChartQA_TEST_acc.csv", "test_human,test_aug\n1,2\n")
    with pytest.raises(ResultsError, match="has not one line with a column Overall"):
        read_results(path, "m")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.json", "{", "is not JSON"),
        ("r.json", "3", "holds no list of records"),
        ("r.json", [], "holds no results"),
        ("r.json", [{"method": "a", "column": "b"}], "record 1 must have method, column and value"),
        ("r.json", [RECORDS[0] | {"note": "x"}], "record 1 must have"),
        ("r.json", [RECORDS[0] | {"value": "high"}], "'high' is no number"),
        ("r.json", [RECORDS[0] | {"value": True}], "True is no number"),
        ("r.json", [RECORDS[0] | {"value": "nan"}], "'nan' is no number"),
        ("r.json", [RECORDS[0], RECORDS[0]], "VizWiz is given twice"),
        ("r.json", {"results": {"pope": {}}}, "holds none of the tasks"),
        ("r.csv", "", "is empty"),
        ("r.csv", "a,b\n1,2\n", "the first line must be method,column,value"),
    ],
)
def test_wrong_files_are_refused(name, content, message, tmp_path):
    with pytest.raises(ResultsError, match=message):
        read_results(write(tmp_path / name, content))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ResultsError, match="No such file"):
        read_results(tmp_path / "r.json")
    (tmp_path / "r.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ResultsError, match="not text in UTF-8"):
        read_results(tmp_path / "r.json")
    two = [RECORDS[0], RECORDS[2]]
    with pytest.raises(ResultsError, match="holds 2 methods; leave mine= out"):
        read_results(write(tmp_path / "r.json", two), "mine")

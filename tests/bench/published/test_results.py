"""A user's own numbers beside the published ones."""

import json

import pytest

from omnimerge.bench.published import tables
from omnimerge.bench.published.compare import compare
from omnimerge.bench.published.harnesses import ResultsError
from omnimerge.bench.published.results import read_results

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
    with pytest.raises(ResultsError, match="has no column 'Overall'; it has: test_human, test_aug"):
        read_results(path, "m")
    path = write(tmp_path / "merged_ChartQA_TEST_acc.csv", "Overall\n1\n2\n")
    with pytest.raises(ResultsError, match="has 2 rows of numbers instead of one"):
        read_results(path, "m")


def test_a_share_is_told_from_a_percentage_by_the_data_set(tmp_path):
    """0.36 is what OptMerge prints for ChartQA of the base; in MMMU's file it would be 36 %."""
    chart = write(tmp_path / "merged_ChartQA_TEST_acc.csv", "test_human,Overall\n0.5,0.36\n")
    results = read_results(chart, "base")
    assert results == {"base": {"ChartQA": 0.36}}
    assert compare(QWEN, results).rows[0].yours["ChartQA"] == 0.36
    lines = "split,Overall,Accounting\nvalidation,0.5111,0.4\ndev,0.6,0.5\n"
    mmmu = write(tmp_path / "MMMU_DEV_VAL_acc.csv", lines)
    assert read_results(mmmu, "m")["m"] == pytest.approx({"MMMU": 51.11})
    with pytest.raises(ResultsError, match="no row 'validation'; it has: test, dev"):
        read_results(write(mmmu, lines.replace("validation", "test")), "m")
    with pytest.raises(ResultsError, match=r"51.11 is 5111 % by the harness's unit"):
        read_results(write(mmmu, lines.replace("0.5111", "51.11")), "m")
    seed = write(tmp_path / "m_SEEDBench_IMG_acc.csv", "split,Overall\nnone,0.762\n")
    assert read_results(seed, "m")["m"] == pytest.approx({"SEED": 76.2})


def test_the_other_files_of_vlmevalkit_that_adamms_needs(tmp_path):
    lines = "perception,reasoning,OCR\n1700.0,604.08,150.0\n"
    mme = write(tmp_path / "merged_MME_score.csv", lines)
    assert read_results(mme, "m")["m"] == pytest.approx({"MME": 2304.08 / 28})
    content = {"Text Recognition": 280, "Final Score": 855, "Final Score Norm": 85.5}
    ocr = write(tmp_path / "alpha_MME_0.1_OCRBench_score.json", content)
    assert read_results(ocr, "m") == {"m": {"OCRBench": 85.5}}
    with pytest.raises(ResultsError, match="no column 'Final Score Norm'; it has: English"):
        read_results(write(tmp_path / "m_OCRBench_v2_score.json", {"English": 1}), "m")
    for path in (mme, ocr):
        with pytest.raises(ResultsError, match="does not say what was evaluated"):
            read_results(path)


def test_every_data_set_of_vlmevalkit_that_is_listed_has_a_file_that_is_read(tmp_path):
    """The evaluations table promises what `--against` keeps."""
    listed = [entry for entry in tables.catalogue().evaluations if entry.vlmevalkit]
    assert len(listed) == 11
    for entry in listed:
        where = entry.vlmevalkit
        row = dict.fromkeys(where.columns, 50 / where.factor / len(where.columns))
        if entry.column == "OCRBench":
            path = write(tmp_path / "m_OCRBench_score.json", row)
        else:
            lines = [",".join(["", *row])]
            lines += [",".join([name, *map(str, row.values())]) for name in where.rows or ("",)]
            path = write(tmp_path / f"m_{where.dataset}_score.csv", "\n".join(lines))
        assert read_results(path, "m")["m"] == pytest.approx({entry.column: 50.0})


@pytest.mark.parametrize("spelt", ["mme_perception_score", "mme_percetion_score"])
def test_both_spellings_of_lmms_eval(spelt, tmp_path):
    scores = {f"{spelt},none": 1700.0, "mme_cognition_score,none": 604.0}
    path = write(tmp_path / "x_results.json", {"results": {"mme": scores}, "model_name": "m"})
    assert read_results(path)["m"] == pytest.approx({"MME": 2304 / 28})


def test_a_task_without_its_metrics_is_named(tmp_path):
    results = {"gqa": {"exact_match,none": 0.6}, "mme": {"alias": "mme", "mme_sum,none": 2304.0}}
    path = write(tmp_path / "x_results.json", {"results": results, "model_name": "m"})
    told = []
    assert read_results(path, warn=told.append) == {"m": {"GQA": 60.0}}
    assert told == [f"{path}: mme has no mme_perception_score, only mme_sum; no MME"]
    with pytest.raises(ResultsError, match="mme has no mme_perception_score"):
        read_results(path)
    del results["gqa"]
    write(path, {"results": results, "model_name": "m"})
    with pytest.raises(ResultsError, match="mme has no mme_perception_score"):
        read_results(path, warn=told.append)


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
        ("r.json", [RECORDS[0] | {"value": 0.42}], "are at most 1; .* multiply by 100"),
        ("r.csv", "method,column,value\nm,gqa,0.5\nm,Avg,0.6\n", "multiply by 100"),
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

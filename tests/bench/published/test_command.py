"""`omnimerge bench published`, through the entry point that a user has."""

import json
import re
import subprocess
import sys

from click.testing import CliRunner

from omnimerge.bench.published import tables
from omnimerge.cli import main


def run(*arguments):
    return CliRunner().invoke(main, ["bench", "published", *map(str, arguments)])


def test_lists_every_table():
    listed = run()
    assert listed.exit_code == 0
    assert all(name in listed.output for name in tables.names())
    rows = json.loads(run("--json").output)
    assert [row["name"] for row in rows] == list(tables.names())
    assert run("--markdown").output.count("\n| ") == len(tables.names())


def test_every_table_prints_in_every_form():
    for name in tables.names():
        for form in ((), ("--json",), ("--markdown",)):
            result = run(name, *form)
            assert result.exit_code == 0, (name, form, result.output)
            assert len(result.output) > 100


def test_a_table_has_source_marks_and_footnotes():
    text = run("optmerge-2").output
    assert "Source: Table 2 of Wei, Cheng, Jin et al." in text
    assert "https://arxiv.org/abs/2505.19892" in text
    ties = next(line for line in text.splitlines() if line.startswith("TIES "))
    assert re.search(r" 44\.01 .* 56\.70\[3\]$", ties), ties
    assert "[3] Printed 56.70; the ten columns have the mean 56.60." in text
    grounding = next(line for line in text.splitlines() if line.startswith("expert Grounding"))
    assert "74.87[5]" in grounding
    assert "[5] Out of place" in text
    assert "TSV[7]" in text and "MathVista[1]" in text


def test_markdown():
    lines = run("optmerge-6", "--markdown").output.splitlines()
    header = next(line for line in lines if line.startswith("|"))
    rows = [line for line in lines if line.startswith("|")]
    assert {row.count("|") for row in rows} == {header.count("|")} == {13}
    assert "27.95[3]" in next(row for row in rows if row.startswith("| TIES |"))
    assert any(line.startswith("[3] No multiple of 1/76") for line in lines)


def test_json_has_recomputed_values():
    told = json.loads(run("optmerge-2", "--json").output)
    assert told["name"] == "optmerge-2" and "Table 2" in told["source"]
    (wrong,) = [entry for entry in told["recomputed"] if not entry["agrees"]]
    assert wrong == {
        "row": "TIES", "column": "Avg", "printed": 56.70, "value": 56.598, "agrees": False
    }  # fmt: skip
    assert told["notes"][3]["recomputed"] == 56.6


def test_against(tmp_path):
    mine = tmp_path / "mine.csv"
    mine.write_text("method,column,value\noptmerge,VizWiz,42.00\noptmerge,POPE,80\nmine,GQA,60\n")
    lines = run("optmerge-3", "--against", mine).output.splitlines()
    published, yours, difference = (
        next(line.split() for line in lines if word in line.split()[:3])
        for word in ("published", "yours", "difference")
    )
    assert published[:3] == ["OptMerge", "published", "41.61"]
    assert published[-1] == "63.30"
    assert yours[:3] == ["optmerge", "yours", "42.00"]
    assert difference[:2] == ["difference", "+0.39"]
    assert not any(line.startswith("[3]") for line in lines)  # about TSV, which is not drawn
    assert lines[-2:] == ["not in this table: POPE", "no published row for: mine"]
    told = json.loads(run("optmerge-3", "--against", mine, "--json").output)
    assert told["against"][0]["difference"] == {"VizWiz": 0.39}
    assert (
        "| optmerge | yours | 42.00 |" in run("optmerge-3", "--against", mine, "--markdown").output
    )


def test_against_several_files(tmp_path):
    one, two = tmp_path / "m_GQA_TestDev_Balanced_acc.csv", tmp_path / "m_VizWiz_acc.csv"
    one.write_text("Overall\n61.00\n")
    two.write_text("Overall\n41.00\n")
    result = run("optmerge-3", "--against", f"ties={one}", "--against", f"ties={two}", "--json")
    (row,) = json.loads(result.output)["against"]
    assert row["difference"] == {"GQA": 1.92, "VizWiz": -0.38}
    result = run("optmerge-3", "--against", f"ties={one}", "--against", f"ties={one}")
    assert result.exit_code == 1 and "GQA is in another file too" in result.output


def test_what_a_file_lacks_is_a_warning(tmp_path):
    content = {"results": {"gqa": {"exact_match": 0.6}, "mme": {"mme_sum": 2304.0}}}
    mine = tmp_path / "x_results.json"
    mine.write_text(json.dumps(content))
    result = run("adamms-1", "--against", f"adamms={mine}", "--json")
    assert json.loads(result.stdout)["against"][0]["yours"] == {"GQA": 60.0}
    assert result.stderr.startswith(f"warning: {mine}: mme has no mme_perception_score")


def test_a_wrong_name_is_answered_on_one_line():
    result = run("optmerge-22")
    assert result.exit_code == 1
    assert result.output == (
        "Error: no published table 'optmerge-22', did you mean 'optmerge-2'?; "
        "`omnimerge bench published` lists them\n"
    )


def test_usage_errors(tmp_path):
    assert run("optmerge-2", "--json", "--markdown").exit_code == 2
    assert run("--against", tmp_path / "r.json").exit_code == 2
    result = run("optmerge-2", "--against", tmp_path / "r.json")
    assert result.exit_code == 1 and result.output.count("\n") == 1


def test_torch_is_not_imported():
    code = """
import sys
from omnimerge.cli import main
main(["bench", "published", "optmerge-2"], standalone_mode=False)
assert not {"torch", "transformers", "rich"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)

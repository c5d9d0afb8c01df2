"""`omnimerge select`: what the published scripts choose is chosen, from files alone."""

import itertools
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from omnimerge.cli import main
from omnimerge.search.result import SearchResult

LOGS = Path(__file__).parents[1] / "search" / "logs"


def run(*arguments, code=0):
    result = CliRunner().invoke(main, ["select", *map(str, arguments)])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


def chosen(*arguments):
    return json.loads(run(*arguments, "--json"))


def scores(result):
    return {point["values"]["alpha"]: point["score"] for point in result["points"]}


def as_lmms_eval(path, answers):
    """The form that AdaMMS's script for CogVLM reads."""
    logs = [{"doc_id": i, "target": "?", "resps": [[a]]} for i, a in enumerate(answers)]
    random.Random(0).shuffle(logs)
    path.write_text(json.dumps({"args": {}, "logs": logs}, indent=4, ensure_ascii=False))


def as_predictions(path, answers):
    """The form that AdaMMS's script for Qwen2-VL reads: a workbook turned into JSON."""
    path.write_text(json.dumps([{"index": i, "prediction": a} for i, a in enumerate(answers)]))


def write_logs(folder, answers, form=as_lmms_eval):
    for alpha, at_point in answers.items():
        form(folder / f"merged_{alpha}.json", at_point)
    return ["--logs", folder, "--pattern", "merged_{alpha}.json"]


# The published rules in plain loops, from what the two scripts and Algorithm 1 say:
# a prompt counts once unless the answer equals, lower-cased, that of both neighbours;
# the sum of both counts; the count against the previous point alone. All minimisers are kept.


def or_rule(table):
    found = {}
    for i in range(1, len(table) - 1):
        count = 0
        for x in range(len(table[i])):
            here, left, right = (table[j][x].lower() for j in (i, i - 1, i + 1))
            if not (here == left and here == right):
                count += 1
        found[i] = count
    return found


def sum_rule(table):
    found = {}
    for i in range(1, len(table) - 1):
        count = 0
        for j in (i - 1, i + 1):
            for x in range(len(table[i])):
                if table[i][x].lower() != table[j][x].lower():
                    count += 1
        found[i] = count
    return found


def previous_rule(table):
    found = {}
    for i in range(1, len(table)):
        found[i] = 0
        for x in range(len(table[i])):
            if table[i][x].lower() != table[i - 1][x].lower():
                found[i] += 1
    return found


RULES = {"unanimity": or_rule, "pairwise": sum_rule, "backward": previous_rule}
WORDS = ["yes", "Yes", "YES", "no", "No", "", " ", "1", "1.0", "네", "是", "a dog"]


@pytest.mark.parametrize("criterion", RULES)
@pytest.mark.parametrize("form", [as_lmms_eval, as_predictions])
@pytest.mark.parametrize("step", ["0.1", "0.05"])
def test_the_published_rules_number_for_number(tmp_path, criterion, form, step):
    for seed in range(4):
        draw = random.Random(seed)
        count = 3 + seed * 2
        digits = len(step) - 2
        alphas = [f"{float(step) * i:.{digits}f}" for i in range(count)]
        # few words and few prompts, so that there are ties
        table = [[draw.choice(WORDS[: 4 + seed]) for _ in range(3 + 4 * seed)] for _ in alphas]
        folder = tmp_path / str(seed)
        folder.mkdir()
        logs = write_logs(folder, dict(zip(alphas, table, strict=True)), form)
        result = chosen(*logs, "--criterion", criterion)

        expected = RULES[criterion](table)
        assert scores(result) == {float(a): expected.get(i) for i, a in enumerate(alphas)}
        best = [float(alphas[i]) for i in expected if expected[i] == min(expected.values())]
        assert [tie["alpha"] for tie in result["tie_set"]] == best
        assert result["selected"] == {"alpha": best[0]}


# Three prompts (columns) at seven points, counted by hand; see tests/search/test_criteria.py.
#           differs from the row above:  p q r
BY_HAND = {
    "0.0": ["red", "2", "a dog"],
    "0.1": ["Red", "3", "a dog"],  # . x .   case does not count
    "0.2": ["blue", "3", "a cat"],  # x . x
    "0.3": ["blue", "3", "a dog"],  # . . x
    "0.4": ["BLUE", "3", "a dog"],  # . . .
    "0.5": ["blue", "4", "A Dog"],  # . x .
    "0.6": ["green", "5", ""],  # x x x   an empty answer is an answer
}
EXPECTED = {
    # own row or the row below; both ends cannot be chosen
    "unanimity": ([None, 3, 2, 1, 1, 3, None], 0.3, [0.3, 0.4]),
    # own row plus the row below
    "pairwise": ([None, 1 + 2, 2 + 1, 1 + 0, 0 + 1, 1 + 3, None], 0.3, [0.3, 0.4]),
    # own row; the last point takes part
    "backward": ([None, 1, 2, 1, 0, 1, 3], 0.4, [0.4]),
}


@pytest.mark.parametrize("criterion", EXPECTED)
def test_a_table_counted_by_hand(tmp_path, criterion):
    result = chosen(*write_logs(tmp_path, BY_HAND), "--criterion", criterion)
    counts, best, ties = EXPECTED[criterion]
    assert list(scores(result).values()) == counts
    assert result["selected"] == {"alpha": best}
    assert [tie["alpha"] for tie in result["tie_set"]] == ties


def test_reverse_turns_the_targets_share_into_the_donors(tmp_path):
    """AdaMMS's CogVLM runs are named 1.0, 0.9, ... 0.4; these are its 0, 0.1, ... 0.6."""
    names = ["1.0", "0.9", "0.8", "0.7", "0.6", "0.5", "0.4"]
    logs = write_logs(tmp_path, dict(zip(names, BY_HAND.values(), strict=True)))
    result = chosen(*logs, "--criterion", "backward", "--reverse")
    assert list(scores(result)) == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]  # 1 - 0.9 is 0.1, exactly
    assert list(scores(result).values()) == EXPECTED["backward"][0]
    straight = chosen(*logs)
    assert [tie["alpha"] for tie in straight["tie_set"]] == [0.6, 0.7]
    assert "is no share" in run("--log", f"2={tmp_path}", "--reverse", code=1)


# The answers of tests/search/test_logs.py: 0.1 differs from 0.0 in prompts 1 and 3, 0.2 from 0.1
# in 0, 2 and 4, 0.3 from 0.2 in 2 and 4. 네. and 네 are one answer if normalized.
@pytest.mark.parametrize(
    ("folder", "pattern"),
    [
        ("lmms-eval-0.2.3", "*_merged_{alpha}_*"),
        ("lmms-eval-0.3.5", "*merged-{alpha}/*.jsonl"),
        ("lmms-eval-0.6.1", "*merged-{alpha}"),
        ("lmms-eval-0.7.3", "merged-{alpha}"),
        ("vlmevalkit", "merged-{alpha}/merged-{alpha}_DEMO.xlsx"),
        ("vlmevalkit", "merged-{alpha}/*.tsv"),
        ("vlmevalkit", "merged-{alpha}/*.json"),
    ],
)
def test_the_logs_of_both_harnesses(folder, pattern):
    result = chosen("--logs", LOGS / folder, "--pattern", pattern)
    assert scores(result) == {0.0: None, 0.1: 5, 0.2: 3, 0.3: None}
    forms = chosen("--logs", LOGS / folder, "--pattern", pattern, "--distance", "normalized")
    assert scores(forms) == {0.0: None, 0.1: 4, 0.2: 3, 0.3: None}


def test_what_is_printed(tmp_path):
    said = run(*write_logs(tmp_path, BY_HAND))
    assert f"alpha 0.1: {tmp_path}/merged_0.1.json (lmms-eval, 3 answers)" in said
    assert "<- chosen" in said
    assert "chosen: alpha 0.3, by unanimity (exact) on 3 prompts" in said
    assert "best score at: 0.3, 0.4; rule: smallest score; of equal scores the smallest" in said
    assert "labels: not read" in said
    assert "warning: more than 10% of the answers are empty at alpha 0.6" in said


def test_logs_one_by_one_in_any_order_and_under_another_name(tmp_path):
    write_logs(tmp_path, BY_HAND)
    logs = [["--log", f"{a}0={tmp_path}/merged_{a}.json"] for a in reversed(BY_HAND)]
    said = run(*itertools.chain(*logs), "--parameter", "density")
    assert "chosen: density 0.3" in said and "density 0.1: " in said
    result = chosen(*itertools.chain(*logs), "--parameter", "density")
    assert result["selected"] == {"density": 0.3}


def test_json_has_the_keys_of_a_search(tmp_path):
    result = chosen(*write_logs(tmp_path, BY_HAND))
    assert set(SearchResult.model_fields) <= set(result)
    point = result["points"][1]
    assert point["responses"] == f"{tmp_path}/merged_0.1.json" and point["accuracy"] is None
    assert result["recipe"] is None and result["heldout"] is None
    assert result["prompts"]["count"] == 3 and result["labels_read"] is False
    seen = result["diagnostics"]["points"]
    assert seen[0]["mean_tokens"] is None
    # red, 2, a dog: 9 characters; at 0.1 one of the three is another answer than at 0
    assert [seen[0]["mean_characters"], seen[1]["like_target"], seen[1]["like_donor"]] == [
        3.0, pytest.approx(2 / 3), None,
    ]  # fmt: skip
    assert result["diagnostics"]["bootstrap"]["samples"] == 1000


def test_guards_are_printed(tmp_path):
    def row(said, first):
        return next(line.split() for line in said.splitlines() if line.split()[:1] == [first])

    said = run(*write_logs(tmp_path, BY_HAND))
    assert "alpha   unanimity   different   empty   characters   like target" in said
    assert row(said, "0.1") == ["0.1", "3", "100%", "0%", "3.0", "67%"]
    assert row(said, "0.6") == ["0.6", "-", "100%", "33%", "2.0", "0%"]
    assert "resampling the prompts: " in said and " choose the same alone, 95 % 0.2 to 0.4" in said
    assert "warning: alpha 0.3, 0.4 tie at 1" in said
    other = run(*write_logs(tmp_path, BY_HAND), "--parameter", "density")
    assert row(other, "0.1")[-1] == "-"  # 0 is the target for alpha only


def test_logs_below_zero(tmp_path):
    result = chosen(
        *write_logs(tmp_path, dict(zip(("-0.1", "0.0", "1e-07"), BY_HAND.values(), strict=False)))
    )
    assert list(scores(result)) == [-0.1, 0.0, 1e-07]


def test_uneven_steps_are_divided_by_unless_told_not_to(tmp_path):
    answers = {"0": ["a", "p"], "0.2": ["b", "p"], "0.3": ["c", "q"], "0.4": ["c", "r"]}
    logs = write_logs(tmp_path, answers)
    # pairwise: 0.2: 1/2 + 2;  0.3: 2 + 1
    assert scores(chosen(*logs, "--criterion", "pairwise"))[0.2] == 2.5
    assert "divided by the step" in run(*logs)
    plain = chosen(*logs, "--criterion", "pairwise", "--plain")
    assert scores(plain) == {0.0: None, 0.2: 3, 0.3: 3, 0.4: None} and not plain["per_step"]
    even = write_logs(tmp_path, {a: answers[a] for a in ("0.2", "0.3", "0.4")})
    (tmp_path / "merged_0.json").unlink()
    assert scores(chosen(*even, "--per-step")) == scores(chosen(*even))


def test_missing_ids_are_refused_or_left_out(tmp_path):
    logs = write_logs(tmp_path, {**BY_HAND, "0.5": ["blue", "4"]})
    said = run(*logs, code=1)
    assert "Error: 1 ids are missing: '2' at 0.5; complete the logs, or --allow-missing" in said
    said = run(*logs, "--allow-missing")
    assert "on 2 prompts" in said
    assert "note: 1 ids are not in every log and were left out; 2 were compared" in said


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "give --log ALPHA=PATH for each coefficient"),
        (["--logs", "x"], 2, "--logs and --pattern belong together"),
        (["--log", "0.1"], 2, "write ALPHA=PATH"),
        (["--log", "x=y"], 1, "'x' is no coefficient"),
        (["--log", "0.1=none.jsonl"], 1, "none.jsonl: no such file"),
        (["--log", "0.1=a", "--log", "0.10=b"], 1, "a and b are both given for 0.10; give one"),
        (
            ["--log", "0.2=a", "--log", "0.20000000000000001=b"],
            1,
            "a and b are both given for 0.20000000000000001; give one",
        ),
        (["--logs", "/no/such", "--pattern", "{alpha}"], 1, "/no/such is no folder"),
    ],
)
def test_mistakes_are_one_line(arguments, code, message):
    said = run(*arguments, code=code)
    assert message in said and (code == 2 or said.count("\n") == 1)


def test_too_few_points_and_unknown_names(tmp_path):
    few = write_logs(tmp_path, {"0.0": ["a"], "0.1": ["b"]})
    assert "2 points are too few" in run(*few, code=1)
    assert "0.1" in run(*few, "--criterion", "backward")
    assert "unknown distance 'exat', did you mean" in run(*few, "--distance", "exat", code=1)
    (tmp_path / "merged_0.1.json").unlink()
    assert "1 logs are too few" in run(*few, "--criterion", "backward", code=1)


def test_neither_torch_nor_transformers_is_imported_and_it_is_quick():
    arguments = ["select", "--logs", str(LOGS / "vlmevalkit")]
    arguments += ["--pattern", "merged-{alpha}/merged-{alpha}_DEMO.xlsx"]
    code = (
        "import sys\nimport omnimerge.cli.select\nfrom omnimerge.cli import main\n"
        f"main({arguments!r}, standalone_mode=False)\n"
        "loaded = {'torch', 'transformers', 'pandas'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    times = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    assert min(times) < 2.0  # 0.4 s on an idle machine; the bound leaves room for a busy one


def test_the_help_has_examples():
    said = run("--help")
    assert "omnimerge select --logs eval --pattern" in said and "--reverse" in said

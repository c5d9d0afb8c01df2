"""Tables: mean and deviation by hand, order, marks, and what is printed."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from omnimerge.bench import results, tables
from omnimerge.bench.line import BenchError
from omnimerge.bench.results import Results, Row
from omnimerge.cli.bench.table import command

HERE = results.environment(["x"])


def scored(kind, name, one, two, **more):
    return Row(name=name, kind=kind, scores={"one": one, "two": two}, **more)


def outcome(seed, *rows):
    return Results(
        line="fake",
        preset="full",
        seed=seed,
        columns=("one", "two"),
        rows=rows,
        environment=HERE,
        build=HERE,
    )


SEEDS = [
    outcome(
        0,
        scored("base", "base", 0.1, 0.2),
        scored("expert", "one", 0.9, 0.1),
        scored(
            "method", "ties", 0.4, 0.6, seconds=1.0, peak_bytes=2_000_000, parameters={"scale": 0.5}
        ),
        scored("method", "average", 0.7, 0.6),
        scored("search", "ties", 0.4, 0.5, parameters={"scale": 0.3}),
        scored("reference", "mixture", 0.8, 0.8),
        Row(name="slerp", kind="refused", reason="merges 1 model; there are 5 experts"),
    ),
    outcome(
        1,
        scored("base", "base", 0.3, 0.2),
        scored("expert", "one", 0.9, 0.1),
        scored(
            "method", "ties", 0.5, 0.8, seconds=3.0, peak_bytes=4_000_000, parameters={"scale": 1.0}
        ),
        scored("method", "average", 0.8, 0.6),
        scored("search", "ties", 0.4, 0.7, parameters={"scale": 0.3}),
        scored("reference", "mixture", 0.8, 0.8),
        Row(name="slerp", kind="refused", reason="merges 1 model; there are 5 experts"),
    ),
]


def test_mean_and_deviation():
    cell = tables.Cell.of([0.1, 0.3, 0.2])

    assert cell.mean == pytest.approx(0.2)
    assert cell.deviation == pytest.approx(0.1)  # sqrt((0.01 + 0.01 + 0) / 2)
    assert cell.text() == "20.0 ± 10.0"
    assert tables.Cell.of([0.25]).text() == "25.0"


def test_a_table_by_hand():
    (table,) = tables.make_tables(SEEDS)
    rows = {(row.kind, row.name): row for row in table.lines}

    ties = rows["method", "ties"]
    assert ties.cells["one"].mean == pytest.approx(0.45)
    assert ties.cells["average"].mean == pytest.approx(0.575)  # of 0.5 and 0.65
    assert ties.cells["average"].deviation == pytest.approx(0.15 / 2**0.5)
    # Bases: averages 0.15 and 0.25; gains 0.35 and 0.4.
    assert ties.gain.mean == pytest.approx(0.375)
    assert ties.gain.deviation == pytest.approx(0.05 / 2**0.5)
    assert rows["base", "base"].gain is None and rows["refused", "slerp"].gain is None
    assert ties.seconds.mean == 2.0
    assert ties.peak_bytes.mean == 3e6
    assert ties.chosen == (0.5, 1.0)
    assert ties.best == {"two"}
    assert rows["method", "average"].best == {"one", "average"}
    assert rows["expert", "one"].best == frozenset()  # only methods are compared
    assert rows["refused", "slerp"].cells == {}


def test_methods_are_sorted_by_average():
    (table,) = tables.make_tables(SEEDS)

    assert [(row.kind, row.name) for row in table.lines] == [
        ("base", "base"),
        ("expert", "one"),
        ("method", "average"),
        ("method", "ties"),
        ("search", "ties"),
        ("reference", "mixture"),
        ("refused", "slerp"),
    ]


def test_markdown():
    (table,) = tables.make_tables(SEEDS)

    text = tables.markdown(table)

    assert "| base | 20.0 ± 14.1 | 20.0 ± 0.0 | 20.0 ± 7.1 |  |  |  |  |" in text
    assert "| **75.0 ± 7.1** |" in text
    assert "| ties, scale by search |" in text
    assert "- slerp: merges 1 model; there are 5 experts" in text


def test_a_row_that_one_seed_lacks_says_so():
    (table,) = tables.make_tables([SEEDS[0], outcome(1, *SEEDS[1].rows[:2])])
    ties = next(row for row in tables.body(table) if row[0].startswith("ties"))
    assert ties[0] == "ties (1 of 2 seeds)" and "expert one" in [r[0] for r in tables.body(table)]


def test_seeds_with_other_scales_or_columns_are_no_table():
    rows = [row.model_copy(update={"asked": (0.5,)}) for row in SEEDS[1].rows]
    with pytest.raises(BenchError, match="was run with other scales by seed"):
        tables.make_tables([SEEDS[0], outcome(1, *rows)])
    other = SEEDS[1].model_copy(update={"columns": ("one",)})
    with pytest.raises(BenchError, match="other columns"):
        tables.make_tables([SEEDS[0], other])


def test_a_seed_given_twice_is_refused():
    with pytest.raises(BenchError, match="a seed is given twice"):
        tables.make_tables([SEEDS[0], SEEDS[0]])


def test_the_command_reads_files_and_folders(tmp_path):
    for each in SEEDS:
        results.write(each, tmp_path / f"{each.seed}.json")

    shown = CliRunner().invoke(command, [str(tmp_path)])
    as_json = CliRunner().invoke(command, [str(tmp_path / "0.json"), "--json"])
    as_markdown = CliRunner().invoke(command, [str(tmp_path), "--markdown"])

    assert "fake, full, seeds 0, 1" in shown.output
    assert "57.5±10.6" in shown.output
    assert "slerp" in shown.output
    (table,) = json.loads(as_json.output)
    assert table["lines"][2]["best"] == ["average", "one", "two"]  # "two" is a tie
    assert "**75.0 ± 7.1**" in as_markdown.output


def test_results_survive_the_disk(tmp_path):
    results.write(SEEDS[0], tmp_path / "results.json")

    assert tables.read_results(tmp_path / "results.json") == [SEEDS[0]]


def test_a_built_seed_holds_other_files_too(tmp_path):
    built = results.Build(line="fake", preset="full", seed=0, seconds=1.0, environment=HERE)
    results.write(built, tmp_path / "build.json")
    (tmp_path / "line.json").write_text("{}")
    with pytest.raises(BenchError, match="no results yet"):
        tables.read_results(tmp_path)
    results.write(SEEDS[0], tmp_path / "results.json")
    assert tables.read_results(tmp_path) == [SEEDS[0]]


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(BenchError, match="holds no benchmark"):
        tables.read_results(tmp_path)

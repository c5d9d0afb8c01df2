"""From files of results to the rows and curves of the page."""

import pytest

from omnimerge.bench import results
from omnimerge.bench.boards import find_boards
from omnimerge.bench.page import board_names, dashboard
from omnimerge.bench.results import Environment, Point, Results, Row
from omnimerge.bench.scoreboard import scored_boards
from omnimerge.report import write_dashboard

HERE = Environment(command="omnimerge bench run x", versions={}, machine="m", cores=2)


def run(seed, ties, *, preset="full", line="internvl"):
    points = [
        Point(parameters={"scale": scale}, scores={"vqa": value, "chart": value})
        for scale, value in ((0.3, ties - 0.1), (0.5, ties))
    ]
    rows = (
        Row(name="base", kind="base", scores={"vqa": 0.4, "chart": 0.2}),
        Row(name="vqa", kind="expert", scores={"vqa": 0.6, "chart": 0.1}),
        Row(
            name="ties", kind="method", scores={"vqa": ties, "chart": 0.5}, points=tuple(points),
            parameters={"scale": 0.5}, seconds=1.0 + seed, peak_bytes=1000,
        ),
        Row(
            name="ties", kind="search", scores={"vqa": 0.5, "chart": 0.5},
            parameters={"scale": 0.3},
        ),
        Row(name="slerp", kind="refused", reason="merges 1 model; there are 5 experts"),
        Row(name="mixture", kind="reference", scores={"vqa": 0.9, "chart": 0.9}),
    )  # fmt: skip
    return Results(
        line=line, preset=preset, seed=seed, columns=("vqa", "chart"), rows=rows,
        environment=HERE, build=HERE,
    )  # fmt: skip


def test_means_and_deviations_over_seeds(tmp_path):
    for seed, ties in ((0, 0.6), (1, 0.8)):
        results.write(run(seed, ties), tmp_path / f"seed-{seed}" / "results.json")
    (board,) = scored_boards([tmp_path, tmp_path / "seed-0"])  # the second is in the first
    assert (board.line, board.preset) == ("internvl", "full")
    assert (board.seeds, board.columns) == (2, ("vqa", "chart"))
    assert board.notes == ("slerp: merges 1 model; there are 5 experts.",)
    rows = {(row.name, row.kind): row for row in board.rows}
    assert len(rows) == 5
    ties = rows["ties", "merged"]
    assert ties.scores == pytest.approx((0.7, 0.5))
    assert ties.deviations == pytest.approx((0.02**0.5, 0.0))  # |0.6 - 0.8| / sqrt 2
    assert ties.average == pytest.approx(0.6)
    assert (ties.scale, ties.seconds, ties.memory) == ("0.5", 1.5, 1000)
    assert rows["ties, scale by search", "search"].scale == "0.3"
    assert ties.gain == pytest.approx(0.3)  # averages 0.55 and 0.65, the base's 0.3
    assert ties.gain_deviation == pytest.approx(0.1 / 2**0.5)
    assert rows["base", "base"].gain is None
    (curve,) = board.curves
    assert (curve.name, curve.scales) == ("ties", (0.3, 0.5))
    assert curve.averages == pytest.approx((0.6, 0.7))


def test_presets_are_boards_of_their_own(tmp_path):
    results.write(run(0, 0.6), tmp_path / "a.json")
    results.write(run(0, 0.6, preset="quick"), tmp_path / "b.json")
    (tmp_path / "other.json").write_text("[]")
    boards = scored_boards([tmp_path])
    assert [board.preset for board in boards] == ["full", "quick"]
    assert board_names(boards) == ["internvl, full", "internvl, quick"]


def test_curves_and_rows_that_some_seeds_lack(tmp_path):
    results.write(run(0, 0.6), tmp_path / "a.json")
    other = run(1, 0.6)
    rows = tuple(row for row in other.rows if row.name != "ties")
    results.write(other.model_copy(update={"rows": rows}), tmp_path / "b.json")
    (board,) = scored_boards([tmp_path])
    assert board.curves == ()
    assert [row.name for row in board.rows if row.kind == "merged"] == ["ties (1 of 2 seeds)"]


def test_the_page_has_the_numbers(tmp_path):
    results.write(run(0, 0.625, line="of another version"), tmp_path / "results.json")
    page = dashboard(find_boards([tmp_path], scored_boards([tmp_path])))
    text = write_dashboard(page, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "gain" in text and "62.5" in text and "scale by search" in text and "5 experts" in text

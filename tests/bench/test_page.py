"""Results of the benchmark become a dashboard that the report accepts, with the right numbers."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from omnimerge.bench import experiments, results
from omnimerge.bench.analysis import Analysis, LayerVectors, TensorVectors
from omnimerge.bench.boards import find_boards
from omnimerge.bench.experiments import ablation
from omnimerge.bench.experiments.result import Curve, Entry, Experiment
from omnimerge.bench.line import BenchError
from omnimerge.bench.page import Board, ScaleCurve, Scored, board_names, dashboard
from omnimerge.bench.results import Build, Environment
from omnimerge.bench.spectra import Spectrum, Spread
from omnimerge.cli import main
from omnimerge.report.dashboard import read_dashboard, render_dashboard

TASKS = ("VQA", "OCR", "Chart")
COMMITTED = Path(__file__).parents[2] / "benchmarks" / "results" / "bench"


def scored(name, kind, *scores, deviation=0.01, **more):
    average = sum(scores) / len(scores)
    return Scored(name, kind, scores, (deviation,) * len(scores), average, deviation, **more)


ROWS = (
    scored("base", "base", 0.3, 0.2, 0.1),
    scored("VQA", "expert", 0.6, 0.2, 0.1),
    scored("OCR", "expert", 0.3, 0.7, 0.1),
    scored(
        "ties", "merged", 0.5, 0.5, 0.2, scale="0.5 0.9", scale_mean=0.7, seconds=1.5, memory=2.5e6
    ),
    scored(
        "optmerge", "merged", 0.55, 0.45, 0.5, scale="1", scale_mean=1.0, seconds=2.5, memory=3e6
    ),
    scored("mixture", "reference", 0.6, 0.6, 0.6),
)
SEARCHED = scored("ties, scale by search", "search", 0.9, 0.9, 0.9, gain=0.7, gain_deviation=0.02)
CURVES = (ScaleCurve("ties", (0.1, 1.0), (0.3, 0.4), (0.01, 0.02)),)


def analysis():
    spectrum = Spectrum(
        numerical_rank=4, stable_rank=2.0, effective_rank=3.0, rank_99=3, energy=(0.5,) * 5 + (1.0,)
    )
    pair = ((1.0, -0.25), (-0.25, 1.0))

    def tensor(layer, kind):
        return TensorVectors(
            tensor=f"{layer}.{kind}", kind=kind, layer=layer, shape=(4, 8), base_norm=10.0,
            norms=(1.0, 2.0), spectra=(spectrum, None), cosine=pair,
        )  # fmt: skip

    spread = Spread(shares=(0.25, 0.5), zeros=0.25, mean=0.01, rms=0.02, skewness=1.5, modes=1)
    return Analysis(
        experts=("a", "b"), base="base", select="linear", tensors=4, entries=128, base_norm=20.0,
        norms=(2.0, 4.0), cosine=pair,
        layers=tuple(
            LayerVectors(layer=n, base_norm=14.0, norms=(1.0, 2.0), cosine=pair) for n in (0, 1)
        ),
        matrices=tuple(tensor(n, k) for n in (0, 1) for k in ("attn.q", "mlp.up")),
        edges=(0.001, 0.01, 0.1), spread=(spread, spread),
    )  # fmt: skip


def experiment(seed=0, shift=0.0, **changes):
    made = Experiment(
        name="ablation", title="Ablation", paper="Table 4", question="Why?", line="x",
        preset="full", seeds=(seed,),
        columns=("VQA", "Average", "λ"),
        rows=tuple(
            Entry(name=n, values=(v + shift, v + shift, 1.0))
            for n, v in zip(ablation.ROWS, (50, 40, 60, 61), strict=True)
        ),
        outcome=("old",), settings={"experts": 5},
    )  # fmt: skip
    return made.model_copy(update=changes)


def board(**changes):
    made = {
        "line": "x", "preset": "full", "about": "A line.", "columns": TASKS, "rows": ROWS,
        "seeds": 3, "command": "omnimerge bench run", "curves": CURVES,
        "analyses": (analysis(),) * 2, "experiments": (experiment(),),
    }  # fmt: skip
    return Board(**{**made, **changes})


def sections(*boards):
    return {s["title"]: s for s in dashboard(boards)["sections"]}


def test_the_report_takes_all_of_it():
    page = dashboard([board(), board(line="y", rows=(), curves=())], version="1.0")
    read = read_dashboard(json.loads(json.dumps(page)))
    html = render_dashboard(read)
    assert '<h2 id="g1">x</h2>' in html and '<h2 id="g2">y</h2>' in html
    assert read.eyebrow == "omnimerge · benchmark · 1.0"


def test_the_table_marks_the_best_merge_of_each_column():
    table = sections(board())["Scores"]
    names = [column["name"] for column in table["columns"]]
    assert names == ["VQA", "OCR", "Chart", "Average", "λ", "time", "memory"]
    best = {
        (row["name"], name)
        for row in table["rows"]
        for name, cell in zip(names, row["cells"], strict=True)
        if cell and cell.get("best")
    }
    assert best == {
        ("optmerge", "VQA"),
        ("ties", "OCR"),
        ("optmerge", "Chart"),
        ("optmerge", "Average"),
    }
    ties = table["rows"][3]["cells"]
    assert ties[0] == {"value": 50.0, "deviation": 1.0, "best": False}
    assert ties[4:] == [
        {"value": 0.7, "text": "0.5 0.9"},
        {"value": 1.5, "deviation": None},
        {"value": 2.5e6, "text": "2 MB"},
    ]
    assert table["rows"][0]["cells"][4:] == [None, None, None]
    assert "3 seeds" in table["text"][1]


def test_a_scale_by_search_is_shown_but_not_ranked():
    found = sections(board(rows=(*ROWS, SEARCHED)))
    table = found["Scores"]
    names = [column["name"] for column in table["columns"]]
    assert names == ["VQA", "OCR", "Chart", "Average", "gain", "λ", "time", "memory"]
    row = table["rows"][-1]
    assert (row["name"], row["label"]) == ("ties, scale by search", "")
    assert not any(cell["best"] for cell in row["cells"][:5])
    assert row["cells"][4] == {"value": 70.0, "deviation": 2.0, "best": False}
    assert table["rows"][4]["cells"][3]["best"] and table["rows"][0]["cells"][4]["value"] is None
    assert table["notes"] == [
        "Green: the best merge of its column, but for those with the scale by search."
    ]
    assert table["columns"][5]["title"] == (
        "scale, chosen on the validation questions: by their answers, or without (by search)"
    )
    radar = [series["name"] for series in found["By task"]["series"]]
    assert radar == ["base", "expert OCR", "ties", "optmerge", "mixture"]
    assert "ties, scale by search" not in found["Average"]["categories"]
    assert found["Average"]["notes"] == [
        "Bold: merges. Those with the scale by search are in the table."
    ]
    assert found["Average"]["emphasis"] == ["optmerge", "ties"]
    assert dashboard([board(rows=(*ROWS, SEARCHED))])["facts"][0]["detail"] == "optmerge"
    render_dashboard(read_dashboard(dashboard([board(rows=(*ROWS, SEARCHED))])))


def test_boards_are_named_after_what_tells_them_apart():
    boards = [Board("x", "full"), Board("x", "quick"), Board("y", "full"), Board()]
    assert board_names(boards) == ["x, full", "x, quick", "y", "Task vectors"]


def test_columns_that_nobody_filled_are_left_out():
    table = sections(board(rows=ROWS[:3], seeds=1))["Scores"]
    assert [column["name"] for column in table["columns"]] == [*TASKS, "Average"]
    assert table["text"][1] == "In percent; one seed."


def test_bars_are_sorted_and_radars_have_references():
    found = sections(board())
    bars = found["Average"]
    assert bars["categories"] == ["mixture", "optmerge", "ties", "expert OCR", "expert VQA", "base"]
    assert bars["series"][0]["values"][1] == pytest.approx(50.0)
    assert bars["emphasis"] == ["optmerge", "ties"]
    radar = found["By task"]
    assert radar["references"] == ["base", "expert OCR"]
    assert [s["name"] for s in radar["series"]] == [
        "base",
        "expert OCR",
        "ties",
        "optmerge",
        "mixture",
    ]
    assert radar["high"] == 80.0  # above the 70 of the expert
    assert "levels" not in found["Scale"]  # the base's validation average is not known
    scale = found["Scale"]["lines"][0]
    assert scale["low"] == pytest.approx([29, 38]) and scale["high"] == pytest.approx([31, 42])


def test_facts():
    facts = dashboard([board()])["facts"]
    assert [(f["value"], f["detail"]) for f in facts] == [
        ("50.0 %", "optmerge"), ("20.0 %", ""), ("36.7 %", "OCR"), ("60.0 %", "mixture")
    ]  # fmt: skip
    named = ["best merge", "base", "best expert", "reference"]
    assert [fact["name"] for fact in facts] == named
    several = dashboard([board(), board(line="y")])["facts"]
    assert [f["name"] for f in several] == [f"{line}: {name}" for line in "xy" for name in named]


def test_the_analysis():
    found = sections(board())
    assert found["How alike the task vectors are"]["values"] == [[1.0, -0.25], [-0.25, 1.0]]
    assert found["How alike they are, by layer"]["rows"] == ["a · b"]
    assert found["How alike they are, by layer"]["values"] == [[-0.25, -0.25]]
    assert found["Norm by layer"]["lines"][1]["y"] == [2.0, 2.0]
    change = found["Change by layer and matrix"]
    assert change["columns"] == ["attn.q", "mlp.up"] and change["values"] == [[15.0] * 2] * 2
    assert found["Effective rank by layer and matrix"]["values"] == [[3.0, 3.0]] * 2
    assert [line["name"] for line in found["Stable rank by layer"]["lines"]] == ["a"]
    ranks = found["Norms and ranks"]["rows"]
    assert [c["value"] for c in ranks[0]["cells"]] == [2.0, 10.0, 4, 3, 3.0, 2.0, 100.0]
    assert [c["value"] for c in ranks[1]["cells"]] == [4.0, 20.0, *[None] * 5]
    assert found["Energy in the first directions"]["lines"][0]["y"][-1] == 100.0
    assert found["Magnitudes of the entries"]["series"][0]["values"] == [0.25, 0.5]
    assert "25.0 % exactly zero" in found["Magnitudes of the entries"]["notes"][0]


def test_an_experiment_with_curves_and_a_table():
    curve = Curve(name="c", x=(0.0, 1.0), y=(1.0, 2.0), deviation=(0.5, 0.5))
    found = sections(board(experiments=(experiment(x="step", y="norm", curves=(curve,)),)))
    lines, table = found["Ablation (Table 4 of the OptMerge paper)"], found["Ablation, in numbers"]
    assert lines["lines"][0]["high"] == [1.5, 2.5] and lines["text"] == ["Why?"]
    assert [row["cells"][0]["best"] for row in table["rows"]] == [False, False, False, True]
    assert not any(row["cells"][2]["best"] for row in table["rows"])  # λ is no score
    assert table["notes"][:2] == ["old", "Settings: experts 5."]
    assert table["command"] == "omnimerge bench experiment ablation DIR"


def mark(place, seed=0, preset="full"):
    here = Environment(command="", versions={}, machine="", cores=1)
    made = Build(line="x", preset=preset, seed=seed, seconds=1.0, environment=here)
    results.write(made, place / "build.json")


@pytest.fixture
def folder(tmp_path):
    for seed in (0, 1):
        place = tmp_path / f"seed-{seed}"
        mark(place, seed)
        experiment(seed, 2.0 * seed).write(place / "results" / "experiment-ablation.json")
        analysis().write(place / "analysis.json")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.json").write_text("[1]")
    return tmp_path


def test_folders_become_boards(folder):
    analysis().write(folder / "analysis.json")
    first, second = find_boards([folder])
    assert (first.line, first.preset, second.line) == ("x", "full", "")
    assert len(first.analyses) == 2 and len(second.analyses) == 1
    (mean,) = first.experiments
    assert mean.seeds == (0, 1) and mean.rows[0].values[0] == 51.0
    assert mean.rows[0].deviations[0] == pytest.approx(2**0.5)
    assert mean.outcome[2] == "+ low rank (OptMerge, LoRA variant): +11.0 points against WUDI."
    assert mean.outcome[3].startswith("As in the paper")  # 11 points, 1.4 of deviation
    assert mean.outcome[-2].startswith("The paper ran this ablation on its LoRA line;")


def test_an_ablation_that_was_saved_before_is_shown_in_todays_words(tmp_path):
    now = experiment()
    old = now.rows[-1].model_copy(update={"name": "+ low rank (OptMerge)"})
    mark(tmp_path)
    now.model_copy(update={"rows": (*now.rows[:-1], old)}).write(tmp_path / "e.json")
    (found,) = find_boards([tmp_path])[0].experiments
    assert [row.name for row in found.rows] == list(ablation.ROWS)
    assert found.rows == now.rows and found.question == ablation.QUESTION
    assert found.outcome == tuple(ablation.outcome(now))
    committed = sorted(COMMITTED.glob("*/seed-0/results/experiment-ablation.json"))
    assert len(committed) == 2
    for file in committed:
        read = experiments.read(file)
        assert read.rows[-1].name == "+ low rank (OptMerge, LoRA variant)", file
        assert read.outcome[-2].startswith("The paper ran this ablation on its LoRA line;"), file


def test_files_count_once_however_often_they_are_given(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "link").symlink_to(folder / "seed-1")
    given = [folder, folder / "seed-0", folder / "seed-0" / "analysis.json", folder, Path("link")]
    (board,) = find_boards(given)
    assert board.experiments[0].seeds == (0, 1) and len(board.analyses) == 2
    experiment(1).write(folder / "copy.json")
    with pytest.raises(BenchError, match=r"ablation, x full: a seed is given twice: \[1, 0, 1\]"):
        find_boards([folder])


def test_presets_are_no_seeds_of_each_other(folder):
    quick = folder / "quick"
    mark(quick, preset="quick")
    analysis().write(quick / "results" / "analysis.json")
    experiment(0, preset="quick").write(quick / "results" / "experiment-ablation.json")
    boards = find_boards([folder], [board(analyses=(), experiments=())])
    assert board_names(boards) == ["x, full", "x, quick"]
    full, other = boards
    assert (len(full.rows), len(full.analyses), full.experiments[0].seeds) == (6, 2, (0, 1))
    assert (len(other.rows), len(other.analyses), other.experiments[0].seeds) == (0, 1, (0,))


def test_recipes_of_ones_own_are_not_averaged(tmp_path):
    for name in ("a", "b"):
        made = experiment(line="", preset="", seeds=(), outcome=(name,))
        made.write(tmp_path / f"{name}.json")
    (board,) = find_boards([tmp_path])
    assert [each.outcome for each in board.experiments] == [("a",), ("b",)]


def test_boards_with_scores_come_first_and_get_the_rest(folder):
    made = [board(line="z", analyses=(), experiments=()), board(analyses=(), experiments=())]
    z, x = find_boards([folder], made)
    assert (z.line, x.line) == ("z", "x") and z.rows == x.rows == ROWS
    assert len(x.analyses) == 2 and len(x.experiments) == 1 and not z.experiments


def test_the_command(folder, tmp_path):
    run = CliRunner().invoke(main, ["bench", "report", str(folder)])
    assert run.exit_code == 0, run.output
    assert run.output == f"report: {folder / 'report.html'}\n"
    assert "Ablation (Table 4 of the OptMerge paper)" in (folder / "report.html").read_text("utf-8")
    out = tmp_path / "deep" / "page.html"
    run = CliRunner().invoke(
        main, ["bench", "report", str(folder / "seed-0" / "analysis.json"), "-o", str(out)]
    )
    assert run.exit_code == 0 and "Norms and ranks" in out.read_text("utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "nowhere"], "nowhere is not there"),
        (["report", "."], "no results, analyses or experiments in there"),
        (["experiment", "ablation", "."], "is no built seed of a line"),
        (["analyze", "."], "is no built seed of a line"),
        (["experiment", "abblation", "."], "did you mean 'ablation'"),
        (["analyze", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_errors_are_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke(main, ["bench", *arguments])
    assert run.exit_code == 1
    assert message in run.output and run.output.count("\n") == 1


def test_help_lists_the_experiments():
    text = CliRunner().invoke(main, ["bench", "experiment", "--help"]).output
    assert [name for name in experiments.names() if f"{name} " in text] == experiments.names()
    assert all(about in text for about in experiments.ABOUT.values())

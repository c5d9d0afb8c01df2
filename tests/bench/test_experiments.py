"""The paper's findings as experiments: loops against the registered methods, and what is said."""

import json
import math
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from omnimerge.bench import experiments, lines, results
from omnimerge.bench.experiments import (
    ablation,
    distributions,
    noise,
    norm_growth,
    overtraining,
    rank_ratio,
    variants,
)
from omnimerge.bench.experiments.descent import WUDI, Loop, optmerge_loop
from omnimerge.bench.experiments.result import (
    Curve,
    Entry,
    Experiment,
    combined,
    read_experiment,
)
from omnimerge.bench.line import BenchError
from omnimerge.bench.results import Build, Environment
from omnimerge.engine import build_plan, load_recipe, merged_tensors
from omnimerge.methods import get_method


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def deltas():
    return [0.01 * draw(20, 15, seed=s) for s in range(3)]


def merged(method, deltas, **parameters):
    return get_method(method).merge(deltas, torch.zeros_like(deltas[0]), parameters)


def same(one, other):
    torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-6)


def test_the_loops_are_the_registered_methods(deltas):
    same(WUDI.run(deltas)[0], merged("wudi", deltas))
    lora, full = (optmerge_loop(3, full=full).run(deltas)[0] for full in (False, True))
    same(lora, merged("optmerge", deltas, variant="lora"))
    same(full, merged("optmerge", deltas, variant="full"))


def test_iterations_are_logged_on_the_way(deltas):
    loop = Loop("sgd", "mean")
    start, few, many = loop.run(deltas, [0, 5, 40])
    same(start, sum(deltas) / 3)
    same(few, Loop("sgd", "mean", iterations=5).run(deltas)[0])
    assert (many - start).norm() > (few - start).norm() > 0


def test_one_step_of_sgd_by_hand():
    # One expert τ: the gradient at the sum, which is τ itself, is zero; from elsewhere it is not.
    a, b = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    start, step = Loop("sgd", "mean").run([a, b], [0, 1])
    same(start, torch.tensor([[0.5, 0.0], [0.0, 1.0]]))
    # C = diag(1, 1), D = a + b, so the gradient is 2 (mean - sum) = -(a + b).
    same(step, start + 1e-4 * (a + b))


def test_low_rank_leaves_directions_out():
    strong, weak = torch.diag(torch.tensor([2.0, 1.0])), torch.diag(torch.tensor([0.0, 0.0]))
    (only,) = Loop("sgd", "mean", ratio=0.5, iterations=1).run([strong, weak])
    # k = 1: the pull is along the first direction only, and the second stays at the mean.
    assert only[1, 1] == pytest.approx(0.5)
    assert only[0, 0] > 1.0


@pytest.fixture(scope="module")
def recipe(checkpoints, tmp_path_factory):
    root = tmp_path_factory.mktemp("experts")
    base = checkpoints("qwen2_vl")
    tensors = load_file(base / "model.safetensors")
    for number in range(2):
        folder = root / f"e{number}"
        shutil.copytree(base, folder)
        moved = {
            n: t + 1e-3 * draw(*t.shape, seed=50 * number + i) if t.dim() == 2 else t
            for i, (n, t) in enumerate(tensors.items())
        }
        save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
    return {"method": "wudi", "base": str(base), "models": [str(root / f"e{n}") for n in range(2)]}


def test_norm_growth(recipe):
    found = norm_growth.run(recipe, counts=(0, 10, 100))

    wudi, lora = found.curve("WUDI: Adam from the sum"), found.curves[-1]
    assert wudi.y[0] == pytest.approx(found.levels["sum of the task vectors"])
    assert lora.y[0] == pytest.approx(found.levels["mean of the task vectors"])
    assert found.levels["sum of the task vectors"] == pytest.approx(2 * lora.y[0])
    entries = 2 * (32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 64)
    assert wudi.y[0] == pytest.approx(1e-3 * math.sqrt(2 * entries), rel=0.03)
    assert lora.y[2] == pytest.approx(lora.y[0], rel=0.01)
    change = lora.y[2] / lora.y[0] - 1
    assert norm_growth.outcome(found)[2] == (
        f"OptMerge, lora: SGD from the mean: {change:+.1%} over 100 iterations, to "
        f"{1 + change:.2f} times the mean of the task vectors."
    )


def test_distributions(recipe):
    found = distributions.run(recipe)

    assert [row.name for row in found.rows] == ["e0", "e1"]
    norm, ratio, mean, skewness, peaks, _ = found.rows[0].values
    assert norm == pytest.approx(found.rows[1].values[0], rel=0.05)
    assert 1.0 <= ratio < 1.1
    # |x| of a normal distribution: mean σ √(2/π), skewness √2 (4 - π) / (π - 2)^1.5.
    assert mean == pytest.approx(1e3 * math.sqrt(2 / math.pi), rel=0.02)
    assert skewness == pytest.approx(0.9953, abs=0.1)
    assert peaks == 1.0
    assert "Right-skewed: 2 of 2 task vectors" in distributions.outcome(found)[0]
    assert all(len(each) == len(found.edges) - 1 for each in found.shares.values())


def test_seeds_become_means(recipe, tmp_path):
    one = norm_growth.run(recipe, counts=(0, 10))
    one = one.model_copy(update={"line": "x", "preset": "full", "seeds": (0,)})
    shifted = tuple(c.model_copy(update={"y": tuple(3 * v for v in c.y)}) for c in one.curves)
    two = one.model_copy(update={"curves": shifted, "seeds": (1,)})

    mean = combined([one, two], norm_growth.outcome)

    for before, after in zip(one.curves, mean.curves, strict=True):
        assert after.y == pytest.approx([2 * v for v in before.y])
        assert after.deviation == pytest.approx([math.sqrt(2) * v for v in before.y])
    assert mean.seeds == (0, 1)
    assert combined([one]) is one
    with pytest.raises(BenchError, match="not of one experiment"):
        combined([one, two.model_copy(update={"line": "y"})])
    with pytest.raises(BenchError, match="not of one experiment"):
        combined([one, two.model_copy(update={"preset": "quick"})])
    with pytest.raises(
        BenchError, match=r"norm-growth, x full: a seed is given twice: \[0, 1, 0\]"
    ):
        combined([one, two, one])
    file = one.write(tmp_path / "one.json")
    assert read_experiment(file) == one
    file.write_text("{}")
    with pytest.raises(BenchError, match="holds no experiment"):
        read_experiment(file)
    with pytest.raises(BenchError, match="no curve 'z'"):
        one.curve("z")


class Scripted:
    """A subject whose score depends on what was put, so that choices can be told."""

    def __init__(self, score):
        self.score_of, self.recipe, self.asked = score, None, []

    def put(self, recipe):
        self.recipe = recipe

    def score(self, split):
        self.asked.append((split, self.recipe["parameters"].get("scale")))
        return self.score_of(self.recipe, split)


class FakeLine:
    name, columns, experts = "fake", ("one", "two"), ("one", "two")

    def __init__(self, recipe, score, provides=None):
        self.base_recipe, self.made, self.provides = recipe, Scripted(score), provides

    def recipe(self, folder, method, parameters):
        extra = {"provides": self.provides} if self.provides else {}
        return {**self.base_recipe, "method": method, "parameters": dict(parameters), **extra}

    def task_vectors(self, folder):
        return {**self.base_recipe, "method": "task_arithmetic", "parameters": {}}

    def subject(self, folder):
        return self.made

    def alone(self, folder, name, split):
        return {"one": 0.25, "two": 0.25}


def by_scale(recipe, split):
    # best at 0.5 on val; test would prefer 1.0
    best = 0.5 if split == "val" else 1.0
    value = 1 - abs(recipe["parameters"]["scale"] - best) / 2
    return {"one": value, "two": value / 2}


def test_a_variant_is_the_base_plus_what_the_loop_gives(recipe, tmp_path):
    variants.write_variant(recipe, WUDI, tmp_path / "out")

    plan = build_plan(load_recipe({**recipe, "select": "linear"}), ancestor=False)
    expected = dict(merged_tensors(plan))
    written = load_file(tmp_path / "out" / "model.safetensors")
    base = load_file(f"{recipe['base']}/model.safetensors")
    assert len(expected) == 14
    for name, tensor in written.items():
        if name in expected:
            torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=2e-6)
            assert not torch.equal(tensor, base[name])
        else:
            assert torch.equal(tensor, base[name])
    assert (tmp_path / "out" / "config.json").is_file()
    half = load_recipe(variants.recipe_of(recipe, tmp_path / "out", 0.5))
    for name, tensor in merged_tensors(build_plan(half, ancestor=False)):
        torch.testing.assert_close(tensor, (base[name] + written[name]) / 2, rtol=1e-4, atol=1e-6)


def test_ablation(recipe, tmp_path):
    line, told = FakeLine(recipe, by_scale), []

    found = ablation.run(line, tmp_path, scales=(0.1, 0.5, 1.0), on_progress=told.append)

    assert [row.name for row in found.rows] == list(ablation.ROWS)
    assert found.columns == ("one", "two", "Average", "λ")
    assert all(row.values == (75.0, 37.5, 56.25, 0.5) for row in found.rows)
    assert line.made.asked[:4] == [("val", 0.1), ("val", 0.5), ("val", 1.0), ("test", 0.5)]
    assert len(told) == 4 and told[0] == "WUDI: 56.2 % with λ = 0.5"
    said = ablation.outcome(found)
    assert said[0] == "+ SGD: +0.0 points against WUDI."
    assert said[3].endswith("better than WUDI; here the difference is within the noise.")


def test_rank_ratio(recipe, tmp_path):
    line = FakeLine(recipe, by_scale)
    found = rank_ratio.run(
        line, tmp_path, ratios=(0.1, 0.5), scales=(0.5,), on_progress=lambda _: None
    )
    assert [row.name for row in found.rows] == ["10%", "50%"]
    assert found.curves[0].x == (10.0, 50.0) and found.curves[0].y == (56.25, 56.25)
    assert found.settings["variant"] == "full"
    assert rank_ratio.outcome(found)[0] == (
        "No share is best: from worst to best it is 0.0 points, within the noise."
    )


def test_overtraining(recipe, tmp_path):
    trained = []

    def score(recipe, split):
        models = recipe["models"]
        factor = float(Path(models[0]["model"], "factor").read_text())
        if len(models) == 1:
            return {"one": 0.2 * factor, "two": 0.1}
        return {"one": 0.5 / factor, "two": 0.5 / factor}

    def train(folder, factor):
        for name in ("one", "two"):
            (folder / name).mkdir()
            (folder / name / "factor").write_text(str(factor))
        trained.append(factor)

    setting = overtraining.Setting(factors=(1, 2), methods=("ties",), scales=(0.5, 1.0))
    line = FakeLine(recipe, score)
    found = overtraining.run(line, tmp_path, train, setting=setting, on_progress=lambda _: None)

    assert trained == [1, 2]
    assert found.rows[0].values == pytest.approx((15.0, 15.0, 50.0))
    assert found.rows[1].values == pytest.approx((25.0, 25.0, 25.0))
    assert found.curve("ties").y == pytest.approx((50.0, 25.0))
    assert found.levels == {"base": 25.0}
    assert overtraining.outcome(found)[1].endswith("not better at first, and worse in the end.")


def numbers(averages, **changes):
    """An experiment of one column and these averages."""
    rows = tuple(
        Entry(name=name, values=(v, v, 1.0))
        for name, v in zip(ablation.ROWS, averages, strict=False)
    )
    made = Experiment(
        name="n", title="N", paper="", question="", columns=("one", "Average", "λ"), rows=rows
    )
    return made.model_copy(update=changes)


def bent(*curves, **changes):
    """An over-training experiment with these merges."""
    names = [f"m{n}" for n in range(len(curves))]
    x = tuple(range(1, len(curves[0]) + 1))
    made = tuple(
        Curve(name=name, x=x, y=y)
        for name, y in zip(["own", *names], [curves[0], *curves], strict=True)
    )
    return numbers([], columns=("own", "average", *names), curves=made, **changes)


def test_what_counts_as_noise():
    found = numbers([50.0])
    assert noise.margin(found, [50.0]) == 1.0  # nobody knows how many questions
    asked = found.model_copy(update={"settings": {"test questions": 400}})
    assert noise.margin(asked, [50.0]) == pytest.approx(5.0)  # 2 sqrt(0.25 / 400)
    assert noise.margin(asked, [90.0, 100.0]) == pytest.approx(3.0)
    seeds = asked.model_copy(update={"seeds": (0, 1, 2, 3)})
    assert noise.margin(seeds, [50.0], [0.5]) == pytest.approx(2.5)  # 1600 questions
    assert noise.margin(seeds, [50.0, 50.0], [0.5, 7.0]) == 7.0


@pytest.mark.parametrize(
    ("curve", "shape", "paper"),
    [
        ((40.0, 50.0, 45.0), "better at first, and worse in the end", True),
        ((50.0, 45.0, 40.0), "not better at first, and worse in the end", False),
        ((40.0, 50.0, 49.5), "better, and not worse in the end", False),
        ((49.2, 50.0, 49.1), "within the noise", False),
        ((49.5, 50.0, 45.0), "not better at first, and worse in the end", False),
    ],
)
def test_a_fall_is_one_beyond_the_noise(curve, shape, paper):
    said = overtraining.outcome(bent(curve))
    assert said[1].endswith(f": {shape}.") and f"at best {max(curve):.1f} %" in said[1]
    ours = (
        "As in the paper, the merge gets better" if paper else "worse in the end; here 0 of 1 do."
    )
    assert ours in said[2] and said[3] == "Differences of up to 1.0 points count as noise."
    assert f"{paper + 0} of 2 do" in overtraining.outcome(bent(curve, (50.0, 50.0, 50.0)))[3]


def test_few_questions_are_much_noise():
    few = {"test questions": 100}  # 2 sqrt(0.25 / 100) = 10 points
    assert overtraining.outcome(bent((41.0, 50.0, 41.0), settings=few))[1].endswith("the noise.")
    assert "are worse" in ablation.outcome(numbers([50, 40, 60, 39], settings=few))[3]
    for last, said in ((59, "within the noise"), (41, "within the noise"), (61, "As in the paper")):
        assert said in ablation.outcome(numbers([50, 40, 60, last], settings=few))[3]
    for shares, said in (
        ((50, 45, 55), "No share is best: from worst to best it is 10.0 points, within the noise."),
        ((50, 61, 40), "The best share is + SGD; from worst to best it is 21.0 points."),
        ((51, 56, 40), "beyond the noise, are WUDI, + SGD; from worst to best it is 16.0 points."),
    ):
        assert rank_ratio.outcome(numbers(shares, settings=few))[0].endswith(said)


@pytest.fixture
def built(recipe, tmp_path, monkeypatch):
    """A built folder; its line merges, and `omni` beside it composes."""
    known = {"fake": FakeLine(recipe, by_scale), "omni": FakeLine(recipe, by_scale, "vision")}
    known["omni"].name = "omni"
    monkeypatch.setattr(lines, "get", known.__getitem__)
    monkeypatch.setattr(lines, "names", lambda: list(known))

    def build(line):
        here = Environment(command="", versions={}, machine="", cores=1)
        settings = {"questions": {"val": 60, "test": 240}}
        made = Build(
            line=line, preset="quick", settings=settings, seed=3, seconds=1.0, environment=here
        )
        results.write(made, tmp_path / "build.json")
        return tmp_path

    return build


def test_running_says_where_the_numbers_are_from(built):
    found = experiments.run("ablation", built("fake"), lambda _: None)
    assert (found.line, found.preset, found.seeds) == ("fake", "quick", (3,))
    assert found.settings == {"iterations": 300, "experts": 2, "test questions": 480}
    points = 200 * math.sqrt(0.5625 * 0.4375 / 480)
    assert found.outcome[-1] == f"Differences of up to {points:.1f} points count as noise."
    assert found.seconds > 0


@pytest.mark.parametrize("name", experiments.RECIPE_ONLY)
def test_weights_are_looked_at_on_any_line(name, built, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(norm_growth, "run", partial(norm_growth.run, counts=(0, 1)))
    found = experiments.run(name, built("omni"), lambda _: None)
    assert (found.line, found.preset, found.seeds) == ("omni", "quick", (3,))
    assert "test questions" not in found.settings
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe))
    alone = experiments.run(name, file, lambda _: None)
    assert (alone.line, alone.preset, alone.seeds) == ("", "", ())
    assert (alone.outcome, alone.curves, alone.rows) == (found.outcome, found.curves, found.rows)


def test_a_line_that_composes_scores_no_variants(built, monkeypatch):
    for name in ("ablation", "rank-ratio"):
        with pytest.raises(BenchError) as error:
            experiments.run(name, built("omni"), lambda _: None)
        assert str(error.value) == (
            f"{name} is not made for line omni, only for fake; "
            "all lines have norm-growth and distributions"
        )
    monkeypatch.undo()
    with pytest.raises(BenchError, match="not made for line modality, only for internvl, qwen2vl;"):
        experiments.run("overtraining", built("modality"), lambda _: None)


def test_overtraining_gets_the_lines_trainer(built, monkeypatch):
    with pytest.raises(BenchError, match="overtraining is not made for line fake"):
        experiments.run("overtraining", built("fake"), lambda _: None)
    monkeypatch.setattr(FakeLine, "trainer", lambda _, folder: f"trains {folder}", raising=False)
    got = []

    def run(line, folder, train, on_progress):
        got.append(train)
        return bent((40.0, 50.0, 46.0))  # of 480 questions, 4.6 points are noise

    monkeypatch.setattr(overtraining, "run", run)
    folder = built("fake")
    found = experiments.run("overtraining", folder, lambda _: None)
    assert got == [f"trains {folder}"] and found.seeds == (3,)
    assert found.outcome[1].endswith("longest trained: better, and not worse in the end.")


def test_experiments_have_names():
    for name in experiments.names():
        assert name == experiments.get(name).NAME and experiments.ABOUT[name]
    with pytest.raises(BenchError, match="did you mean 'ablation'"):
        experiments.get("ablatoin")

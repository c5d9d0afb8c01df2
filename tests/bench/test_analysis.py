"""Norms, ranks, cosines and distributions of task vectors: by hand, and against numpy."""

import json
import math
import shutil

import numpy as np
import pytest
import tiny_adapters
import tiny_models
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from omnimerge.bench import lines
from omnimerge.bench.analysis import analyze, expert_names, kind_of, read_analysis
from omnimerge.bench.spectra import SHARES, Histogram, dot, modes, singular_values, spectrum
from omnimerge.cli import main
from omnimerge.engine import load_recipe
from omnimerge.errors import CheckpointError, NonFiniteError, RecipeError
from omnimerge.methods import LowRank


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_diagonal_spectrum_by_hand():
    matrix = torch.zeros(3, 5)
    matrix[0, 0], matrix[1, 1] = 4.0, 3.0  # energy 16 + 9 = 25

    found = spectrum(matrix)

    assert found.numerical_rank == 2 and found.rank_99 == 2
    assert found.stable_rank == pytest.approx(25 / 16)
    p = np.array([4, 3]) / 7
    assert found.effective_rank == pytest.approx(math.exp(-(p * np.log(p)).sum()))
    # min(m, n) = 3: a share up to 1/3 is one direction, 0.5 is two.
    assert found.energy == pytest.approx((0.64, 0.64, 0.64, 0.64, 0.64, 1.0))


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (12, 12)], ids=str)
def test_singular_values_are_numpys(shape):
    matrix = draw(*shape)
    expected = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(singular_values(matrix).numpy(), expected, rtol=1e-10)
    assert spectrum(matrix).numerical_rank == np.linalg.matrix_rank(matrix.numpy()) == min(shape)


def test_factors_are_measured_like_their_product():
    a, b = (LowRank(draw(20, 3, seed=s), draw(3, 14, seed=s + 10)) for s in (1, 2))

    assert dot(a, b) == pytest.approx(float((a.dense() * b.dense()).sum()), rel=1e-4)
    values = singular_values(a)
    assert len(values) == 3
    np.testing.assert_allclose(values, np.linalg.svd(a.dense(), compute_uv=False)[:3], rtol=1e-5)
    sparse, dense = spectrum(a), spectrum(a.dense())
    assert sparse.numerical_rank == dense.numerical_rank == 3
    assert sparse.energy == pytest.approx(dense.energy, rel=1e-5)
    assert sparse.effective_rank == pytest.approx(dense.effective_rank, rel=1e-4)


def test_what_changes_nothing_has_no_spectrum():
    assert spectrum(torch.zeros(3, 4)) is None
    assert spectrum(LowRank(torch.zeros(3, 0), torch.zeros(0, 4))) is None


def test_a_histogram_by_hand():
    histogram = Histogram()
    histogram.add(torch.tensor([[0.0, 0.015], [-0.015, 1.5]]))

    used = [(n, c) for n, c in enumerate(histogram.counts) if c]
    first, last = used[0][0], used[-1][0]
    found = histogram.finish(first, last)

    assert [count for _, count in used] == [2, 1]
    assert last - first == 20  # two decades of ten bins
    assert found.shares[0] == 0.5 and found.shares[-1] == 0.25 and found.zeros == 0.25
    values = np.array([0, 0.015, 0.015, 1.5])
    assert found.mean == pytest.approx(values.mean())
    assert found.rms == pytest.approx(math.sqrt((values**2).mean()))
    skewness = ((values - values.mean()) ** 3).mean() / values.std() ** 3
    assert found.skewness == pytest.approx(skewness)
    assert found.modes == 2


def test_constant_magnitudes_are_not_skewed():
    histogram = Histogram()
    histogram.add(torch.full((10,), 0.25))
    found = histogram.finish(0, len(histogram.counts) - 1)
    assert found.skewness == 0.0 and found.modes == 1 and sum(found.shares) == 1.0


@pytest.mark.parametrize(
    ("shares", "count"),
    [
        ([0, 1, 3, 6, 3, 1, 0], 1),
        ([6, 6, 6], 1),
        ([1, 3, 6, 3, 1, 0, 0, 1, 2, 4, 2, 1], 2),
        ([5, 9, 8.9, 9, 8.8, 9, 5], 1),  # ripples are no peaks
        ([0, 0, 0], 0),
    ],
)
def test_modes(shares, count):
    assert modes(shares) == count


@pytest.mark.parametrize(
    ("slot", "kind"),
    [
        ("llm.layers.3.attn.q.weight", "attn.q"),
        ("llm.layers.11.attn.q.weight@vision", "attn.q@vision"),
        ("vision.blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc1"),
    ],
)
def test_kinds(slot, kind):
    assert kind_of(slot) == kind


@pytest.fixture(scope="module")
def line(checkpoints, tmp_path_factory):
    """A base, and two experts that differ from it by tensors that are known."""
    root = tmp_path_factory.mktemp("line")
    base = checkpoints("qwen2_vl")
    tensors = load_file(base / "model.safetensors")
    changed = [
        n for n, t in tensors.items() if t.dim() == 2 and ".layers." in n and "visual" not in n
    ]
    deltas = {}
    for number in range(2):
        folder = root / f"expert-{number}"
        shutil.copytree(base, folder)
        deltas[number] = {
            name: 0.01 * (number + 1) * draw(*tensors[name].shape, seed=100 * number + i)
            for i, name in enumerate(changed)
        }
        if number:  # not independent of the first
            deltas[1] = {n: d + 0.01 * deltas[0][n] / 0.01 for n, d in deltas[1].items()}
        moved = {n: t + deltas[number].get(n, 0) for n, t in tensors.items()}
        save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
    recipe = {
        "method": "adamms",
        "target": str(base),
        "base": str(base),
        "models": [str(root / "expert-0"), str(root / "expert-1")],
        "parameters": {"alpha": 0.5},
    }
    truth = {
        number: {
            n: load_file(root / f"expert-{number}" / "model.safetensors")[n] - tensors[n]
            for n in changed
        }
        for number in range(2)
    }
    return recipe, tensors, truth


def test_a_recipe_against_numpy(line):
    recipe, tensors, truth = line
    seen = []

    found = analyze(recipe, on_progress=lambda done, total: seen.append((done, total)))

    flat = [
        np.concatenate([t.double().numpy().ravel() for t in each.values()])
        for each in truth.values()
    ]
    assert found.experts == ("expert-0", "expert-1")
    assert found.select == "linear" and found.tensors == len(truth[0]) == 14
    assert found.entries == len(flat[0])
    assert found.norms == pytest.approx([np.linalg.norm(each) for each in flat])
    cosine = flat[0] @ flat[1] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1])
    assert 0.3 < cosine < 0.6
    assert found.cosine[0][1] == found.cosine[1][0] == pytest.approx(cosine)
    assert found.cosine[0][0] == pytest.approx(1.0)
    base = [tensors[n].double().numpy().ravel() for n in truth[0]]
    assert found.base_norm == pytest.approx(np.linalg.norm(np.concatenate(base)))
    assert [each.layer for each in found.layers] == [0, 1]
    assert sum(n.norms[0] ** 2 for n in found.layers) == pytest.approx(found.norms[0] ** 2)
    for matrix in found.matrices:
        for number in range(2):
            delta = truth[number][matrix.tensor].double().numpy()
            values = np.linalg.svd(delta, compute_uv=False)
            assert matrix.norms[number] == pytest.approx(np.linalg.norm(delta))
            seen_here = matrix.spectra[number]
            assert seen_here.stable_rank == pytest.approx((values**2).sum() / values[0] ** 2)
            kept = [max(1, math.ceil(share * len(values))) for share in SHARES]
            energy = np.cumsum(values**2) / (values**2).sum()
            assert seen_here.energy == pytest.approx([energy[k - 1] for k in kept])
    assert {m.kind for m in found.matrices} == {
        "attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down"
    }  # fmt: skip
    for number in range(2):
        spread = found.spread[number]
        assert len(spread.shares) == len(found.edges) - 1
        assert sum(spread.shares) + spread.zeros == pytest.approx(1.0)
        assert spread.mean == pytest.approx(np.abs(flat[number]).mean())
        assert spread.modes == 1
    assert seen[-1][0] == seen[-1][1] == sum(4 * t.numel() for t in truth[0].values())


def test_norms_alone(line):
    found = analyze(line[0], spectra=False, names=["a", "b"])
    assert found.experts == ("a", "b")
    assert all(each == (None, None) for each in (m.spectra for m in found.matrices))


def test_adapters_are_measured_on_their_factors(checkpoints, tmp_path, monkeypatch):
    base = checkpoints("qwen2_vl")
    model = tiny_models.load("qwen2_vl", base)
    names = [str(tmp_path / f"lora{n}") for n in range(2)]
    for number, name in enumerate(names):
        with torch.no_grad():
            tiny_adapters.save(tiny_models.load("qwen2_vl", base), name, seed=number + 1, r=3)
    recipe = {
        "method": "optmerge",
        "base": str(base),
        "models": [{"adapter": name} for name in names],
        "parameters": {"variant": "lora"},
    }

    found = analyze(recipe)

    ranks = {spectrum.numerical_rank for m in found.matrices for spectrum in m.spectra}
    assert ranks == {3} and found.tensors == 14
    assert found.experts == ("lora0", "lora1")
    dense = analyze({**recipe, "method": "task_arithmetic", "parameters": {}, "select": "linear"})
    assert dense.norms == found.norms
    assert abs(found.cosine[0][1]) < 0.1
    del model


def test_the_command_and_its_file(line, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(line[0]))
    file = tmp_path / "analysis.json"

    result = CliRunner().invoke(main, ["bench", "analyze", str(recipe), "-o", str(file)])

    assert result.exit_code == 0, result.output
    assert "expert-1  norm" in result.output and "(14 tensors)" in result.output
    assert read_analysis(file) == analyze(line[0])


def test_the_command_asks_a_built_line_for_its_task_vectors(line, tmp_path, monkeypatch):
    recipe = {**line[0], "method": "task_arithmetic", "parameters": {}, "select": "linear"}

    class Composing:
        def task_vectors(self, folder):
            assert folder == tmp_path
            return recipe

    monkeypatch.setattr(lines, "built", lambda _: Composing())

    result = CliRunner().invoke(main, ["bench", "analyze", str(tmp_path), "--no-ranks"])

    assert result.exit_code == 0, result.output
    assert read_analysis(tmp_path / "analysis.json") == analyze(recipe, spectra=False)


def test_the_same_name_twice_gets_a_number(line):
    recipe = load_recipe({**line[0], "models": [line[0]["models"][0]] * 3})
    assert expert_names(recipe) == ("expert-0", "expert-0 (2)", "expert-0 (3)")


def test_what_cannot_be_analyzed(line, tmp_path, checkpoints):
    with pytest.raises(RecipeError, match="base: task vectors are taken from it"):
        analyze({**line[0], "base": None})
    with pytest.raises(CheckpointError, match="cannot read"):
        read_analysis(tmp_path / "none.json")
    other = tmp_path / "other.json"
    other.write_text('{"kind": "else"}')
    with pytest.raises(CheckpointError, match="holds no analysis of task vectors"):
        read_analysis(other)
    folder = tmp_path / "broken"
    shutil.copytree(checkpoints("qwen2_vl"), folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if n.endswith("layers.0.self_attn.q_proj.weight"))
    tensors[name][0, 0] = math.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"q_proj.* holds NaN"):
        analyze({**line[0], "models": [str(folder)]})

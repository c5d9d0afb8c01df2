"""What all trainings share: the schedule, what learns, and folders that are complete or absent."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from omnimerge.bench import teaching

FEW = teaching.Stage(steps=4, rate=0.1, batch=2, turns=1)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.kept = torch.nn.Parameter(torch.ones(2))
        self.learned = torch.nn.Parameter(torch.ones(2))

    def forward(self, given, use_cache):
        loss = ((self.kept * self.learned - given) ** 2).sum()
        return type("Output", (), {"loss": loss})


def draw(rng):
    return {"given": torch.as_tensor(rng.random(2))}


def taught(seed, **hooks):
    model = Model()
    loss = teaching.train(model, FEW, draw, learning=[model.learned], seed=[seed], **hooks)
    assert not model.training
    return loss, model.kept.tolist(), model.learned.tolist()


def test_what_learns_learns_and_the_seed_is_all_that_matters():
    assert taught(1) == taught(1) != taught(2)
    assert taught(1)[1] == [1.0, 1.0] != taught(1)[2]


def test_a_loss_and_what_surrounds_it_see_the_same_random_numbers():
    def loss(batch, rng):
        return model.learned.sum() * float(rng.random())

    said = []

    class During:
        def __init__(self, rng):
            said.append(rng.random())

        def __enter__(self):
            assert model.learned.grad is None or len(said) > 1

        def __exit__(self, *_):
            assert model.learned.grad is not None

    model = Model()
    teaching.train(model, FEW, draw, learning=[model.learned], seed=[0], loss=loss, during=During)
    assert len(said) == FEW.steps


def test_the_rate_warms_up_and_falls_to_zero():
    rates = [teaching.warmth(step, 100) for step in range(101)]

    assert rates[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-1] == pytest.approx(0.0)
    assert [teaching.warmth(step, 1) for step in (0, 1)] == [1.0, 1.0]


def test_a_folder_appears_when_it_is_complete(tmp_path):
    place = tmp_path / "deep" / "made"
    with teaching.complete_folder(place) as draft:
        (draft / "a").write_text("1")
        assert not place.exists()

    assert [file.name for file in place.parent.rglob("*")] == ["made", "a"]


def test_an_error_leaves_nothing_and_what_was_there(tmp_path):
    place = tmp_path / "made"
    with pytest.raises(KeyError), teaching.complete_folder(place):
        raise KeyError
    assert not list(tmp_path.iterdir())

    place.mkdir()
    (place / "a").write_text("old")
    (place / "mine").write_text("kept")
    with pytest.raises(KeyError), teaching.complete_folder(place) as draft:
        (draft / "a").write_text("new")
        raise KeyError
    assert (place / "a").read_text() == "old"
    with teaching.complete_folder(place) as draft:
        (draft / "a").write_text("new")
    assert {file.name: file.read_text() for file in place.iterdir()} == {"a": "new", "mine": "kept"}
    assert [file.name for file in tmp_path.iterdir()] == ["made"]


def test_neither_a_line_nor_a_stage_needs_torch():
    subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, omnimerge.bench.teaching, omnimerge.bench.grid, "
            "omnimerge.bench.capabilities.line; sys.exit('torch' in sys.modules)",
        ],
        check=True,
    )

"""The modality line: what is asked, what is shown, and that the line's models are what they say."""

import shutil
from collections import Counter

import numpy as np
import pytest
import torch

from omnimerge.bench import grid
from omnimerge.bench.analysis import analyze
from omnimerge.bench.line import BASE, BenchError
from omnimerge.bench.modalities import asking, lessons, media, models, online, training, world
from omnimerge.bench.modalities.line import LINE, ComposedSubject
from omnimerge.checkpoint import Checkpoint
from omnimerge.methods import all_methods

TINY = training.Preset(
    read=training.Stage(3, 1e-3, 2),
    see=training.Stage(2, 1e-3, 2),
    learn=training.Stage(2, 1e-3, 8),
    rank=2,
    pool=4,
    val=6,
    test=6,
)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("line")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(training.PRESETS, "quick", TINY)
        LINE.build(folder, preset="quick", seed=3, on_progress=lambda _: None)
        yield folder


def test_splits_share_no_world_and_yes_is_as_frequent_as_no():
    drawn = {split: world.questions(0, split, 80) for split in ("val", "test")}
    worlds = {split: {q.world for each in found.values() for q in each}
              for split, found in drawn.items()}  # fmt: skip
    assert not worlds["val"] & worlds["test"]
    for found in drawn.values():
        assert [len(each) for each in found.values()] == [80] * 5
        answers = Counter(question.answer for question in found["two"])
        assert set(answers) == {"yes", "no"}
        assert 25 <= answers["yes"] <= 55
        assert all(len(q.kind.needs) == 3 for q in found["three"])


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("angles of picture", "three"),
        ("heat of picture", "cool"),
        ("parity of sound", "even"),
        ("back of motion", "down"),
        ("line of motion", "vertical"),
        ("same shape", "no"),
        ("same colour", "yes"),
        ("same number", "yes"),
        ("same way", "no"),
        ("shape by sound", "circle"),
    ],
)
def test_answers_worked_out_by_hand(words, answer):
    about = world.World(("blue", "triangle", "two"), ("down", "two"), ("blue", "circle", "up"))
    kind = next(kind for kind in world.KINDS if kind.words == words)
    assert world.Question(about, kind).answer == answer


def test_media_show_what_is_told():
    about = world.World(("red", "square", "three"), ("up", "two"), ("green", "cross", "left"))
    rng = np.random.default_rng(1)
    pixels = np.asarray(media.picture(about, rng)).astype(int)
    red = (pixels[..., 0] > 150) & (pixels[..., 1] < 100)
    assert red.sum() == 3 * 25  # squares of five pixels
    frames = [np.asarray(frame).astype(int) for frame in media.video(about, rng)]
    columns = [np.where(f[..., 1] > 150)[1].mean() for f in frames]
    assert columns == sorted(columns, reverse=True)
    assert columns[0] - columns[-1] == pytest.approx(12, abs=1)
    samples = media.sound(about, rng)
    loud = np.abs(samples).reshape(100, -1).max(axis=1) > 0.05
    assert (np.diff(loud.astype(int)) == 1).sum() == 2
    spectrum = np.abs(np.fft.rfft(samples.reshape(25, -1), axis=1))[
        loud.reshape(25, -1).all(axis=1)
    ]
    assert spectrum[0].argmax() < spectrum[1].argmax()  # the first tone glides up


def test_training_and_asking_give_the_same_tokens(built):
    """A batch of the lessons and a prompt in the chat template read alike."""
    for modality in world.MODALITIES:
        processor = models.processor(modality, built / modality)
        (batch, *_) = asking.ask(processor, (modality,), seed=0, split="val", count=1)
        pool = lessons.Pool(modality, built / modality, seed=0, size=2)
        taught = lessons.Lessons(modality, pool, told=0.0, learned=True)
        given = taught.batch(np.random.default_rng(0), 1, turns=1)
        own = next(
            each for each in asking.ask(processor, (modality,), seed=0, split="val", count=6)
            if each.column == modality
        )  # fmt: skip
        shown = processor.tokenizer.decode(own.inputs["input_ids"][0]).replace("<|endoftext|>", "")
        learned = processor.tokenizer.decode(given["input_ids"][0])
        start = f"{world.LEADS[modality]} : {models.PLACEHOLDERS[modality]}"
        assert shown.strip().startswith(start)
        assert learned.startswith(start)
        assert shown.count(models.PLACEHOLDERS[modality]) == models.TOKENS[modality]
        assert shown.endswith("answer :")
        assert learned.rsplit(" ", 1)[0].endswith("answer :")
        assert " . question : " in shown
        assert " . question : " in learned
        inputs = models.own_inputs(modality, own.inputs)
        assert {k for k in given if k not in ("labels", "held")} == set(inputs)
        assert batch.column in world.COLUMNS


@pytest.mark.parametrize("modality", world.MODALITIES)
def test_what_is_shown_and_told_together_is_of_the_training(built, modality):
    pool = lessons.Pool(modality, built / modality, seed=0, size=50)
    taught = lessons.Lessons(modality, pool, told=0.7, learned=True)
    rng = np.random.default_rng(0)
    for _ in range(300):
        about, number = taught._world(rng, shown=True)
        assert about.split == "train"
        assert getattr(about, modality) == getattr(pool.worlds[number], modality)


@pytest.mark.parametrize("modality", world.MODALITIES)
def test_some_conversations_show_nothing_and_hold_the_base(built, modality):
    pool = lessons.Pool(modality, built / modality, seed=0, size=4)
    taught = lessons.Lessons(modality, pool, told=0.7, learned=True)

    given = taught.batch(np.random.default_rng(0), 16, turns=6)

    place = models.vocabulary(modality).get_vocab()[models.PLACEHOLDERS[modality]]
    shown = (given["input_ids"] == place).sum(dim=1).tolist()
    assert shown == [0] * 4 + [models.TOKENS[modality]] * 12
    held = given["held"]
    assert held[:6].any() and not held[6:].any()
    after = torch.roll(held, 1, dims=1)  # the answer that is held follows the place that gives it
    assert (given["labels"][after] == -100).all()
    words = models.vocabulary(modality)
    own = {k.words for k in world.KINDS if k.learned and k.needs == (modality,)}
    quiet = [
        words.decode(row) for row, few in zip(given["input_ids"], shown, strict=True) if not few
    ]
    assert not any(f"question : {asked} " in text for asked in own for text in quiet)


def test_scale_zero_is_the_base_and_merging_in_memory_is_merging_to_disk(built, tmp_path):
    subject = LINE.subject(built)
    state = {k: v.clone() for k, v in subject._model.state_dict().items()}
    subject.put(LINE.recipe(built, "task_arithmetic", {"scale": 0.0}))
    assert all(torch.equal(v, state[k]) for k, v in subject._model.state_dict().items())
    recipe = LINE.recipe(built, "ties", {"scale": 1.0})
    subject.put(recipe)
    LINE.write(recipe, tmp_path / "out")
    LINE.check(tmp_path / "out")
    from safetensors.torch import load_file

    written = load_file(tmp_path / "out" / "model.safetensors")
    found = subject._model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in written.items())
    assert any(not torch.equal(found[name], state[name]) for name in state)
    assert len(subject.answers()) == 30
    assert set(subject.score("test")) == set(world.COLUMNS)


def test_task_vectors_are_those_of_the_language_models(built):
    found = analyze(LINE.task_vectors(built), spectra=False)
    assert found.tensors == 21  # seven matrices in each of three layers
    assert len(found.experts) == 3 and all(norm > 0 for norm in found.norms)


def test_every_method_gives_a_model_that_loads_and_answers(built, tmp_path):
    """One is loaded; the others differ from it in the values of their tensors alone."""
    found = {}
    for method in all_methods():
        recipe = LINE.recipe(built, method, grid.points(method, (0.5,))[0])
        if grid.refusal(method, recipe):
            continue
        out = tmp_path / method
        LINE.write(recipe, out)
        if not found:
            LINE.check(out)
        own = {"merge_manifest.json", "README.md", "model.safetensors"}
        files = [file for file in out.rglob("*") if file.is_file() and file.name not in own]
        with Checkpoint.open(out) as written:
            found[method] = (
                {name: (meta.dtype, meta.shape) for name, meta in written.tensors.items()},
                {str(file.relative_to(out)): file.read_bytes() for file in files},
            )
            values = [written.read_tensor(name) for name in written.tensors]
        assert all(value.isfinite().all() for value in values)
        shutil.rmtree(out)
    assert len(found) == 30
    first = next(iter(found.values()))
    assert all(each == first for each in found.values())


def test_adamms_starts_from_the_base_and_ends_at_the_experts_mean(built):
    subject = LINE.subject(built)
    state = {k: v.clone() for k, v in subject._model.state_dict().items()}
    subject.put(LINE.recipe(built, "adamms", {"alpha": 0.0}))
    assert all(torch.equal(v, state[k]) for k, v in subject._model.state_dict().items())
    subject.put(LINE.recipe(built, "adamms", {"alpha": 1.0}))
    share = {k: v.clone() for k, v in subject._model.state_dict().items()}
    subject.put(LINE.recipe(built, "average", {}))
    for name, value in subject._model.state_dict().items():
        torch.testing.assert_close(share[name], value, rtol=0, atol=1e-6)
    assert any(not torch.equal(share[name], state[name]) for name in state)


def test_online_routes_by_token(built):
    """With equal experts it is the model itself; with others, only their own tokens see them."""
    ids = torch.tensor([[5, 0, 7]])
    plain = torch.nn.Linear(2, 2, bias=False)
    model = torch.nn.Module()
    model.layer = plain
    model.config = type("C", (), {"placeholders": {"image": 5, "audio": 7}})
    model.get_decoder = lambda: model
    weights = {"image": torch.full((2, 2), 1.0), "audio": torch.full((2, 2), 3.0)}
    router = online.route(model, {k: {"layer.weight": w} for k, w in weights.items()})
    with router.batch(ids):
        found = model.layer(torch.ones(1, 3, 2))
    assert found[0, :, 0].tolist() == [2.0, 4.0, 6.0]  # own, mean of both, own
    same = ComposedSubject(built)
    before = same.score("val")
    experts = online.experts_of(built, ["image"])
    for name, value in experts["image"].items():
        same._model.get_decoder().state_dict()[name].copy_(value)
    merged = same._answers("val")
    same._router = online.route(same._model, dict.fromkeys(world.MODALITIES, experts["image"]))
    assert same._answers("val") == merged
    assert set(before) == set(world.COLUMNS)


def test_alone_knows_its_models(built):
    assert set(LINE.alone(built, "audio", "val")) == set(world.COLUMNS)
    assert LINE.alone(built, BASE, "val") == LINE.subject(built).score("val")
    with pytest.raises(BenchError, match="unknown model 'smell'"):
        LINE.alone(built, "smell", "val")
    with pytest.raises(BenchError, match="holds another preset or seed"):
        LINE.build(built, preset="quick", seed=4, on_progress=lambda _: None)

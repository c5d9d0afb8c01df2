"""The shipped checkpoints load without a complaint, answer, and are small."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoImageProcessor, AutoTokenizer

from omnimerge.bench import zoo
from omnimerge.bench.teaching import IGNORED
from omnimerge.bench.zoo import lessons, miniatures, quiz, scenes, stages, training, words
from omnimerge.errors import CheckpointError

MULTIMODAL = (miniatures.TARGET, miniatures.DONOR)
KNOWN = {
    miniatures.LLM: scenes.SHARED_KINDS,
    miniatures.TARGET: (*scenes.SHARED_KINDS, *scenes.TARGET_KINDS),
    miniatures.DONOR: (*scenes.SHARED_KINDS, *scenes.DONOR_KINDS),
}
TINY = stages.Stage(3, 1e-3, batch=4, turns=2, name="tiny", kinds={"where": 1.0})


@pytest.fixture(scope="module")
def models():
    return {name: miniatures.load(name, zoo.path(name)) for name in zoo.names()}


def test_names():
    assert zoo.names() == list(miniatures.NAMES)
    assert all(zoo.describe(name) for name in zoo.names())


def test_unknown_name_suggests_a_known_one():
    with pytest.raises(CheckpointError, match="did you mean 'mini-llm'"):
        zoo.path("mini-lm")


def test_all_weights_take_at_most_eight_megabytes():
    files = [file for name in zoo.names() for file in zoo.path(name).rglob("*")]

    assert sum(file.stat().st_size for file in files) <= 8e6


@pytest.mark.parametrize("name", miniatures.NAMES)
def test_answers_what_it_was_taught(models, name):
    sheet = quiz.exam(count=8, seed=2024, kinds=KNOWN[name])

    accuracy = quiz.accuracy(sheet, quiz.answers(name, models[name], sheet))

    assert np.mean(list(accuracy.values())) >= 0.85, accuracy


@pytest.mark.parametrize("name", MULTIMODAL)
def test_does_not_know_what_the_other_was_taught(models, name):
    kinds = [kind for kind in scenes.KINDS if kind not in KNOWN[name]]
    sheet = quiz.exam(count=12, seed=2024, kinds=kinds)

    accuracy = quiz.accuracy(sheet, quiz.answers(name, models[name], sheet))

    assert np.mean(list(accuracy.values())) <= 0.4, accuracy


@pytest.mark.parametrize("name", miniatures.NAMES)
def test_names_and_dtype_are_the_published_ones(name):
    expected = {
        miniatures.LLM: {"model.layers", "model.embed_tokens", "model.norm", "lm_head.weight"},
        miniatures.TARGET: {
            *("model.layers", "model.embed_tokens", "model.norm", "lm_head.weight"),
            *("visual.blocks", "visual.merger", "visual.patch_embed"),
        },
        miniatures.DONOR: {
            *("language_model.model", "language_model.lm_head", "vision_tower.vision_model"),
            *("multi_modal_projector.linear_1", "multi_modal_projector.linear_2", "image_newline"),
        },
    }

    with safe_open(zoo.path(name) / "model.safetensors", "pt") as file:
        assert {".".join(key.split(".")[:2]) for key in file.keys()} == expected[name]  # noqa: SIM118
        assert file.metadata() == {"format": "pt"}
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.bfloat16}  # noqa: SIM118


@pytest.mark.parametrize("name", miniatures.NAMES)
def test_tokenizer_loads_as_it_was_built(name):
    built = miniatures.tokenizer(name)
    loaded = AutoTokenizer.from_pretrained(zoo.path(name))
    text = "<|im_start|>user\nwhich hue has the cross? Größe 東<|im_end|>"

    assert loaded(text)["input_ids"] == built(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert loaded.chat_template == built.chat_template
    assert len(loaded) <= words.SIZE


def test_every_word_is_one_token():
    tokenizer = miniatures.tokenizer(miniatures.LLM)

    for word in words.WORDS:
        assert len(tokenizer(word)["input_ids"]) == len(tokenizer(f" {word}")["input_ids"]) == 1


@pytest.mark.parametrize("name", MULTIMODAL)
def test_image_processor_loads_as_it_was_built(name):
    image = scenes.draw(scenes.random_scene(np.random.default_rng(0)))
    loaded = AutoImageProcessor.from_pretrained(zoo.path(name))(image, return_tensors="pt")
    built = miniatures.image_processor(name)(image, return_tensors="pt")

    assert loaded.keys() == built.keys()
    assert all(torch.equal(torch.as_tensor(loaded[k]), torch.as_tensor(built[k])) for k in built)


def test_donor_settings_beside_the_weights():
    content = json.loads((zoo.path(miniatures.DONOR) / "processor_config.json").read_text())

    assert content["num_image_tokens"] == 9
    assert content["vision_feature_select_strategy"] == "full"
    assert content["vision_aspect_ratio"] == "anyres_max_9"


@pytest.mark.parametrize("name", MULTIMODAL)
def test_lessons_are_what_the_processor_gives(name):
    taught = lessons.Lessons(name, seed=5, size=6)
    batch = taught.batch(np.random.default_rng(1), TINY)
    indices = np.random.default_rng(1).integers(6, size=TINY.batch).tolist()
    processor = miniatures.processor(name)
    chats = []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        text = processor.tokenizer.decode(ids[mask.bool()])
        turns = [turn.split("<|im_end|>")[0] for turn in text.split("<|im_start|>")[1:]]
        first = turns[0].rsplit(">", 1)[-1].removeprefix("user\n").lstrip("\n")
        chats.append(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": first}]}]
            + [
                dict(zip(("role", "content"), turn.split("\n", 1), strict=True))
                for turn in turns[1:]
            ]
        )
    rendered = [processor.apply_chat_template(chat).removesuffix("\n") for chat in chats]
    images = [scenes.draw(taught.scenes[index]) for index in indices]
    expected = processor(
        text=rendered, images=images, padding=True, padding_side="right", return_tensors="pt"
    )

    for key in batch.keys() - {"labels"}:
        assert torch.equal(batch[key], expected[key]), key


def test_labels_are_the_answers_alone():
    taught = lessons.Lessons(miniatures.LLM, seed=5, size=6)
    batch = taught.batch(np.random.default_rng(1), TINY)

    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        marked = labels != IGNORED
        assert torch.equal(ids[marked], labels[marked])
        answers = miniatures.tokenizer(miniatures.LLM).decode(labels[marked]).split("<|im_end|>")
        assert {answer.split()[0] for answer in answers[:-1]} <= set(scenes.ROWS)


def test_training_is_reproducible_and_leaves_what_is_frozen(models):
    def trained(seed):
        model = miniatures.model(miniatures.DONOR, seed=seed)
        training.put_llm(model, models[miniatures.LLM])
        taught = lessons.Lessons(miniatures.DONOR, seed=seed, size=8)
        frozen = stages.Stage(2, 1e-3, batch=4, name="s", kinds={"where": 1.0}, llm=False)
        training.train(model, taught, frozen, seed=seed)
        return model.state_dict()

    state = torch.random.get_rng_state()
    first, again, other = trained(1), trained(1), trained(2)

    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(first[key], again[key]) for key in first)
    projector = "model.multi_modal_projector.linear_1.weight"
    assert not torch.equal(first[projector], other[projector])
    assert torch.equal(first["lm_head.weight"], models[miniatures.LLM].lm_head.weight)

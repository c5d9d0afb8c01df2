"""Real, tiny, random models that answer, and whose weights are swapped."""

import functools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from omnimerge.checkpoint import Checkpoint
from omnimerge.errors import GenerationError, PromptError
from omnimerge.generate import Generator, Prompt, Response, drafting

MULTIMODAL = ["qwen2_vl", "llava_onevision"]


@pytest.fixture(scope="session")
def generators(folders):
    loaded = {}

    def get(name):
        if name not in loaded:
            loaded[name] = Generator.load(folders[name])
        return loaded[name]

    return get


def questions(images, with_images=True):
    return [
        Prompt(str(i), "what " + "is " * i, (images[i % 3],) if with_images and i % 4 else ())
        for i in range(10)
    ]


def tensors(folder, factor=1.0):
    with Checkpoint.open(folder) as checkpoint:
        for name in checkpoint.tensors:
            if "layers" in name:
                yield name, checkpoint.read_tensor(name) * factor


@pytest.mark.parametrize("name", [*MULTIMODAL, "qwen2", "qwen2_bare"])
def test_answers_do_not_depend_on_the_batch(generators, images, name):
    prompts = questions(images, with_images=name in MULTIMODAL)
    seen = []

    one = generators(name).responses(prompts, batch_size=1, max_new_tokens=6)
    eight = generators(name).responses(
        prompts,
        batch_size=8,
        max_new_tokens=6,
        on_progress=lambda done, of: seen.append((done, of)),
    )

    assert one == eight
    assert [r.id for r in one] == [p.id for p in prompts]
    assert len({r.text for r in one}) > 5
    assert all(0 <= len(r.tokens) <= 6 for r in one)
    assert seen[-1] == (10, 10)


@pytest.mark.parametrize("name", MULTIMODAL)
def test_images_change_answers_and_several_can_be_shown(generators, images, name):
    prompts = [
        Prompt("a", "what", (images[0],)),
        Prompt("b", "what", (images[2],)),
        Prompt("c", "what", (images[0], images[1])),
    ]
    answers = generators(name).responses(prompts, max_new_tokens=6)
    assert len({r.tokens for r in answers}) == 3


def test_answers_are_the_plain_argmax(generators, images):
    """The tiny checkpoint asks for sampling and a repetition penalty; neither is used."""
    generator = generators("qwen2_vl")
    prompt = Prompt("1", "what", (images[1],))
    inputs = generator.processor.encode([prompt])
    with torch.inference_mode():
        logits = generator.model(**inputs).logits[0, -1]

    [answer] = generator.responses([prompt], max_new_tokens=1)

    assert answer.tokens == (int(logits.argmax()),)
    assert generator.model.dtype == torch.float32


def test_nothing_is_written_to_the_terminal(folders, images, capfd):
    Generator.load(folders["qwen2_vl"]).responses(questions(images)[:2], max_new_tokens=2)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", [*MULTIMODAL, "qwen2", "qwen2_vl_tied"])
def test_set_weights_changes_and_restores_answers(folders, generators, images, name):
    generator = generators(name)
    prompts = questions(images, with_images=name != "qwen2")
    before = generator.responses(prompts, max_new_tokens=4)

    generator.set_weights(tensors(folders[name], 1.5))
    changed = generator.responses(prompts, max_new_tokens=4)
    generator.set_weights(tensors(folders[name]))

    assert changed != before
    assert generator.responses(prompts, max_new_tokens=4) == before


def test_set_weights_equals_loading_the_same_weights(folders, images, tmp_path):
    folder = shutil.copytree(folders["llava_onevision"], tmp_path / "changed")
    stored = load_file(folder / "model.safetensors")
    changed = dict(tensors(folder, 0.5))
    save_file({**stored, **changed}, folder / "model.safetensors", metadata={"format": "pt"})
    prompts = questions(images)

    swapped = Generator.load(folders["llava_onevision"])
    swapped.set_weights(changed.items())

    expected = Generator.load(folder).responses(prompts, max_new_tokens=4)
    assert swapped.responses(prompts, max_new_tokens=4) == expected


def test_set_weights_rounds_to_the_run_dtype(folders):
    generator = Generator.load(folders["qwen2"], dtype="bfloat16")
    [(name, tensor)] = [(n, t) for n, t in tensors(folders["qwen2"]) if "0.mlp.up_proj" in n]
    generator.set_weights([(name, tensor.float() + 1e-4)])
    held = generator.model.state_dict()[name]
    assert held.dtype == torch.bfloat16
    assert torch.equal(held, (tensor.float() + 1e-4).to(torch.bfloat16))


def test_set_weights_refuses_what_does_not_fit(folders):
    generator = Generator.load(folders["qwen2_vl"])
    given = dict(tensors(folders["qwen2_vl"]))
    name, other = sorted(given)[:2]
    with pytest.raises(GenerationError, match=r"has no parameter 'model.layers.0.nom.weight'"):
        generator.set_weights([("model.layers.0.nom.weight", torch.zeros(32))])
    with pytest.raises(GenerationError, match=r"has shape \(3,\), the model's parameter \(32,\)"):
        generator.set_weights([(name, torch.zeros(3))])
    generator.set_weights([(name, given[name]), (other, given[other])])
    with pytest.raises(GenerationError, match="1 tensors set before were not set again"):
        generator.set_weights([(name, given[name])])


def test_two_different_tensors_for_one_tied_parameter_are_noticed(folders, tmp_path):
    folder = shutil.copytree(folders["qwen2_vl_tied"], tmp_path / "both")
    stored = load_file(folder / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    generator = Generator.load(folder)
    embed = stored["model.embed_tokens.weight"]
    generator.set_weights([("model.embed_tokens.weight", embed), ("lm_head.weight", embed)])
    with pytest.raises(GenerationError, match="does not hold the tensor that was given"):
        generator.set_weights([("model.embed_tokens.weight", embed), ("lm_head.weight", embed * 2)])


def test_answers_come_as_they_are_there(generators, images):
    prompts = questions(images)
    expected = generators("qwen2_vl").responses(prompts, max_new_tokens=4)
    before = generators("qwen2_vl").stats.samples_answered
    found = generators("qwen2_vl").responses_iter(prompts, max_new_tokens=4, batch_size=3)
    first = next(found)
    assert generators("qwen2_vl").stats.samples_answered == before + 3
    assert sorted([first, *found]) == list(enumerate(expected))


def test_the_terminal_is_the_callers_between_answers(generators, images):
    import warnings

    found = generators("qwen2_vl").responses_iter(questions(images), max_new_tokens=2)
    next(found)
    with pytest.warns(UserWarning, match="mine"):
        warnings.warn("mine", UserWarning, stacklevel=1)


def limited(generator, fits, monkeypatch):
    """Let the model fail on batches of more than `fits`."""
    original = generator.model.forward

    @functools.wraps(original)
    def forward(input_ids=None, **kwargs):
        if len(input_ids) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return original(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(generator.model, "forward", forward)


@pytest.mark.parametrize("batch_size", [None, 8])
@pytest.mark.parametrize("drafted", [False, True])
def test_batches_shrink_until_they_fit(folders, images, monkeypatch, batch_size, drafted):
    prompts = questions(images)
    generator = Generator.load(folders["qwen2_vl"])
    expected = generator.responses(prompts, max_new_tokens=6)
    drafts = [Response(r.id, "", (*r.tokens[:3], 300, 301, 302)) for r in expected]
    limited(generator, 2, monkeypatch)
    monkeypatch.setattr(drafting, "SHORTEST_MEAN", 0.0)
    seen = []

    found = generator.responses(
        prompts,
        max_new_tokens=6,
        batch_size=batch_size,
        on_progress=lambda done, of: seen.append((done, of)),
        drafts=drafts if drafted else None,
    )

    assert found == expected
    assert seen[-1] == (10, 10)
    assert generator.stats.batches_halved >= 2
    halved = generator.stats.batches_halved
    assert generator.responses(prompts, max_new_tokens=6, batch_size=batch_size) == expected
    assert generator.stats.batches_halved == halved  # what does not fit is not tried again


def test_answers_before_one_that_does_not_fit_are_given(folders, monkeypatch):
    generator = Generator.load(folders["qwen2"])
    prompts = [Prompt(str(i), "what " * (i + 1)) for i in range(4)]
    expected = generator.responses(prompts, max_new_tokens=2)
    original = generator.model.forward
    short = int(generator.processor.encode([prompts[0]])["input_ids"].shape[1])

    def forward(input_ids=None, **kwargs):
        if input_ids.shape[1] == short:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return original(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(generator.model, "forward", forward)
    found = []
    with pytest.raises(GenerationError, match=r"prompt '0' does not fit into memory by itself"):
        found.extend(generator.responses_iter(prompts, max_new_tokens=2, batch_size=1))
    assert sorted(found) == [(i, expected[i]) for i in (1, 2, 3)]


def test_inputs_are_made_once(folders, images, monkeypatch):
    generator = Generator.load(folders["qwen2_vl"])
    prompts, calls = questions(images), []
    encode = generator.processor.encode
    monkeypatch.setattr(
        generator.processor, "encode", lambda *given: calls.append(given) or encode(*given)
    )
    made = []
    for factor in (1.0, 1.2, 1.5):
        generator.set_weights(tensors(folders["qwen2_vl"], factor))
        generator.responses(prompts, max_new_tokens=3, batch_size=4)
        made.append(len(calls))
    assert made[0] == made[2] == generator.stats.inputs_encoded
    generator.responses(prompts[:3], max_new_tokens=3, batch_size=4)
    assert len(calls) > made[0]  # other batches


def test_without_memory_everything_is_made_anew(folders, images):
    forgetful = Generator.load(folders["qwen2_vl"], cache_bytes=0)
    usual = Generator.load(folders["qwen2_vl"])
    prompts = questions(images)
    for factor in (1.0, 1.2, 1.5):
        for generator in (forgetful, usual):
            generator.set_weights(tensors(folders["qwen2_vl"], factor))
        found = [g.responses(prompts, max_new_tokens=3) for g in (forgetful, usual)]
        assert found[0] == found[1]
    assert (forgetful.stats.inputs_reused, forgetful.stats.features_reused) == (0, 0)
    assert usual.stats.inputs_reused > 0
    assert usual.stats.features_reused > 0
    assert forgetful.stats.to_dict().keys() == usual.stats.to_dict().keys()
    assert "refusal" not in usual.stats.to_dict()


def matrices(folder, factor):
    return [(n, t) for n, t in tensors(folder, factor) if t.ndim == 2]


def test_weights_that_do_not_reach_the_logits_are_noticed(folders):
    generator = Generator.load(folders["qwen2"])
    prompts = [Prompt("long", "what is this"), Prompt("short", "what")]
    generator.set_weights(matrices(folders["qwen2"], 1.0))
    for module in generator.model.modules():
        if isinstance(module, torch.nn.Linear):
            stale = module.weight.clone()
            module.forward = lambda x, own=module, stale=stale: torch.nn.functional.linear(
                x, own.weight * 0 + stale, own.bias
            )
    generator.responses(prompts, max_new_tokens=2)
    generator.set_weights(matrices(folders["qwen2"], 1.0))
    generator.responses(prompts, max_new_tokens=2)  # the same weights: nothing to see
    generator.set_weights(matrices(folders["qwen2"], 1.2))
    with pytest.raises(GenerationError, match=r"matrices have changed, but .* prompt 'short'"):
        generator.responses(prompts, max_new_tokens=2)


def test_the_canary_is_silent_where_logits_need_not_change(folders):
    generator = Generator.load(folders["qwen2"])
    prompts = [Prompt("short", "what")]
    given = dict(tensors(folders["qwen2"]))
    embed = "model.embed_tokens.weight"
    with Checkpoint.open(folders["qwen2"]) as checkpoint:
        words = checkpoint.read_tensor(embed)
    other = words.clone()
    other[200:] += 1  # words that no prompt has
    for values in (words, other, words):
        generator.set_weights([*given.items(), (embed, values)])
        generator.responses(prompts, max_new_tokens=2)
    generator.set_weights([*((n, t * 2) for n, t in given.items()), (embed, words)])
    generator.set_weights([*given.items(), (embed, words)])  # there and back
    generator.responses(prompts, max_new_tokens=2)
    nothing = {n: t * float("nan") for n, t in given.items()}
    for _ in range(2):
        generator.set_weights([*nothing.items(), (embed, words)])
        generator.responses(prompts, max_new_tokens=2)
        nothing = {n: -t for n, t in nothing.items()}


def test_a_swap_that_fails_half_way_is_forgotten(folders, images):
    generator = Generator.load(folders["qwen2_vl"])
    prompts = questions(images)
    for factor in (1.0, 1.1):
        generator.set_weights(tensors(folders["qwen2_vl"], factor))
        generator.responses(prompts, max_new_tokens=2)
    with pytest.raises(GenerationError, match="no parameter"):
        generator.set_weights([*tensors(folders["qwen2_vl"], 2.0), ("none", torch.zeros(1))])
    generator.set_weights(tensors(folders["qwen2_vl"], 1.2))
    expected = Generator.load(folders["qwen2_vl"])
    expected.set_weights(tensors(folders["qwen2_vl"], 1.2))
    found = [g.responses(prompts, max_new_tokens=4) for g in (generator, expected)]
    assert found[0] == found[1]


def test_corrupt_image_is_named(generators, images, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(images[0].read_bytes()[:300])
    prompts = [Prompt("good", "what", (images[0],)), Prompt("bad", "what", (broken,))]
    with pytest.raises(PromptError, match=r"prompt 'bad': image .*broken\.png cannot be decoded"):
        generators("qwen2_vl").responses(prompts)


def test_image_for_a_text_model_is_refused(generators, images):
    with pytest.raises(GenerationError, match=r"prompt '1' has an image, but .* text-only"):
        generators("qwen2").responses([Prompt("1", "what", (images[0],))])


def test_numbers_below_one_are_refused(generators):
    with pytest.raises(GenerationError, match="must be at least 1"):
        generators("qwen2").responses([Prompt("1", "what")], max_new_tokens=0)


def test_missing_chat_template(folders, tmp_path):
    folder = shutil.copytree(folders["qwen2_vl"], tmp_path / "no_template")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(
        GenerationError, match=r"has no chat template; add its chat_template\.jinja"
    ):
        Generator.load(folder)


def test_template_without_a_place_for_images(folders, images, tmp_path):
    folder = shutil.copytree(folders["qwen2_vl"], tmp_path / "text_template")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}{% endfor %}")
    generator = Generator.load(folder)
    with pytest.raises(GenerationError, match="has no place for images"):
        generator.responses([Prompt("1", "what", (images[0],))])


def test_missing_processor_files(folders, tmp_path):
    folder = shutil.copytree(folders["qwen2_vl"], tmp_path / "no_processor")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(GenerationError, match=r"processor.*published with the model"):
        Generator.load(folder)


def test_missing_tokenizer_or_folder(folders, tmp_path):
    folder = shutil.copytree(folders["qwen2"], tmp_path / "no_tokenizer")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(GenerationError, match="has no tokenizer"):
        Generator.load(folder)
    with pytest.raises(GenerationError, match=r"nowhere has no config\.json"):
        Generator.load(tmp_path / "nowhere")


@pytest.mark.parametrize("kind", ["missing", "unexpected"])
def test_tensors_that_do_not_fit_are_listed(folders, tmp_path, kind):
    folder = shutil.copytree(folders["llava_onevision"], tmp_path / kind)
    stored = load_file(folder / "model.safetensors")
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    moved = stored.pop(name) if kind == "missing" else stored[name].clone()
    if kind == "unexpected":
        stored[name.replace("layers.1", "layers.7")] = moved
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GenerationError, match=rf"1 {kind} \(.*mlp\.up_proj\.weight\)"):
        Generator.load(folder)


def test_wrong_shapes_dtypes_devices_and_models(folders, tmp_path):
    folder = shutil.copytree(folders["qwen2"], tmp_path / "shape")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 80}))
    with pytest.raises(GenerationError, match=r"6 mismatched \(.*mlp\.up_proj\.weight"):
        Generator.load(folder)
    with pytest.raises(GenerationError, match="unknown dtype 'int8'"):
        Generator.load(folders["qwen2"], dtype="int8")
    with pytest.raises(GenerationError, match="device 'nowhere' cannot be used here"):
        Generator.load(folders["qwen2"], device="nowhere")
    (folder / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(GenerationError, match=r"'clip' .* does not generate text"):
        Generator.load(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
    with pytest.raises(GenerationError, match="cannot read the config"):
        Generator.load(folder)

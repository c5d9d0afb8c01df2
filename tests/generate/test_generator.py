"""Real, tiny, random models that answer, and whose weights are swapped."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from omnimerge.checkpoint import Checkpoint
from omnimerge.errors import GenerationError, PromptError
from omnimerge.generate import Generator, Prompt

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
    with pytest.raises(GenerationError, match="on nowhere"):
        Generator.load(folders["qwen2"], device="nowhere")
    (folder / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(GenerationError, match=r"'clip' .* does not generate text"):
        Generator.load(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
    with pytest.raises(GenerationError, match="cannot read the config"):
        Generator.load(folder)

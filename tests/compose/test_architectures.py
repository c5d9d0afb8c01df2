"""Parts of many architectures: a composed model of one of them computes what that one does."""

import shutil

import pytest
import tiny_inputs
import tiny_multimodal
import torch
from click.testing import CliRunner
from transformers import AutoModel, AutoModelForMultimodalLM

from omnimerge.cli import main
from omnimerge.compose.configuration import OmniConfig, plain
from omnimerge.compose.modeling import OmniForConditionalGeneration
from omnimerge.compose.source import Source
from omnimerge.generate.quiet import quiet

COMPOSED = [
    "qwen2_vl", "qwen2_5_vl", "qwen3_5", "glm4v", "llava", "vipllava", "llava_next",
    "llava_onevision", "internvl", "idefics2", "idefics3", "smolvlm", "mistral3", "qwen2_audio",
    "fuyu",
]  # fmt: skip
GIVES_MORE = {
    "qwen3_vl": "deepstack",
    "qwen3_vl_moe": "deepstack",
    "mllama": "attends to features across",
    "gemma3": "in both directions",
    "paligemma": "in both directions",
    "chameleon": "tokens of its own vocabulary",
}

DEEPSTACK, SCALED = "(deepstack)", "changed by logit_scale"
OWN_WORDS = "tokens of its own vocabulary"
# The types of `tiny_multimodal` that are composed with nothing; all others are.
REFUSED = {
    "qwen3_vl": DEEPSTACK,
    "qwen3_vl_moe": DEEPSTACK,
    "qwen3_omni_moe_thinker": DEEPSTACK,
    "gemma3": "in both directions",
    "paligemma": "in both directions",
    "mllama": "offers no image, audio or video features",
    "phi4_multimodal": "offers no image, audio or video features",
    "instructblip": "offers no image, audio or video features",
    "cohere2_vision": SCALED,
    "aya_vision": SCALED,
    "blip-2": "its language model and the head in one",
    "llama4": "its language model and the head in one",
    "paddleocr_vl": "would not load",
    "chameleon": OWN_WORDS,
    "emu3": OWN_WORDS,
}


def source(name, folder):
    with quiet():
        model = tiny_multimodal.build(name)
        model.save_pretrained(folder)
    return model.eval(), Source.open(folder)


@pytest.mark.parametrize("name", COMPOSED)
def test_one_part_gives_the_logits_of_its_model(name, tmp_path):
    model, found = source(name, tmp_path)
    assert found.offers
    assert found.obstacle() == ""
    places = {k: {"id": v, "native": v} for k, v in found.placeholders.items() if k in found.offers}
    part = {"config": plain(found.config), "provides": list(places), "placeholders": places}
    text = plain(found.config.get_text_config(decoder=True))
    with torch.random.fork_rng():
        composed = OmniForConditionalGeneration(OmniConfig(text_config=text, parts={"p": part}))
    state = {"lm_head.weight": model.get_output_embeddings().weight}
    for key, value in model.base_model.state_dict().items():
        inside = key.startswith(found.decoder)
        llm = f"model.language_model.{key.removeprefix(found.decoder)}"
        state[llm if inside else f"model.parts.p.model.{key}"] = value
    outcome = composed.load_state_dict(state, strict=False)
    assert outcome.unexpected_keys == []
    assert outcome.missing_keys == []
    inputs = tiny_inputs.inputs(name)
    own = ("input_ids", "attention_mask", "mm_token_type_ids")
    ours = {k if k in own else f"p_{k}": v for k, v in inputs.items() if k != own[2]}
    with torch.inference_mode():
        wanted = model(**inputs).logits
        given = composed.eval()(**ours).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(given[real], wanted[real], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "reason"), GIVES_MORE.items())
def test_what_gives_its_llm_more_than_embeddings_is_refused(name, reason, tmp_path):
    _, found = source(name, tmp_path)
    assert reason in found.obstacle()


@pytest.fixture(scope="module")
def published(part, tmp_path_factory):
    """A function: type -> folder of a checkpoint as published, with files of a processor."""
    root = tmp_path_factory.mktemp("types")

    def get(name):
        folder = root / name
        if not folder.exists():
            with quiet():
                tiny_multimodal.save(name, folder)
            kind = "qwen2_audio" if Source.open(folder).offers == ("audio",) else "qwen2_vl"
            for file in part(kind).iterdir():
                if file.suffix != ".safetensors" and not (folder / file.name).exists():
                    shutil.copy(file, folder)
        return folder

    return get


def compose(folder, out):
    """Compose a model of one model's tower and language model, as the command does."""
    recipe = out.with_suffix(".yaml")
    recipe.write_text(f"{{method: passthrough, target: {folder}, models: [{folder}]}}")
    with quiet():
        return CliRunner().invoke(main, ["compose", str(recipe), "-o", str(out)])


def loaded(folder, auto=AutoModelForMultimodalLM):
    with quiet():
        model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert {key: value for key, value in info.items() if value} == {}
    return model


@pytest.mark.parametrize("name", tiny_multimodal.BUILDERS)
def test_every_type_is_composed_and_loads_or_is_refused_in_one_line(name, published, tmp_path):
    folder, out = published(name), tmp_path / "out"
    result = compose(folder, out)
    if name in REFUSED:
        assert result.exit_code == 1
        assert REFUSED[name] in result.output
        assert "Traceback" not in result.output
        assert len(result.output.strip().splitlines()) <= 2  # `cannot merge:` and the reason
        assert not out.exists()
    else:
        assert result.exit_code == 0, result.output
        loaded(out)


def test_experts_are_loaded_and_saved_by_the_rules_of_their_model(published, tmp_path):
    folder = published("glm4v_moe")
    assert compose(folder, tmp_path / "out").exit_code == 0
    composed, original = loaded(tmp_path / "out"), tiny_multimodal.load("glm4v_moe", folder)
    ours, theirs = composed.model.language_model.state_dict(), original.get_decoder().state_dict()
    assert any("experts.gate_up_proj" in name for name in ours)
    kept = {name: t for name, t in theirs.items() if "embed_tokens" not in name}
    assert all(torch.equal(ours[name], tensor) for name, tensor in kept.items())
    with quiet():
        base, info = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert {k: v for k, v in info.items() if v} == {"unexpected_keys": {"lm_head.weight"}}
        assert all(torch.equal(t, ours[k]) for k, t in base.language_model.state_dict().items())
        composed.save_pretrained(tmp_path / "again")
        fresh = OmniForConditionalGeneration(composed.config)
        with torch.device("meta"):
            OmniForConditionalGeneration(OmniConfig())  # which has no experts
        fresh.load_state_dict(composed.state_dict())
        fresh.save_pretrained(tmp_path / "fresh")
    for saved in ("again", "fresh"):
        found = loaded(tmp_path / saved).state_dict()
        assert all(torch.equal(found[name], value) for name, value in composed.state_dict().items())


def test_a_config_names_no_class_outside_of_transformers(monkeypatch):
    from omnimerge.compose.text import text_model

    config = tiny_multimodal._llama()
    with pytest.raises(ValueError, match="has no model 'nn'"):
        text_model(config, "nn")
    monkeypatch.setattr(type(config), "__module__", "os.path")
    with pytest.raises(ValueError, match="is no module of transformers"):
        text_model(config, "join")

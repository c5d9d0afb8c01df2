"""Parts of many architectures: a composed model of one of them computes what that one does."""

import pytest
import tiny_inputs
import tiny_multimodal
import torch

from omnimerge.compose.configuration import OmniConfig, plain
from omnimerge.compose.modeling import OmniForConditionalGeneration
from omnimerge.compose.source import Source
from omnimerge.generate.quiet import quiet

COMPOSED = [
    "qwen2_vl", "qwen2_5_vl", "qwen3_5", "glm4v", "llava", "vipllava", "llava_next",
    "llava_onevision", "internvl", "idefics2", "idefics3", "smolvlm", "mistral3", "qwen2_audio",
]  # fmt: skip
REFUSED = {
    "qwen3_vl": "deepstack",
    "qwen3_vl_moe": "deepstack",
    "mllama": "attends to features across",
    "gemma3": "in both directions",
    "paligemma": "in both directions",
    "chameleon": "tokens of its own vocabulary",
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


@pytest.mark.parametrize(("name", "reason"), REFUSED.items())
def test_what_gives_its_llm_more_than_embeddings_is_refused(name, reason, tmp_path):
    _, found = source(name, tmp_path)
    assert reason in found.obstacle()

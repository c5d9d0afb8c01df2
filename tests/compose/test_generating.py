"""Generation with media: beams, several answers, chunks, caches, tokens that look like media."""

import pytest
import torch
from transformers import AutoModelForMultimodalLM, AutoProcessor, LogitsProcessorList

import omnimerge
from omnimerge.generate.quiet import quiet

TURN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
SEEN = "<|vision_start|><|image_pad|><|vision_end|>"


def load(folder):
    with quiet():
        model = AutoModelForMultimodalLM.from_pretrained(folder, dtype=torch.float32)
        return model.eval(), AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def llava_omni(omni):
    return load(omni[0])


@pytest.fixture(scope="module")
def mrope_omni(qwen_omni):
    return load(qwen_omni[0])


def encode(processor, texts, **media):
    given = {key: value for key, value in media.items() if value}
    return processor(text=texts, return_tensors="pt", padding=True, padding_side="left", **given)


def answers(model, inputs, tokens=6, **options):
    made = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, eos_token_id=None,
                          pad_token_id=0, **options)  # fmt: skip
    return made[:, inputs["input_ids"].shape[1] :]


def test_beams_over_pictures_are_those_of_the_original(part, tmp_path, media):
    folder = part("qwen2_vl")
    recipe = {"method": "passthrough", "models": [folder], "target": folder}
    omnimerge.compose(recipe, tmp_path / "omni")
    model, processor = load(tmp_path / "omni")
    with quiet():
        original = AutoModelForMultimodalLM.from_pretrained(folder, dtype=torch.float32).eval()
    images = [media.image(56), media.image(28)]  # grids of other sizes: 16 patches and 4
    inputs = encode(processor, [TURN.format(f"{SEEN}x{SEEN}?")], images=images)
    theirs = {key.removeprefix("image_video_"): value for key, value in inputs.items()}
    theirs["mm_token_type_ids"] = (inputs["input_ids"] == original.config.image_token_id).int()
    asked = {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 3, "do_sample": False,
             "eos_token_id": None, "pad_token_id": 0}  # fmt: skip
    more = {"output_scores": True, "return_dict_in_generate": True}
    wanted, found = (
        m.generate(**i, **asked, **more) for m, i in ((original, theirs), (model, inputs))
    )
    assert torch.equal(found.sequences, wanted.sequences)
    torch.testing.assert_close(found.sequences_scores, wanted.sequences_scores, atol=1e-5, rtol=0)


def three_prompts(processor, media, side):
    image, audio = processor.placeholders["image"], processor.placeholders["audio"]
    texts = [TURN.format(f"{image}a{audio}{image}b"), TURN.format("no media")]
    texts += [TURN.format(f"{audio}{image}longer than the others?")]
    images = [media.image(side) for _ in range(3)]
    return texts, images, [media.sound(), media.sound(3000)]


@pytest.mark.parametrize(("name", "side"), [("llava_omni", 28), ("mrope_omni", 56)])
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_beams_and_several_answers_are_those_of_each_prompt_alone(
    request, media, name, side, options
):
    model, processor = request.getfixturevalue(name)
    texts, images, sounds = three_prompts(processor, media, side)
    together = answers(model, encode(processor, texts, images=images, audio=sounds), **options)
    alone = [
        encode(processor, texts[:1], images=images[:2], audio=sounds[:1]),
        encode(processor, texts[1:2]),
        encode(processor, texts[2:], images=images[2:], audio=sounds[1:]),
    ]
    assert torch.equal(together, torch.cat([answers(model, each, **options) for each in alone]))


@pytest.mark.parametrize(("name", "side"), [("llava_omni", 28), ("mrope_omni", 56)])
def test_copies_of_a_prompt_see_what_it_sees(request, media, name, side):
    model, processor = request.getfixturevalue(name)
    texts, images, sounds = three_prompts(processor, media, side)
    inputs = encode(processor, texts, images=images, audio=sounds)
    ids, others = model._expand_inputs_for_generation(expand_size=2, **inputs)
    with torch.inference_mode():
        single = model(**inputs).logits
        copies = model(input_ids=ids, **others).logits
    real = inputs["attention_mask"].bool()
    for number in (0, 1):
        torch.testing.assert_close(copies[number::2][real], single[real], atol=1e-5, rtol=0)


def says(token, at):
    """Makes the model say a token at a place."""

    def force(ids, scores):
        if ids.shape[1] == at:
            scores = torch.full_like(scores, -1e9)
            scores[:, token] = 0
        return scores

    return LogitsProcessorList([force])


@pytest.mark.parametrize(("name", "side"), [("llava_omni", 28), ("mrope_omni", 56)])
def test_a_placeholder_that_the_model_says_is_a_word(request, media, name, side, monkeypatch):
    model, processor = request.getfixturevalue(name)
    place, token = processor.placeholders["image"], model.config.placeholders["image"]
    inputs = encode(processor, [TURN.format(f"{place}hi")], images=[media.image(side)])
    runs = []
    tower = model.model.parts["image"].forward
    monkeypatch.setattr(
        model.model.parts["image"], "forward", lambda *a: runs.append(1) or tower(*a)
    )
    forced = says(token, inputs["input_ids"].shape[1] + 1)
    found = answers(model, inputs, logits_processor=forced)
    assert int(found[0, 1]) == token
    assert len(runs) < 7  # not with every token
    without = answers(model, inputs, logits_processor=forced, use_cache=False)
    assert torch.equal(found, without)


@pytest.mark.parametrize(("name", "side"), [("llava_omni", 28), ("mrope_omni", 56)])
def test_a_prompt_in_chunks_is_answered_as_one(request, media, name, side):
    model, processor = request.getfixturevalue(name)
    texts, images, sounds = three_prompts(processor, media, side)
    inputs = encode(processor, texts, images=images, audio=sounds)
    whole = answers(model, inputs)
    for size in (1, 8):
        assert torch.equal(answers(model, inputs, prefill_chunk_size=size), whole)


@pytest.mark.parametrize(("name", "side"), [("llava_omni", 28), ("mrope_omni", 56)])
def test_a_static_cache_gives_the_same_answers(request, media, name, side):
    model, processor = request.getfixturevalue(name)
    texts, images, sounds = three_prompts(processor, media, side)
    inputs = encode(processor, texts, images=images, audio=sounds)
    static = answers(model, inputs, cache_implementation="static")
    assert torch.equal(static, answers(model, inputs))


@pytest.mark.parametrize(("name", "side"), [("llava_omni", 28), ("mrope_omni", 56)])
def test_a_cached_chat_goes_on_with_another_picture(request, media, name, side):
    model, processor = request.getfixturevalue(name)
    place = processor.placeholders["image"]
    first, second = media.image(side), media.image(side)
    begun = encode(processor, [TURN.format(f"{place}a")], images=[first])
    made = model.generate(**begun, max_new_tokens=3, do_sample=False, eos_token_id=None,
                          pad_token_id=0, return_dict_in_generate=True)  # fmt: skip
    more = encode(processor, [TURN.format(f"b{place}c")], images=[second])
    ids = torch.cat([made.sequences, more["input_ids"]], dim=1)
    mask = torch.ones_like(ids)
    new = {name: value for name, value in more.items() if name.startswith("image_")}
    both = {name: torch.cat([begun[name], value]) for name, value in new.items()}
    gone_on = model.generate(
        input_ids=ids, attention_mask=mask, past_key_values=made.past_key_values, **new,
        max_new_tokens=1, do_sample=False, eos_token_id=None, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    with torch.inference_mode():
        wanted = model(input_ids=ids, attention_mask=mask, **both).logits[0, -1]
    torch.testing.assert_close(gone_on.logits[0][0], wanted, atol=1e-5, rtol=0)

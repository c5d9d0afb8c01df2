"""A composed model computes what its parts would: alone, together, in batches, with M-RoPE."""

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

import omnimerge
from omnimerge.compose.part_processor import PartProcessor
from omnimerge.compose.source import Source
from omnimerge.generate.quiet import quiet

TURN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def load(folder, auto=AutoModelForMultimodalLM):
    with quiet():
        model, info = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        processor = AutoProcessor.from_pretrained(folder) if auto is not AutoModelForCausalLM else 0
    assert {key: value for key, value in info.items() if value} == {}
    return model.eval(), processor


def original(folder, kind):
    """A published model and its own processor, given a way to see videos."""
    with quiet():
        model = AutoModelForMultimodalLM.from_pretrained(folder, dtype=torch.float32).eval()
    source = Source.open(folder)
    token = PartProcessor.load(folder, {}, {}).inner.tokenizer.convert_ids_to_tokens(
        source.placeholders[kind]
    )
    return model, PartProcessor.load(folder, {kind: token}, {}).inner, token


def shown(media, kind, **options):
    if kind == "image":
        return {"images": [media.image(**options)]}
    if kind == "audio":
        return {"audio": [media.sound()]}
    return {"videos": [media.video(**options)]}


SINGLE = [
    ("llava", "image", {}),
    ("qwen2_audio", "audio", {}),
    ("video_llava", "video", {}),
    ("video_llava", "image", {}),
    ("llava_next_video", "video", {"side": 56}),
    ("llava_next_video", "image", {"side": 56}),
    ("qwen2_vl", "image", {"side": 56}),
    ("qwen2_vl", "video", {"side": 56, "frames": 3}),
]


@pytest.mark.parametrize(("name", "kind", "options"), SINGLE, ids=lambda v: str(v) if v else "")
def test_one_model_with_its_own_llm_gives_its_own_logits(
    part, tmp_path, media, name, kind, options
):
    folder = part(name)
    recipe = {"method": "passthrough", "models": [folder], "target": folder}
    omnimerge.compose(recipe, tmp_path / "omni")
    composed, processor = load(tmp_path / "omni")
    model, theirs, token = original(folder, kind)
    given = shown(media, kind, **options)
    text = TURN.format(f"{token}\nwhat?")
    ours = processor(text=[text], return_tensors="pt", **given)
    if kind == "video":
        given["videos_kwargs"] = {"do_sample_frames": False}
    inputs = theirs(text=[text], return_tensors="pt", **given)
    inputs = {key.replace("_images", ""): value for key, value in inputs.items()}
    if name == "qwen2_audio":
        inputs["feature_attention_mask"] = inputs["feature_attention_mask"].long()
    with torch.inference_mode():
        wanted = model(**{k: v for k, v in inputs.items() if k != "num_audio_tokens"}).logits
        found = composed(**ours).logits
    assert ours["input_ids"].shape == inputs["input_ids"].shape
    torch.testing.assert_close(found[..., : wanted.shape[-1]], wanted, atol=1e-5, rtol=0)
    plain = theirs.tokenizer(TURN.format("hello"), return_tensors="pt")
    with torch.inference_mode():
        assert (composed(**plain).logits - model(**plain).logits).abs().max() < 1e-5


def heard(model, processor, sound):
    """The features of one sound, by the audio model's own modules."""
    inputs = processor(text=["<|AUDIO|>"], audio=[sound], return_tensors="pt")
    lengths = model.model.audio_tower._get_feat_extract_output_lengths(
        inputs["feature_attention_mask"].sum(-1)
    )
    keep = torch.arange(50)[None] < lengths[0][:, None]
    hidden = torch.zeros(1, 1, 50, 50).masked_fill(~keep[:, None, None, :], float("-inf"))
    states = model.model.audio_tower(inputs["input_features"], attention_mask=hidden)
    features = model.model.multi_modal_projector(states.last_hidden_state)
    return features[0, : int(lengths[1])]


def test_two_modalities_equal_embeddings_put_together_by_hand(part, omni, media, tmp_path):
    folder, plan = omni
    composed, processor = load(folder)
    image, sound = media.image(), media.sound()
    text = TURN.format("<image>\nAudio 1: <|audio_bos|><|AUDIO|><|audio_eos|>\nsame?")
    inputs = processor(text=[text], images=[image], audio=[sound], return_tensors="pt")
    seeing, eyes, _ = original(part("llava"), "image")
    hearing, ears, _ = original(part("qwen2_audio"), "audio")
    pixels = eyes(text=["<image>"], images=[image], return_tensors="pt")["pixel_values"]
    # The merged LLM, written by `merge` from the same recipe.
    merged = {**plan.recipe.merge.model_dump(exclude_unset=True), "select": "language_model"}
    omnimerge.merge(merged, tmp_path / "llm")
    llm = load(tmp_path / "llm", AutoModelForCausalLM)[0]
    ids, place = inputs["input_ids"][0], composed.config.placeholders
    own, token = hearing.get_input_embeddings().weight, processor.tokenizer.convert_ids_to_tokens
    with torch.inference_mode():
        embeds = llm.get_input_embeddings()(ids)
        embeds[ids == place["image"]] = torch.cat(
            seeing.model.get_image_features(pixels).pooler_output
        )
        embeds[ids == place["audio"]] = heard(hearing, ears, sound)
        for row in (ids >= 260).nonzero().flatten().tolist():
            if "audio_" in token(int(ids[row])):  # the audio model's own rows
                embeds[row] = own[ears.tokenizer.convert_tokens_to_ids(token(int(ids[row])))]
        wanted = llm(inputs_embeds=embeds[None]).logits
        found = composed(**inputs).logits
        others = composed(**{**inputs, "image_pixel_values": -pixels}).logits
    # Rows of the head that the parts brought are theirs, all others are the merged LLM's.
    torch.testing.assert_close(found[..., :260], wanted[..., :260], atol=1e-5, rtol=0)
    assert (found - others).abs().max() > 1e-3


def test_saved_and_loaded_again_it_gives_the_same_bits(omni, media, tmp_path):
    model, processor = load(omni[0])
    with quiet():
        model.save_pretrained(tmp_path / "again", max_shard_size="100KB")
    processor.save_pretrained(tmp_path / "again")
    again, processor_again = load(tmp_path / "again", AutoModelForImageTextToText)
    text = TURN.format("<video><image><|AUDIO|>?")
    given = {"images": [media.image()], "audio": [media.sound()], "videos": [media.video()]}
    first = processor(text=[text], return_tensors="pt", **given)
    second = processor_again(text=[text], return_tensors="pt", **given)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    with torch.inference_mode():
        assert torch.equal(model(**first).logits, again(**second).logits)
        base = AutoModel.from_pretrained(tmp_path / "again", dtype=torch.float32).eval()
        hidden = base(**first).last_hidden_state
        assert torch.equal(again.lm_head(hidden), again(**first).logits)


def ask(model, processor, texts, **given):
    inputs = processor(text=texts, return_tensors="pt", padding=True, **given)
    made = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None,
                          pad_token_id=0)  # fmt: skip
    return made[:, inputs["input_ids"].shape[1] :]


def mixed_batch(processor, media, side=28):
    processor.tokenizer.padding_side = "left"
    place = processor.placeholders
    texts = [
        TURN.format(f"{place['image']}{place['audio']}a long question about both?"),
        TURN.format(f"{place['audio']} short"),
        TURN.format("no media at all"),
        TURN.format(f"{place['image']}ok"),
    ]
    return texts, [media.image(side), media.image(side)], [media.sound(), media.sound(3000)]


def test_a_batch_is_answered_as_one_by_one(omni, media):
    model, processor = load(omni[0])
    texts, images, sounds = mixed_batch(processor, media)
    together = ask(model, processor, texts, images=images, audio=sounds)
    alone = [
        ask(model, processor, texts[:1], images=images[:1], audio=sounds[:1]),
        ask(model, processor, texts[1:2], audio=sounds[1:]),
        ask(model, processor, texts[2:3]),
        ask(model, processor, texts[3:], images=images[1:]),
    ]
    assert torch.equal(together, torch.cat(alone))
    assert len({tuple(row) for row in together.tolist()}) > 1


def test_mrope_moves_text_and_sound_after_an_image(qwen_omni, part, media, monkeypatch):
    folder, plan = qwen_omni
    assert plan.merge.target.folder == part("qwen2_vl")  # the one with M-RoPE gives the text model
    model, processor = load(folder)
    place = processor.placeholders
    text = TURN.format(f"{place['audio']}a{place['image']}b{place['audio']}c")
    given = {"images": [media.image(56)], "audio": [media.sound(), media.sound(4000)]}
    inputs = processor(text=[text], return_tensors="pt", **given)
    caught = {}
    forward = model.model.language_model.forward
    monkeypatch.setattr(
        model.model.language_model, "forward", lambda **k: caught.update(k) or forward(**k)
    )
    with torch.inference_mode():
        model(**inputs)
    ids = inputs["input_ids"]
    seen = ids == model.config.placeholders["image"]
    assert int(seen.sum()) == 4  # 2 x 2 tokens, which take two positions in each direction
    first = int(seen[0].nonzero()[0])
    expected = list(range(first))
    after = list(range(first + 2, first + 2 + ids.shape[1] - first - 4))
    time, height, width = caught["position_ids"][:, 0].tolist()
    assert time == [*expected, *[first] * 4, *after]
    assert height == [*expected, first, first, first + 1, first + 1, *after]
    assert width == [*expected, first, first + 1, first, first + 1, *after]
    assert model.model.rope_deltas.tolist() == [[-2]]


def test_batches_with_mrope_are_answered_as_one_by_one(qwen_omni, media):
    model, processor = load(qwen_omni[0])
    texts, images, sounds = mixed_batch(processor, media, side=56)
    together = ask(model, processor, texts, images=images, audio=sounds)
    alone = [
        ask(model, processor, texts[:1], images=images[:1], audio=sounds[:1]),
        ask(model, processor, texts[1:2], audio=sounds[1:]),
        ask(model, processor, texts[2:3]),
        ask(model, processor, texts[3:], images=images[1:]),
    ]
    assert torch.equal(together, torch.cat(alone))


def test_generating_with_a_cache_is_generating_without(qwen_omni, media):
    model, processor = load(qwen_omni[0])
    text = TURN.format("<|image_pad|><|AUDIO|>?")
    given = {"images": [media.image(56)], "audio": [media.sound()]}
    inputs = processor(text=[text], return_tensors="pt", **given)
    cached = ask(model, processor, [text], **given)
    ids = inputs.pop("input_ids")
    inputs.pop("attention_mask")
    with torch.inference_mode():
        for _ in range(6):
            logits = model(input_ids=ids, **inputs, use_cache=False).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(cached[0], ids[0, -6:])


def test_shifts_of_two_parts_with_mrope_add_up(part, tmp_path, media):
    """Image and video by two parts of one kind: positions as of one model that does both."""
    folder = part("qwen2_vl")
    both = [{"model": folder, "provides": kind} for kind in ("image", "video")]
    recipe = {"method": "linear", "base": folder, "models": both}
    omnimerge.compose(recipe, tmp_path / "omni")
    composed, processor = load(tmp_path / "omni")
    model, theirs, _ = original(folder, "video")
    given = {"images": [media.image(56)], "videos": [media.video(4, 56)]}
    text = "a{}b{}c"
    ours = processor(text=[text.format(processor.image_token, processor.video_token)],
                     return_tensors="pt", **given)  # fmt: skip
    native = theirs(
        text=[text.format("<|image_pad|>", "<|video_pad|>")], return_tensors="pt",
        videos_kwargs={"do_sample_frames": False}, **given,
    )  # fmt: skip
    with torch.inference_mode():
        wanted, found = model(**native).logits, composed(**ours).logits
    torch.testing.assert_close(found[..., :260], wanted[..., :260], atol=1e-5, rtol=0)


def test_media_without_a_place_are_refused(omni, media):
    model, processor = load(omni[0])
    inputs = processor(text=["<image>?"], images=[media.image()], return_tensors="pt")
    inputs["input_ids"][inputs["input_ids"] == model.config.placeholders["image"]] = 5
    with pytest.raises(ValueError, match="part 'image' are given, but no placeholder"):
        model(**inputs)
    with pytest.raises(ValueError, match=r"1 media of modality image for 2 of '<image>'"):
        processor(text=["<image><image>"], images=[media.image()])
    embeds = torch.zeros(1, 3, 32)
    with pytest.raises(ValueError, match="media need input_ids"):
        model(inputs_embeds=embeds, image_pixel_values=inputs["image_pixel_values"])

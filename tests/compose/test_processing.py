"""What the composed processor does with options."""

import pytest
import torch
from transformers import AutoProcessor

from omnimerge.compose.part_processor import PartProcessor
from omnimerge.generate.quiet import quiet


@pytest.fixture(scope="module")
def processor(omni):
    with quiet():
        return AutoProcessor.from_pretrained(omni[0])


@pytest.fixture(scope="module")
def patches(qwen_omni):
    with quiet():
        return AutoProcessor.from_pretrained(qwen_omni[0])


@pytest.mark.parametrize(
    "options", [{"sampling_rate": 8000}, {"audio_kwargs": {"sampling_rate": 8000}}]
)
def test_sounds_at_another_rate_are_refused(processor, part, media, options):
    inner = PartProcessor.load(part("qwen2_audio"), {"audio": "<|AUDIO|>"}, {}).inner
    with pytest.raises(ValueError, match="8000"):
        inner(text=["<|AUDIO|>"], audio=[media.sound()], **options)
    with pytest.raises(
        ValueError, match="given at 8000 Hz, and this model hears at 16000; resample"
    ):
        processor(text=["<|AUDIO|>"], audio=[media.sound()], **options)
    same = {"sampling_rate": 16000}
    assert "audio_input_features" in processor(text=["<|AUDIO|>"], audio=[media.sound()], **same)


def test_padding_is_as_asked_for(processor):
    texts = ["a", "hello"]
    for side, mask in (("left", [0] * 4 + [1]), ("right", [1] + [0] * 4)):
        for options in ({"padding_side": side}, {"text_kwargs": {"padding_side": side}}):
            made = processor(text=texts, return_tensors="pt", padding=True, **options)
            assert made["attention_mask"][0].tolist() == mask
    longest = {"padding": "max_length", "max_length": 40}
    for options in (longest, {"text_kwargs": longest}):
        assert processor(text=texts, return_tensors="pt", **options)["input_ids"].shape == (2, 40)
    made = processor(text=texts, return_tensors="pt", padding=True, pad_to_multiple_of=8)
    assert made["input_ids"].shape == (2, 8)


def test_text_is_truncated_and_media_are_not(processor, media):
    tokens = processor.tokenizer("hello there")["input_ids"]
    cut = processor(text=["hello there"], truncation=True, max_length=4)["input_ids"]
    assert cut == [tokens[:4]]
    given = {"text": ["<image>hello there"], "images": [media.image()], "truncation": True}
    whole = processor(text=given["text"], images=given["images"])["input_ids"][0]
    assert processor(**given, max_length=len(whole))["input_ids"] == [whole]
    assert processor(**given, max_length=6)["input_ids"] == [whole[:6]]
    assert whole[:4] == [processor.tokenizer.convert_tokens_to_ids("<image>")] * 4
    with pytest.raises(
        ValueError, match=r"truncation to 3 of 15 tokens would cut into media \(image\)"
    ):
        processor(**given, max_length=3)
    with pytest.raises(ValueError, match="truncation='only_second' is none of"):
        processor(text="a", truncation="only_second")


def test_special_tokens_around_a_text_outlast_truncation():
    from omnimerge.compose.options import cut

    class Tokenizer:
        truncation_side = "right"

        def __call__(self, text):
            return {"input_ids": [1, 2]}

    tokenizer = Tokenizer()
    assert cut([1, 7, 8, 9, 2], 4, {}, tokenizer) == [1, 7, 8, 2]
    tokenizer.truncation_side = "left"
    assert cut([1, 7, 8, 9, 2], 3, {}, tokenizer) == [1, 9, 2]
    assert cut([6, 7, 8, 9], 3, {}, tokenizer) == [7, 8, 9]
    with pytest.raises(ValueError, match="leaves no room beside the special tokens"):
        cut([1, 7, 8, 9, 2], 1, {}, tokenizer)


def test_options_of_pictures_and_frames_reach_their_processors(patches, processor, media):
    small = {"size": {"shortest_edge": 28 * 28, "longest_edge": 28 * 28}}
    place = patches.placeholders["image"]
    for options in (small, {"images_kwargs": small}):
        made = patches(text=[place], images=[media.image(56)], **options)
        assert made["image_image_grid_thw"].tolist() == [[1, 2, 2]]
    made = patches(text=[place], images=[media.image(56)])
    assert made["image_image_grid_thw"].tolist() == [[1, 4, 4]]
    video = media.video()
    one = processor(text=["<video>"], videos=[video])
    other = processor(text=["<video>"], videos=[video], videos_kwargs={"do_normalize": False})
    pixels = "video_pixel_values_videos"
    assert not torch.equal(one[pixels], other[pixels])


def test_unknown_options_are_refused(processor, media):
    with pytest.raises(ValueError, match="'nonsense' is no option of this model's processor"):
        processor(text=["x"], nonsense=3)
    with pytest.raises(ValueError, match=r"'trunction' is no option .*, did you mean 'truncation'"):
        processor(text=["x"], trunction=True)
    with pytest.raises(ValueError, match=r"images_kwargs: 'sizes' is no option .*'size'"):
        processor(text=["x"], images_kwargs={"sizes": 3})
    with pytest.raises(ValueError, match="every frame of a video is shown"):
        processor(text=["<video>"], videos=[media.video()], do_sample_frames=True)


def test_options_of_a_modality_that_the_model_lacks_are_refused(patches):
    with pytest.raises(ValueError, match="'videos_kwargs' is no option"):
        patches(text=["x"], videos_kwargs={"do_resize": False})


def test_a_chat_with_media_is_tokenized_by_the_template(processor, media):
    content = [{"type": "image", "image": media.image()}, {"type": "audio", "audio": media.sound()},
               {"type": "text", "text": "what?"}]  # fmt: skip
    made = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True,
        return_tensors="pt", add_generation_prompt=True,
    )  # fmt: skip
    assert {"image_pixel_values", "audio_input_features"} <= set(made)

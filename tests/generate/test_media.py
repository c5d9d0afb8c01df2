"""Sounds and videos: read from files, put into the template, and seen by the model."""

import importlib.util
import shutil
import wave
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import transformers as T
from PIL import Image
from tokenizers import AddedToken
from transformers.audio_utils import load_audio

from omnimerge.errors import GenerationError, PromptError
from omnimerge.generate import Generator, Prompt, media
from omnimerge.generate.loading import LoadedModel
from omnimerge.generate.media import media_files, open_audio, open_video
from omnimerge.generate.processor import InputProcessor, without_video
from omnimerge.generate.quiet import quiet

RATE = 16_000
NO_TORCHVISION = importlib.util.find_spec("torchvision") is None
MARKS = {
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
EARS = {
    "num_mel_bins": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "d_model": 16,
    "max_source_positions": 100,
}
FEATURES = {"feature_size": 16, "chunk_length": 2}  # of 2 seconds, where Whisper's are of 30


def tone(file, seconds=0.5, pitch=440.0, *, rate=RATE, width=2, channels=1):
    """Write a sine as PCM, at half of the full scale; the second channel is silent."""
    sine = np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate) / 2
    if width == 1:
        data = ((sine + 1) * 127.5).round().astype(np.uint8)[:, None]
    else:
        whole = (sine * (2 ** (8 * width - 1) - 1)).round().astype("<i4")
        data = whole[:, None].view(np.uint8)[:, :width]
    silence = np.full_like(data, 128 if width == 1 else 0)
    frames = np.concatenate([data, silence][:channels], axis=1)
    with wave.open(str(file), "wb") as written:
        written.setparams((channels, width, rate, 0, "NONE", ""))
        written.writeframes(frames.tobytes())
    return file


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sounds")
    tones = [(0.5, 440), (1.3, 700), (1.9, 200), (3.1, 300)]
    return [tone(folder / f"{i}.wav", *of) for i, of in enumerate(tones)]


@pytest.fixture
def without(monkeypatch):
    """Make libraries look as if they were not installed."""

    def hide(*names):
        monkeypatch.setattr(media, "_optional", lambda name: None if name in names else ...)

    return hide


class TestSounds:
    @pytest.mark.parametrize("width", [1, 2, 3, 4])
    @pytest.mark.parametrize("channels", [1, 2])
    def test_pcm_is_read_as_soundfile_reads_it(self, tmp_path, without, width, channels):
        file = tone(tmp_path / "a.wav", width=width, channels=channels)
        expected = soundfile.read(file, dtype="float32", always_2d=True)[0].mean(axis=1)
        without("soundfile", "soxr")

        found = open_audio(file, "1", RATE)

        assert found.dtype == np.float32
        assert found.shape == (8000,)
        np.testing.assert_allclose(found, expected, atol=1e-7)
        assert 0.2 < np.abs(found).max() * channels < 0.51

    @pytest.mark.parametrize("rate", [8000, 22_050, 44_100, 48_000])
    def test_other_rates_are_resampled_as_transformers_does(self, tmp_path, rate):
        file = tone(tmp_path / "a.wav", rate=rate, channels=2)
        expected = load_audio(str(file), sampling_rate=RATE, backend="soundfile")
        np.testing.assert_allclose(open_audio(file, "1", RATE), expected, atol=1e-6)

    @pytest.mark.parametrize("name", ["a.flac", "a.ogg", "float.wav"])
    def test_other_formats_are_read_with_soundfile(self, tmp_path, name):
        samples = np.sin(np.arange(8000) / 9).astype(np.float32) / 2
        subtype = "FLOAT" if name == "float.wav" else None
        soundfile.write(tmp_path / name, samples, RATE, subtype=subtype)
        found = open_audio(tmp_path / name, "1", RATE)
        assert found.shape == samples.shape
        assert np.abs(found - samples).max() < (0.1 if name == "a.ogg" else 1e-4)

    def test_without_the_libraries(self, tmp_path, without):
        slow = tone(tmp_path / "slow.wav", rate=8000)
        soundfile.write(tmp_path / "a.flac", np.zeros(100), RATE)
        without("soundfile", "soxr")
        with pytest.raises(PromptError) as error:
            open_audio(slow, "7", RATE)
        assert "prompt '7': audio" in str(error.value)
        assert "has 8000 samples a second, the model takes 16000" in str(error.value)
        assert "pip install 'omnimerge[audio]'" in str(error.value)
        assert "ffmpeg -i slow.wav -ar 16000" in str(error.value)
        with pytest.raises(PromptError, match=r"it is no PCM WAV file; .* 'omnimerge\[audio\]'"):
            open_audio(tmp_path / "a.flac", "7", RATE)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("cut.wav", "ends after 9956 of 16000 bytes"),
            ("empty.wav", "no samples"),
            ("text.wav", "cannot be decoded"),
            ("none.wav", "cannot be decoded"),
            ("nan.wav", "NaN or infinity"),
        ],
    )
    def test_what_cannot_be_decoded_is_named(self, tmp_path, name, message):
        whole = tone(tmp_path / "whole.wav").read_bytes()
        (tmp_path / "cut.wav").write_bytes(whole[:10_000])
        tone(tmp_path / "empty.wav", seconds=0)
        (tmp_path / "text.wav").write_text("no sound")
        soundfile.write(tmp_path / "nan.wav", np.array([0, np.nan]), RATE, subtype="FLOAT")
        with pytest.raises(PromptError) as error:
            open_audio(tmp_path / name, "7", RATE)
        assert f"prompt '7': audio {tmp_path / name} cannot be decoded" in str(error.value)
        assert message in str(error.value)
        assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def frames():
    random = np.random.default_rng(0)
    return [
        Image.fromarray(random.integers(0, 255, (28, 30, 3), dtype=np.uint8)) for _ in range(12)
    ]


class TestVideos:
    def test_a_folder_in_the_order_of_its_numbers(self, tmp_path, frames):
        for number, frame in enumerate(frames):
            frame.save(tmp_path / f"frame{number}.png")
        (tmp_path / "notes.txt").write_text("not a frame")

        video = open_video(tmp_path, "1")

        assert [f.tobytes() for f in video.frames] == [f.tobytes() for f in frames]
        assert video.fps == 2.0
        prompt = Prompt("1", "x", (Path("i"),), audios=(Path("a"),), videos=(tmp_path, Path("v")))
        names = [file.name for file in media_files(prompt)]
        assert names == ["i", "a", *(f"frame{i}.png" for i in range(12)), "v"]

    @pytest.mark.parametrize("name", ["a.webp", "a.png", "a.gif"])
    def test_animated_images(self, tmp_path, frames, name):
        options = {"lossless": True} if name == "a.webp" else {}
        frames[0].save(
            tmp_path / name, save_all=True, append_images=frames[1:5], duration=250, **options
        )
        video = open_video(tmp_path / name, "1")
        assert video.fps == pytest.approx(4.0)
        assert [f.mode for f in video.frames] == ["RGB"] * 5
        if name != "a.gif":  # of 256 colours
            assert [f.tobytes() for f in video.frames] == [f.tobytes() for f in frames[:5]]

    def test_what_is_no_video(self, tmp_path, frames):
        frames[0].save(tmp_path / "still.png")
        (tmp_path / "film.mp4").write_bytes(b"\x00\x00\x00\x20ftypisom" + bytes(64))
        (tmp_path / "empty").mkdir()
        (tmp_path / "mixed").mkdir()
        frames[0].save(tmp_path / "mixed" / "1.png")
        frames[0].resize((9, 9)).save(tmp_path / "mixed" / "2.png")
        for name, message in {
            "still.png": "is a still image; give it as an image",
            "film.mp4": "no animated GIF, WebP or PNG; write its frames out: `mkdir film && ffmpeg",
            "empty": "holds no frames",
            "mixed": r"of different sizes, such as \(9, 9\) and \(30, 28\)",
            "gone.gif": "cannot be decoded",
        }.items():
            with pytest.raises(PromptError, match=f"prompt '7': .*{message}"):
                open_video(tmp_path / name, "7")

    def test_a_frame_that_cannot_be_decoded_is_named(self, tmp_path, frames):
        frames[0].save(tmp_path / "1.png")
        (tmp_path / "2.png").write_bytes(b"no image")
        with pytest.raises(PromptError, match=r"prompt '7': image .*2\.png cannot be decoded"):
            open_video(tmp_path, "7")


def listening_tokenizer(tiny, folder):
    """The tiny tokenizer with marks for sounds, known by name as Omni's processor wants them."""
    tokenizer = tiny.tokenizer()
    marks = [AddedToken(m, special=True, normalized=False) for m in (*MARKS.values(), "<sound>")]
    tokenizer.add_tokens(marks, special_tokens=True)
    tokenizer.save_pretrained(folder)
    return T.AutoTokenizer.from_pretrained(folder, extra_special_tokens=MARKS)


def text_config(tiny, rope=None):
    rope = {"rope_type": "default", "rope_theta": 1e4} if rope is None else rope
    return {**tiny.TEXT, "rope_parameters": rope}


def template(tiny, **parts):
    """The tiny ChatML template with other placeholders; what is not given has none."""
    image = "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}"
    assert image in tiny.QWEN_TEMPLATE
    cases = "{% if false %}" + "".join(
        f"{{% elif c.type == '{kind}' %}}{mark}" for kind, mark in parts.items()
    )
    return tiny.QWEN_TEMPLATE.replace(image, cases + "{% elif c.type == 'text' %}")


def qwen2_audio(tiny, folder):
    tokenizer = listening_tokenizer(tiny, folder)
    config = T.Qwen2AudioConfig(
        audio_config=EARS,
        text_config=T.Qwen2Config(**text_config(tiny)),
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
    )
    tiny._save(T.Qwen2AudioForConditionalGeneration, config, folder, seed=0)
    # With its own default template.
    T.Qwen2AudioProcessor(T.WhisperFeatureExtractor(**FEATURES), tokenizer).save_pretrained(folder)


def audioflamingo3(tiny, folder):
    tokenizer = listening_tokenizer(tiny, folder)
    ears = {
        "num_mel_bins": 16,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_source_positions": 100,
    }
    config = T.AudioFlamingo3Config(
        audio_config=ears,
        text_config=T.Qwen2Config(**text_config(tiny)),
        audio_token_id=tokenizer.convert_tokens_to_ids("<sound>"),
    )
    tiny._save(T.AudioFlamingo3ForConditionalGeneration, config, folder, seed=0)
    T.AudioFlamingo3Processor(
        T.WhisperFeatureExtractor(**FEATURES, return_attention_mask=True),
        tokenizer,
        chat_template=template(tiny, audio="<sound>"),
    ).save_pretrained(folder)


def omni(tiny, folder):
    """A Qwen2.5-Omni thinker, in memory: transformers cannot load its files without torchvision."""
    tokenizer = listening_tokenizer(tiny, folder)
    ids = {
        f"{kind}_token_{end}": tokenizer.convert_tokens_to_ids(MARKS[f"{kind}_token"])
        for kind in ("image", "audio", "video")
        for end in ("id", "index")
    }
    for name, mark in (("vision", "vision"), ("audio", "audio")):
        for at, end in (("start", "bos"), ("end", "eos")):
            token = MARKS[f"{mark}_{end}_token"]
            ids[f"{name}_{at}_token_id"] = tokenizer.convert_tokens_to_ids(token)
    config = T.Qwen2_5OmniThinkerConfig(
        text_config=text_config(tiny, tiny.ROPE),
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 32,
            "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
            "window_size": 56, "fullatt_block_indexes": [0],
        },
        audio_config={**EARS, "output_dim": 32, "n_window": 50},
        position_id_per_seconds=25,
        **ids,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        model = T.Qwen2_5OmniThinkerForConditionalGeneration(config).eval()
    chat = template(
        tiny,
        image="<|vision_bos|><|IMAGE|><|vision_eos|>",
        audio="<|audio_bos|><|AUDIO|><|audio_eos|>",
        video="<|vision_bos|><|VIDEO|><|vision_eos|>",
    )
    with without_video():
        processor = T.Qwen2_5OmniProcessor(
            T.Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=56 * 56),
            None,
            T.WhisperFeatureExtractor(**FEATURES, return_attention_mask=True),
            tokenizer,
            chat_template=chat,
        )
    loaded = LoadedModel(model, multimodal=True, prefix="thinker.")
    return Generator(folder, loaded, InputProcessor(folder, processor, tokenizer))


@pytest.fixture(scope="module")
def listening(tiny, tmp_path_factory):
    """Name -> a generator that takes sounds."""
    root = tmp_path_factory.mktemp("listening")
    with quiet():
        for build in (qwen2_audio, audioflamingo3):
            build(tiny, root / build.__name__)
        generators = {
            name: Generator.load(root / name) for name in ("qwen2_audio", "audioflamingo3")
        }
        return {**generators, "qwen2_5_omni": omni(tiny, root / "qwen2_5_omni")}


LISTENING = ["qwen2_audio", "audioflamingo3", "qwen2_5_omni"]


def as_transformers(processor, prompt):
    """The inputs that transformers itself makes of a conversation with files."""
    parts = [{"type": "image", "path": str(path)} for path in prompt.images]
    parts += [{"type": "audio", "path": str(path)} for path in prompt.audios]
    turn = {"role": "user", "content": [*parts, {"type": "text", "text": prompt.prompt}]}
    with quiet():
        return processor._processor.apply_chat_template(
            [turn],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )


class TestModelsThatListen:
    @pytest.mark.parametrize("name", LISTENING)
    @pytest.mark.parametrize("which", [0, 1, 3])
    def test_inputs_are_those_of_transformers(self, listening, sounds, name, which):
        """The last sound is longer than the models' 2 seconds: cut, or heard in two parts."""
        processor = listening[name].processor
        prompt = Prompt("1", "what", audios=(sounds[which],))
        with quiet():
            found = processor.encode([prompt])
        expected = as_transformers(processor, prompt)
        assert set(found) == set(expected)
        assert any("mask" in key and key != "attention_mask" for key in found)
        for key, value in expected.items():
            assert torch.equal(found[key], value), key

    @pytest.mark.parametrize("name", ["qwen2_audio", "qwen2_5_omni"])
    def test_several_sounds_and_an_image(self, listening, sounds, images, name):
        processor = listening[name].processor
        shown = (images[0],) if name == "qwen2_5_omni" else ()
        prompt = Prompt("1", "what", shown, audios=tuple(sounds[:2]))
        with quiet():
            found = processor.encode([prompt])
        for key, value in as_transformers(processor, prompt).items():
            assert torch.equal(found[key], value), key
        assert ("pixel_values" in found) == bool(shown)

    @pytest.mark.parametrize("name", LISTENING)
    def test_the_model_hears_the_sound_and_the_batch_does_not_matter(self, listening, sounds, name):
        prompts = [
            Prompt(str(i), "what" + " is" * (i // 3), audios=(sounds[i % 3],)) for i in range(6)
        ]
        prompts.append(Prompt("no sound", "what"))
        one = listening[name].responses(prompts, batch_size=1, max_new_tokens=6)
        four = listening[name].responses(prompts, batch_size=4, max_new_tokens=6)
        assert one == four
        assert len({response.tokens for response in one}) == len(prompts)

    def test_two_sounds_for_a_model_that_takes_one(self, listening, sounds):
        prompt = Prompt("7", "what", audios=tuple(sounds[:2]))
        with pytest.raises(GenerationError, match=r"refuses the prompts '7' \(Got 1 text but 2"):
            listening["audioflamingo3"].processor.encode([prompt])

    def test_a_broken_sound_is_named(self, listening, tmp_path):
        (tmp_path / "a.wav").write_bytes(b"RIFF")
        prompt = Prompt("7", "what", audios=(tmp_path / "a.wav",))
        with pytest.raises(PromptError, match=r"prompt '7': audio .*a\.wav cannot be decoded"):
            listening["qwen2_audio"].responses([prompt])


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "given", "message"),
        [
            ("qwen2_vl", "audio", r"has audio, but .* \(Qwen2VLProcessor\) has no part for it"),
            ("qwen2", "audio", "has audio, but .* is a text-only model"),
            ("qwen2", "video", "has a video, but .* is a text-only model"),
        ],
    )
    def test_what_a_model_does_not_take(self, folders, sounds, name, given, message):
        processor = InputProcessor.load(folders[name], multimodal=name != "qwen2")
        prompt = Prompt("7", "what", **{f"{given}s": (sounds[0],)})
        with pytest.raises(GenerationError, match=f"prompt '7' {message}"):
            processor.render(prompt)

    @pytest.mark.parametrize("given", ["images", "videos"])
    def test_a_model_that_only_listens(self, listening, images, given):
        prompt = Prompt("7", "what", **{given: (images[0],)})
        with pytest.raises(GenerationError, match=r"Qwen2AudioProcessor\) has no part for it"):
            listening["qwen2_audio"].processor.render(prompt)

    @pytest.mark.skipif(not NO_TORCHVISION, reason="torchvision is installed")
    def test_videos_without_torchvision(self, folders, listening, images):
        prompt = Prompt("7", "what", videos=(images[0].parent,))
        processors = [listening["qwen2_5_omni"].processor]
        processors.append(InputProcessor.load(folders["qwen2_vl"], multimodal=True))
        for processor in processors:
            with pytest.raises(GenerationError, match=r"video part of Qwen.* needs torchvision"):
                processor.render(prompt)

    def test_a_template_without_a_place_for_sounds(self, listening, sounds, tmp_path):
        source = listening["qwen2_audio"].folder
        folder = shutil.copytree(source, tmp_path / "deaf")
        (folder / "chat_template.jinja").write_text(
            "{% for m in messages %}{{ m.role }}{% endfor %}"
        )
        processor = InputProcessor.load(folder, multimodal=True)
        with pytest.raises(GenerationError, match=r"no place for audios \(no '<\|AUDIO\|>' for"):
            processor.render(Prompt("7", "what", audios=(sounds[0],)))

    def test_a_chat_format_of_its_own(self, tiny, sounds, tmp_path):
        """Voxtral: its processor refuses a rendered text with a place for a sound."""
        tokenizer = listening_tokenizer(tiny, tmp_path)
        tokenizer.chat_template = template(tiny, audio="<|AUDIO|>")
        processor = T.VoxtralProcessor(T.WhisperFeatureExtractor(), tokenizer)
        inputs = InputProcessor(tmp_path, processor, tokenizer)
        with pytest.raises(GenerationError, match=r"\(VoxtralProcessor\) takes sounds in a chat"):
            inputs.render(Prompt("7", "what", audios=(sounds[0],)))


class FakeVideoProcessor:
    """Takes what it is given and keeps it; real ones need torchvision."""

    chat_template = "{% for c in messages[0].content %}{{ c.type }} {% endfor %}"
    image_token = None
    video_processor = image_processor = object()

    def __init__(self, shown=("image", "video", "text")):
        self.shown = shown

    def apply_chat_template(self, conversation, **options):
        parts = conversation[0]["content"]
        return " ".join(part["type"] for part in parts if part["type"] in self.shown)

    def __call__(self, **given):
        self.given = given
        return {}


def test_every_frame_is_given_to_the_processor(tiny, tmp_path, frames, images):
    for number, frame in enumerate(frames[:3]):
        frame.save(tmp_path / f"{number}.png")
    processor = FakeVideoProcessor()
    inputs = InputProcessor(tmp_path, processor, tiny.tokenizer())

    inputs.encode([Prompt("1", "what", (images[0],), videos=(tmp_path, tmp_path))])

    given = processor.given
    assert given["text"] == ["image video video text"]
    [videos] = given["videos"]
    assert [[f.tobytes() for f in video] for video in videos] == 2 * [
        [f.tobytes() for f in frames[:3]]
    ]
    options = given["videos_kwargs"]
    assert options["do_sample_frames"] is False
    facts = {"total_num_frames": 3, "fps": 2.0, "duration": 1.5, "frames_indices": [0, 1, 2]}
    assert options["video_metadata"] == [facts, facts]


def test_a_template_that_drops_videos_without_a_known_mark_for_them(tiny, tmp_path, images):
    inputs = InputProcessor(tmp_path, FakeVideoProcessor(("image", "text")), tiny.tokenizer())
    inputs.render(Prompt("1", "what", (images[0],)))
    with pytest.raises(
        GenerationError, match=r"no place for videos \(it drops them for prompt '1'"
    ):
        inputs.render(Prompt("1", "what", (images[0],), videos=(tmp_path,)))

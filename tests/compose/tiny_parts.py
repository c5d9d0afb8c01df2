"""Tiny MLLMs over one LLM, each with the files of a published checkpoint: for compositions."""

import json
from pathlib import Path

import tiny_answering
import tiny_models
import torch
import transformers as T
from tiny_models import AUDIO, CLIP, MROPE, QWEN_ROPE, TEXT
from tokenizers import AddedToken, Tokenizer

SIDE = 28
SIZE = {"height": SIDE, "width": SIDE}
CLIP_PIXELS = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": SIDE},
    "crop_size": SIZE,
}
HEAR = {
    "feature_extractor_type": "WhisperFeatureExtractor",
    "feature_size": 16,
    "chunk_length": 1,
    "sampling_rate": 16000,
    "hop_length": 160,
    "n_fft": 400,
}
PATCHES = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "min_pixels": 28 * 28,
    "max_pixels": 56 * 56,
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
}
TURN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}"
    "{{ m.content }}{% else %}{% for c in m.content %}@"
    "{% if c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def turn(**written):
    cases = "".join(
        f"{{% if c.type == '{kind}' %}}{text}{{% endif %}}" for kind, text in written.items()
    )
    return TURN.replace("@", cases)


def tokenizer(*specials):
    plain = tiny_answering.tokenizer()
    vocabulary = json.loads(plain.backend_tokenizer.to_str())
    keep = [
        a
        for a in vocabulary["added_tokens"]
        if a["content"] in ("<pad>", "<|im_start|>", "<|im_end|>", "<|endoftext|>")
    ]
    vocabulary["added_tokens"] = keep
    made = Tokenizer.from_str(json.dumps(vocabulary))
    made.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    return T.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<|im_end|>", model_max_length=4096
    )


WORDS = 320  # rows of the embedding: more than the tokenizer has tokens


def text(kind, **changes):
    both = {**TEXT, "vocab_size": WORDS, "eos_token_id": tokenizer().eos_token_id, **changes}
    if kind == "llama":
        return T.LlamaConfig(**both)
    return T.Qwen2Config(**{**both, "rope_parameters": QWEN_ROPE})


def _weights(model, own):
    """An ancestor's decoder with noise of the model's own; and towers large enough to matter."""
    with torch.no_grad():
        for leaf, parameter in tiny_models.decoder_parameters(model).items():
            shared = tiny_models._draw(f"ancestor/{leaf}", parameter.shape) * 0.2
            noise = tiny_models._draw(f"{own}/{leaf}", parameter.shape) * 0.02
            parameter.copy_((1.0 if parameter.ndim == 1 else 0.0) + shared + noise)
        decoder = {id(p) for p in tiny_models.decoder_parameters(model).values()}
        for name, parameter in model.named_parameters():
            if id(parameter) not in decoder and parameter.ndim > 1:
                parameter.copy_(tiny_models._draw(f"{own}/{name}", parameter.shape) * 0.15)
    return model.eval()


def _save(model, folder: Path, words, template, **files) -> Path:
    with torch.no_grad():
        tiny_models.save(model, folder)
    words.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(template)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def plain(folder, kind="llama", own="plain", **changes):
    config = text(kind, **changes)
    cls = T.LlamaForCausalLM if kind == "llama" else T.Qwen2ForCausalLM
    return _save(_weights(cls(config), own), folder, tokenizer(), turn())


def llava(folder, kind="llama", own="llava", **changes):
    words = tokenizer("<image>")
    config = T.LlavaConfig(
        vision_config=CLIP,
        text_config=text(kind, **changes),
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )
    processor = {
        "processor_class": "LlavaProcessor",
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "image_token": "<image>",
    }
    model = _weights(T.LlavaForConditionalGeneration(config), own)
    files = {"preprocessor_config": CLIP_PIXELS, "processor_config": processor}
    return _save(model, folder, words, turn(image="<image>\n"), **files)


def qwen2_audio(folder, kind="llama", own="audio", **changes):
    marks = ("<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>")
    words = tokenizer(*marks)
    config = T.Qwen2AudioConfig(
        audio_config=AUDIO,
        text_config=text(kind, **changes),
        audio_token_id=words.convert_tokens_to_ids("<|AUDIO|>"),
    )
    model = _weights(T.Qwen2AudioForConditionalGeneration(config), own)
    files = {
        "preprocessor_config": HEAR | {"processor_class": "Qwen2AudioProcessor"},
        "processor_config": {"processor_class": "Qwen2AudioProcessor"},
    }
    template = "{% set count = namespace(n=0) %}" + turn(
        audio="{% set count.n = count.n + 1 %}Audio {{ count.n }}: "
        "<|audio_bos|><|AUDIO|><|audio_eos|>\n"
    )
    return _save(model, folder, words, template, **files)


def video_llava(folder, kind="llama", own="video", **changes):
    words = tokenizer("<image>", "<video>")
    config = T.VideoLlavaConfig(
        vision_config=CLIP,
        text_config=text(kind, **changes),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        video_token_index=words.convert_tokens_to_ids("<video>"),
    )
    model = _weights(T.VideoLlavaForConditionalGeneration(config), own)
    pixels = CLIP_PIXELS | {"image_processor_type": "VideoLlavaImageProcessor"}
    processor = {"processor_class": "VideoLlavaProcessor", "patch_size": 14,
                 "vision_feature_select_strategy": "default"}  # fmt: skip
    files = {
        "preprocessor_config": pixels,
        "video_preprocessor_config": {
            **CLIP_PIXELS,
            "video_processor_type": "VideoLlavaVideoProcessor",
        },
        "processor_config": processor,
    }
    template = turn(image="<image>\n", video="<video>\n")
    return _save(model, folder, words, template, **files)


def llava_next_video(folder, kind="llama", own="next", **changes):
    words = tokenizer("<image>", "<video>")
    config = T.LlavaNextVideoConfig(
        vision_config={**CLIP, "image_size": 56},
        text_config=text(kind, **changes),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        video_token_index=words.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=[[56, 112]],
    )
    model = _weights(T.LlavaNextVideoForConditionalGeneration(config), own)
    size = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    image = {
        "image_processor_type": "LlavaNextImageProcessor",
        "image_grid_pinpoints": [[56, 112]],
    }
    files = {
        "preprocessor_config": {**CLIP_PIXELS, **size, **image},
        "video_preprocessor_config": {
            **CLIP_PIXELS,
            **size,
            "video_processor_type": "LlavaNextVideoVideoProcessor",
        },
        "processor_config": {
            "processor_class": "LlavaNextVideoProcessor",
            "patch_size": 14,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
        },
    }
    template = turn(image="<image>\n", video="<video>\n")
    return _save(model, folder, words, template, **files)


def qwen2_vl(folder, own="qwen2_vl", **changes):
    marks = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    words = tokenizer(*marks)
    token = words.convert_tokens_to_ids
    vision = {
        "depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 14,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "mlp_ratio": 2,
    }  # fmt: skip
    config = T.Qwen2VLConfig(
        text_config={**text("qwen2", **changes).to_dict(), "model_type": "qwen2_vl_text",
                     "rope_parameters": MROPE},
        vision_config=vision,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=False,
    )  # fmt: skip
    model = _weights(T.Qwen2VLForConditionalGeneration(config), own)
    template = turn(
        image="<|vision_start|><|image_pad|><|vision_end|>",
        video="<|vision_start|><|video_pad|><|vision_end|>",
    )
    files = {"preprocessor_config": PATCHES | {"processor_class": "Qwen2VLProcessor"}}
    return _save(model, folder, words, template, **files)

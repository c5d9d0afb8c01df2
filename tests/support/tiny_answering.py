"""Tiny random models with all files of a published checkpoint: names, processor, template."""

import json
import re
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

VOCABULARY = 320
SPECIALS = [
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<image>", "<video>",
    "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAVA_TEMPLATE = QWEN_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<image>\n")
TEXT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


def tokenizer():
    vocabulary = {"<pad>": 0}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIALS])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", eos_token="<|im_end|>", model_max_length=4096
    )


IDS = {name: tokenizer().convert_tokens_to_ids(name) for name in SPECIALS}
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
    "bos_token_id": None, "pad_token_id": 0, "eos_token_id": IDS["<|im_end|>"],
    "initializer_range": 0.3,
}  # fmt: skip
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1000000.0}


def qwen2_vl(folder: Path, seed: int = 0, tied: bool = False) -> Path:
    config = transformers.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": ROPE, "tie_word_embeddings": tied},
        vision_config={
            "depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 14,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "mlp_ratio": 2,
        },
        image_token_id=IDS["<|image_pad|>"],
        video_token_id=IDS["<|video_pad|>"],
        vision_start_token_id=IDS["<|vision_start|>"],
        vision_end_token_id=IDS["<|vision_end|>"],
        tie_word_embeddings=tied,
    )  # fmt: skip
    _save(transformers.Qwen2VLForConditionalGeneration, config, folder, seed)
    image = {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 3136,
             "max_pixels": 12544, "patch_size": 14, "merge_size": 2, "temporal_patch_size": 2,
             "processor_class": "Qwen2VLProcessor"}  # fmt: skip
    _files(folder, image, QWEN_TEMPLATE)
    generation = {"do_sample": True, "temperature": 0.01, "top_p": 0.001, "top_k": 1,
                  "repetition_penalty": 1.05, "eos_token_id": [IDS["<|endoftext|>"]]}  # fmt: skip
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def llava_onevision(folder: Path, seed: int = 1) -> Path:
    pinpoints = [[28, 28], [28, 56], [56, 28], [56, 56]]
    config = transformers.LlavaOnevisionConfig(
        vision_config={
            "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
        },
        text_config=transformers.Qwen2Config(
            **TEXT, rope_parameters={"rope_type": "default", "rope_theta": ROPE["rope_theta"]}
        ),
        image_token_id=IDS["<image>"],
        video_token_id=IDS["<video>"],
        image_token_index=IDS["<image>"],
        video_token_index=IDS["<video>"],
        image_grid_pinpoints=pinpoints,
    )  # fmt: skip
    _save(transformers.LlavaOnevisionForConditionalGeneration, config, folder, seed)
    image = {"image_processor_type": "LlavaOnevisionImageProcessor",
             "size": {"height": 28, "width": 28}, "image_grid_pinpoints": pinpoints}  # fmt: skip
    _files(folder, image, LLAVA_TEMPLATE)
    processor = {"processor_class": "LlavaOnevisionProcessor", "num_image_tokens": 4,
                 "vision_feature_select_strategy": "full"}  # fmt: skip
    (folder / "processor_config.json").write_text(json.dumps(processor))
    return folder


def qwen2(folder: Path, seed: int = 2, template: bool = True) -> Path:
    _save(transformers.Qwen2ForCausalLM, transformers.Qwen2Config(**TEXT), folder, seed)
    _files(folder, None, TEXT_TEMPLATE if template else None)
    return folder


def _save(cls, config, folder: Path, seed: int) -> None:
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(seed)
        model = cls(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    tensors = {
        # What the library drops for a model that was never loaded from a published checkpoint.
        re.sub(r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model.", name): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _files(folder: Path, image: dict | None, template: str | None) -> None:
    tokenizer().save_pretrained(folder)
    if image is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(image))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)


def share_llm(donor: Path, target: Path, noise: float = 0.3, seed: int = 5) -> None:
    """Give the LLaVA-OneVision `donor` the LLM of the Qwen2-VL `target`, with noise on it."""
    random = torch.Generator().manual_seed(seed)
    changed = load_file(donor / "model.safetensors")
    for name, tensor in load_file(target / "model.safetensors").items():
        if name.startswith("model."):
            step = torch.randn(tensor.shape, generator=random) * tensor.float().std() * noise
            changed[f"language_model.{name}"] = (tensor.float() + step).to(tensor.dtype)
        elif name == "lm_head.weight":
            changed[f"language_model.{name}"] = tensor.clone()
    save_file(changed, donor / "model.safetensors", metadata={"format": "pt"})

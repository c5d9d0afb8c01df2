"""Towers run once per batch over several points, and whatever comes back has the same bits."""

import pytest
import torch

from omnimerge.generate.features import FeatureMemo, ReadRecorder, address
from omnimerge.generate.memory import ByteStore
from omnimerge.generate.quiet import quiet
from omnimerge.generate.response import GenerationStats

with quiet():
    import tiny_inputs
    import tiny_multimodal
    from transformers import GenerationConfig

NEW = 6


def build(name):
    """A tiny model whose answers differ between samples, and that never ends one."""
    model = tiny_multimodal.build(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    return model


def language(model):
    """Names of the parameters of the language model and of its head."""
    parts = [model.get_decoder(), model.get_output_embeddings()]
    inside = {address(p) for part in parts for p in part.parameters()}
    return {name for name, p in model.named_parameters() if address(p) in inside}


def perturb(model, names, point):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in names:
                random = torch.Generator().manual_seed(point)
                noise = torch.randn(parameter.shape, generator=random)
                parameter.add_(0.05 * parameter.std(correction=0) * noise)


def answer(model, memo, inputs, key):
    with torch.inference_mode(), memo.batch(key), quiet():
        found = model.generate(**inputs, max_new_tokens=NEW, output_logits=True,
                               return_dict_in_generate=True)  # fmt: skip
    return torch.stack(found.logits)


class Calls:
    """Counts how often layers of a module are called, by default those outside of the LLM."""

    def __init__(self, model, inside):
        spoken = set() if inside else {address(model.get_parameter(n)) for n in language(model)}
        self.count = 0
        for module in model.get_submodule(inside).modules():
            own = [p for p in module.parameters(recurse=False) if p.ndim > 1]
            if own and address(own[0]) not in spoken:
                module.register_forward_pre_hook(self._count)

    def _count(self, *_):
        self.count += 1


def setup(name, capacity=1 << 30, inside=""):
    model, stats = build(name), GenerationStats()
    return model, FeatureMemo(model, ByteStore(capacity), stats), stats, Calls(model, inside)


def search(name, changing=None, keys=("batch",), capacity=1 << 30, inside=""):
    """Answer at five points, with and without memory; returns what was seen."""
    model, memo, stats, calls = setup(name, capacity, inside)
    inputs, changing = tiny_inputs.inputs(name), changing or language(model)
    plain, remembered, alone, counted = [], [], 0, 0
    for point in range(5):
        perturb(model, changing, point)
        memo.changed(changing, model.state_dict())
        for key in keys:
            start = calls.count
            plain.append(answer(model, memo, inputs, None))
            middle = calls.count
            remembered.append(answer(model, memo, inputs, key))
            alone, counted = middle - start, counted + calls.count - middle
    same = all(torch.equal(a, b) for a, b in zip(plain, remembered, strict=True))
    return same, counted / alone, stats, memo, remembered


@pytest.mark.parametrize("name", [n for n in tiny_inputs.MAKERS if n != "chameleon"])
def test_towers_run_once_and_answers_stay_the_same(name):
    inside = {"mllama": "model.vision_model", "blip-2": "vision_model"}.get(name, "")
    same, calls, stats, memo, found = search(name, inside=inside)
    assert same
    assert len({tuple(logits.flatten().tolist()) for logits in found}) == 5
    assert calls == 2  # once to remember, once to check after the weights have changed
    assert stats.features_reused >= 3
    assert any(memo.calls.values())


def test_every_batch_is_remembered_but_checked_only_once():
    same, calls, _, _, _ = search("qwen2_vl", keys=("a", "b", "c"))
    assert same
    assert calls == 3 + 1


def test_nothing_is_remembered_before_weights_were_set():
    model, memo, stats, calls = setup("llava")
    inputs = tiny_inputs.inputs("llava")
    for _ in range(2):
        answer(model, memo, inputs, "batch")
    assert calls.count > 0
    assert stats.features_computed == 0


@pytest.mark.parametrize("name", ["qwen2_vl", "llava", "mllama", "qwen2_audio"])
def test_a_tower_that_changes_is_computed_at_every_point(name):
    everything = {n for n, _ in tiny_multimodal.build(name).named_parameters()}
    same, calls, stats, memo, _ = search(name, changing=everything)
    assert same
    assert calls == 5
    assert stats.features_reused == 0
    assert not any(memo.calls.values())


@pytest.mark.parametrize("part", ["projector", "vision_tower"])
def test_one_changing_part_of_it_is_enough(part):
    names = {n for n, _ in tiny_multimodal.build("llava").named_parameters()}
    changing = {n for n in names if part in n or "language_model" in n}
    same, calls, _, _, _ = search("llava", changing=changing, inside="model.vision_tower")
    assert same
    # The tower is still worth remembering, once it is known that the whole is not.
    assert calls == (3 if part == "projector" else 5)


def test_features_that_read_the_changing_words_are_not_remembered():
    """The images of Chameleon are words of the language model, looked up in its embedding."""
    names = {n for n, _ in tiny_multimodal.build("chameleon").named_parameters()}
    changing = {n for n in names if "vqmodel" not in n}
    same, calls, _, memo, _ = search("chameleon", changing=changing, inside="model.vqmodel")
    assert same
    assert calls == 5
    assert "model.get_image_features" not in memo.calls


def test_more_parameters_than_before_begin_anew():
    model, memo, _, _ = setup("llava")
    inputs, changing = tiny_inputs.inputs("llava"), language(model)
    for _ in range(2):
        memo.changed(changing, model.state_dict())
        answer(model, memo, inputs, "batch")
    more = {n for n, _ in model.named_parameters()}
    perturb(model, more, 1)
    memo.changed(more, model.state_dict())
    expected = answer(model, memo, inputs, None)
    assert torch.equal(answer(model, memo, inputs, "batch"), expected)


def test_without_room_everything_is_computed():
    same, calls, stats, _, _ = search("qwen2_vl", capacity=10)
    assert same
    assert calls == 5
    assert stats.features_reused == 0


def test_other_inputs_under_the_same_key_are_noticed():
    model, memo, _, _ = setup("llava")
    inputs, changing = tiny_inputs.inputs("llava"), language(model)
    memo.changed(changing, model.state_dict())
    answer(model, memo, inputs, "batch")
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(0)}
    assert torch.equal(answer(model, memo, other, "batch"), answer(model, memo, other, None))


def test_a_tower_that_is_not_constant_is_found_out():
    model, memo, _, _ = setup("llava")
    inputs, changing = tiny_inputs.inputs("llava"), language(model)
    tower, count = model.model.vision_tower, []

    def noise(_module, _args, output):
        count.append(1)
        return output + len(count)

    tower.encoder.layers[-2].register_forward_hook(noise)
    for _ in range(4):
        memo.changed(changing, model.state_dict())
        answer(model, memo, inputs, "batch")
    assert len(count) == 4
    assert not any(memo.calls.values())


def test_what_a_model_writes_into_its_features_does_not_stay_there():
    model, memo, _, _ = setup("llava")
    inputs, changing = tiny_inputs.inputs("llava"), language(model)
    for point in range(4):
        memo.changed(changing, model.state_dict())
        with torch.inference_mode(), memo.batch("batch"):
            found = model.model.get_image_features(inputs["pixel_values"], return_dict=True)
        first = [f.clone() for f in found.pooler_output] if point == 0 else first
        assert all(map(torch.equal, found.pooler_output, first))
        with torch.inference_mode():
            for feature in found.pooler_output:
                feature.zero_()


def test_the_recorder_sees_views_and_fused_operators():
    layer = torch.nn.MultiheadAttention(4, 2, batch_first=True).eval()
    other = torch.nn.Linear(4, 4)
    names = {address(p): n for n, p in [*layer.named_parameters(), *other.named_parameters()]}
    x = torch.zeros(1, 3, 4)
    with torch.inference_mode(), ReadRecorder(names) as recorder:
        layer(x, x, x)
    assert recorder.seen == {address(p) for p in layer.parameters()}

"""Verified drafts give what plain greedy decoding gives."""

from types import SimpleNamespace

import pytest
import torch

from omnimerge.bench import zoo
from omnimerge.bench.zoo import demo
from omnimerge.engine import build_plan, load_recipe, merged_tensors
from omnimerge.errors import GenerationError
from omnimerge.generate import Generator, Prompt, Response, drafting, read_prompts
from omnimerge.generate.drafting import Drafter
from omnimerge.generate.drafts import Choices, Followed, Row, judge, tolerance
from omnimerge.generate.greedy import until_stop
from omnimerge.generate.quiet import quiet
from omnimerge.generate.response import GenerationStats

with quiet():
    import tiny_inputs
    import tiny_multimodal
    from transformers import GenerationConfig

LONGEST = 32
STOPS = frozenset({33, 47, 61, 70, 85})
POINTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)


@pytest.fixture
def any_length(monkeypatch):
    """Drafts are taken however short they are."""
    monkeypatch.setattr(drafting, "SHORTEST_MEAN", 0.0)
    monkeypatch.setattr(drafting, "_WORTH_IT", 1e9)


def build(name):
    model = tiny_multimodal.build(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    model.generation_config = GenerationConfig(
        do_sample=False, pad_token_id=0, eos_token_id=sorted(STOPS)
    )
    return model


def perturb(model, point, size):
    with torch.no_grad():
        for parameter in model.get_decoder().parameters():
            random = torch.Generator().manual_seed(point)
            noise = torch.randn(parameter.shape, generator=random)
            parameter.add_(size * parameter.std(correction=0) * noise)


def decode(model, inputs):
    with torch.inference_mode(), quiet():
        output = model.generate(**inputs, max_new_tokens=LONGEST)
    rows = output[:, inputs["input_ids"].shape[1] :].tolist()
    return [tuple(until_stop(row, STOPS)) for row in rows]


def drafted(model, drafter, inputs, drafts):
    """What a generator does with one batch, and how many samples were decoded on."""
    responses = [Response(str(i), "", tokens) for i, tokens in enumerate(drafts)]
    with quiet():
        found = drafter.verify(inputs, responses, LONGEST, torch.no_grad)
        rows = [found[i] for i in range(len(found)) if isinstance(found[i], Row)]
        if rows and all(row.cached is not None for row in rows):
            more = iter(drafter.resume(rows, LONGEST))
        else:
            plain = decode(model, inputs)
            more = iter([plain[i] for i, f in enumerate(found) if isinstance(f, Row)])
    return [tuple(next(more)) if isinstance(f, Row) else f for f in found], len(rows)


RESTARTED = ("mllama", "qwen3_5")  # the cache holds more, or other things, than keys per token


@pytest.mark.parametrize(
    "name", [n for n in tiny_inputs.MAKERS if n not in ("blip-2", "chameleon")]
)
def test_every_architecture(name):
    model, inputs = build(name), tiny_inputs.inputs(name)
    drafter = Drafter(model, STOPS, GenerationStats())
    with quiet():
        assert drafter.doubt(inputs, torch.no_grad) == ""
    drafts = decode(model, inputs)
    assert drafted(model, drafter, inputs, drafts) == (drafts, 0)
    redone = 0
    for point in range(3):
        perturb(model, point, 0.03)
        expected = decode(model, inputs)
        found, left = drafted(model, drafter, inputs, drafts)
        assert found == expected
        drafts, redone = expected, redone + left
    cut = [tokens[: len(tokens) // 2] for tokens in drafts]
    wrong = [(*tokens[:3], 91, 92, 93) for tokens in drafts]
    for given in (cut, wrong, [()] * 3, [(90,) * LONGEST] * 3):
        assert drafted(model, drafter, inputs, given)[0] == drafts
    assert drafter._resumes == (name not in RESTARTED)


def test_an_architecture_that_decodes_in_its_own_way_is_found_out():
    model, inputs = build("blip-2"), tiny_inputs.inputs("blip-2")
    with quiet():
        assert Drafter(model, STOPS, GenerationStats()).doubt(inputs, torch.no_grad)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The miniature pair: a function alpha -> tensors, and prompts."""
    folder = tmp_path_factory.mktemp("demo") / "demo"
    demo.prepare(folder)
    plan = build_plan(load_recipe(folder / "recipe.yaml", defaults={"alpha": 0.0}))
    [file] = (folder / "prompts").glob("*.jsonl")
    return lambda alpha: merged_tensors(plan, {"alpha": alpha}), read_prompts(file)


def endless(generator):
    """Let no answer end."""
    answering = generator._answering
    answering._stops = answering._drafter._stops = frozenset()
    config = generator.model.generation_config
    generator.model.generation_config = GenerationConfig(
        do_sample=False, pad_token_id=config.pad_token_id
    )
    return generator


@pytest.mark.parametrize("longest", [4, 12])
def test_miniatures_answer_the_same_at_every_point(pair, any_length, longest):
    at, prompts = pair
    plain, fast = (Generator.load(zoo.path(demo.TARGET)) for _ in range(2))
    if longest > 4:
        endless(plain), endless(fast)
    drafts = None
    for alpha in POINTS:
        plain.set_weights(at(alpha))
        fast.set_weights(at(alpha))
        size = {"max_new_tokens": longest, "batch_size": 16}
        expected = plain.responses(prompts, **size)
        assert fast.responses(prompts, drafts=drafts, **size) == expected
        drafts = expected
    stats = fast.stats
    assert (stats.drafts_taken, stats.drafts_in_16_bits) == (6, 0)
    assert stats.samples_answered == 700
    assert stats.samples_verified + stats.samples_redone == 600
    assert stats.samples_redone > 20
    assert stats.tokens_verified > stats.tokens_decoded / 2
    assert stats.tokens_verified + stats.tokens_decoded == plain.stats.tokens_decoded
    assert stats.inputs_encoded == 7 + 1  # batches, and the canary's
    assert stats.features_reused >= 5 * 7
    if longest > 4:
        assert stats.forward_passes < 0.8 * plain.stats.forward_passes


def test_in_16_bits_it_goes_on_from_the_first_token():
    draft = (5, 6, 7)
    answer = followed((5, 6, 8, 9))
    assert judge(answer, [draft], {2}, 9) == [Row((5, 6, 8))]
    assert judge(answer, [draft], {2}, 9, precise=False) == [Row((5,))]


def test_in_16_bits_drafts_differ_no_more_than_batches_do(pair, any_length):
    at, prompts = pair
    prompts = prompts[:40]
    plain, fast, other = (
        endless(Generator.load(zoo.path(demo.TARGET), dtype="bfloat16")) for _ in range(3)
    )
    drafts, left, unlike = None, 0, 0
    for alpha in POINTS[:3]:
        for generator in (plain, fast, other):
            generator.set_weights(at(alpha))
        expected = plain.responses(prompts, max_new_tokens=8, batch_size=16)
        found = fast.responses(prompts, max_new_tokens=8, batch_size=16, drafts=drafts)
        batched = other.responses(prompts, max_new_tokens=8, batch_size=7)
        left += sum(a != b for a, b in zip(found, expected, strict=True))
        unlike += sum(a != b for a, b in zip(batched, expected, strict=True))
        drafts = expected
    assert (fast.stats.drafts_taken, fast.stats.drafts_in_16_bits) == (2, 2)
    assert left <= unlike + 2  # of 120


@pytest.mark.parametrize("name", ["qwen2", "qwen2_bare", "qwen2_vl", "llava_onevision"])
def test_padding_and_images(folders, images, any_length, name):
    multimodal = name in ("qwen2_vl", "llava_onevision")
    prompts = [
        Prompt(str(i), "what " + "is " * i, (images[i % 3],) if multimodal and i % 3 else ())
        for i in range(10)
    ]
    generator = Generator.load(folders[name])
    expected = generator.responses(prompts, max_new_tokens=LONGEST)
    drafts = [
        Response(r.id, r.text, r.tokens if i % 2 else (*r.tokens[: 3 * i], 300, 301))
        for i, r in enumerate(expected)
    ]
    for batch_size in (1, 3, 16):
        found = generator.responses(
            prompts, max_new_tokens=LONGEST, batch_size=batch_size, drafts=drafts
        )
        assert found == expected
    assert generator.stats.samples_redone > 0


def test_drafts_longer_than_an_answer_may_be_are_cut(folders, any_length):
    generator = Generator.load(folders["qwen2"])
    prompts = [Prompt("a", "what"), Prompt("b", "what is it")]
    long = generator.responses(prompts, max_new_tokens=LONGEST)
    short = generator.responses(prompts, max_new_tokens=5)
    assert generator.responses(prompts, max_new_tokens=5, drafts=long) == short
    assert generator.responses(prompts, max_new_tokens=LONGEST, drafts=short) == long


def test_a_model_that_says_nothing(folders, any_length):
    generator = Generator.load(folders["qwen2"])
    everything = frozenset(range(400))
    generator._answering._stops = generator._answering._drafter._stops = everything
    generator.model.generation_config.eos_token_id = sorted(everything)
    prompts = [Prompt("a", "what"), Prompt("b", "what is it")]
    nothing = [Response("a", ""), Response("b", "")]
    assert generator.responses(prompts) == nothing
    assert generator.responses(prompts, drafts=nothing) == nothing
    assert generator.stats.samples_verified == 2
    assert [len(t) for t in generator.teacher_forced(prompts, nothing)] == [1, 1]


def followed(tokens, close=None):
    """A batch of one that was followed, without a cache."""
    choices = Choices(tuple(tokens), tuple(close or [False] * len(tokens)))
    return Followed([choices], None, torch.ones(1, 4), None)


@pytest.mark.parametrize(
    ("draft", "chosen", "close", "expected"),
    [
        ((5, 6), (5, 6, 2), None, (5, 6)),  # equal to the token that ends it
        ((5, 6), (5, 6, 7), None, Row((5, 6, 7))),  # the model goes on
        ((5, 6), (5, 2, 7), None, (5,)),  # the model ends before
        ((5, 6), (5, 7, 7), None, Row((5, 7))),  # another token
        ((5, 6), (2, 6, 7), None, ()),
        ((5, 6), (5, 6, 7), (False, True, False), Row((5,))),  # too close: decoded from there
        ((5, 6), (5, 6, 2), (False, False, True), Row((5, 6))),
        ((), (2,), None, ()),
        ((), (7,), None, Row((7,))),
        ((5, 6, 7, 8), (5, 6, 7, 8, 9), None, (5, 6, 7, 8)),  # as long as an answer may be
        ((5, 6, 7, 8), (5, 6, 7, 9, 9), None, (5, 6, 7, 9)),
        ((5, 6, 7, 8), (5, 6, 7, 8, 9), (False,) * 4 + (True,), (5, 6, 7, 8)),
    ],
)
def test_where_a_draft_is_left(draft, chosen, close, expected):
    assert judge(followed(chosen, close), [draft], {2}, 4) == [expected]


def test_tolerance_grows_with_logits_and_shrinks_with_precision():
    best = torch.tensor([0.1, 20.0])
    single, half = (tolerance(best, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert single[1] == 20 * single[0]
    assert 6e-4 < float(single[1]) < 7e-4
    assert 0.6 < float(half[1]) < 0.7


def test_short_drafts_are_refused(folders):
    generator = Generator.load(folders["qwen2"])
    prompts = [Prompt("a", "what"), Prompt("b", "what is it")]
    drafts = [Response("a", "x", (5,)), Response("b", "x", (5, 6))]
    expected = generator.responses(prompts, max_new_tokens=8)
    assert generator.responses(prompts, max_new_tokens=8, drafts=drafts) == expected
    assert (generator.stats.drafts_taken, generator.stats.drafts_refused) == (0, 1)
    assert "drafts of 1.5 tokens on average" in generator.stats.refusal


def test_drafts_that_did_not_pay_are_left_out_once(folders):
    generator = Generator.load(folders["qwen2"])
    prompts = [Prompt("a", "what"), Prompt("b", "what is it")]
    expected = generator.responses(prompts, max_new_tokens=8)
    wrong = [Response(p.id, "", (300,) * 8) for p in prompts]
    for _ in range(4):
        assert generator.responses(prompts, max_new_tokens=8, drafts=wrong) == expected
    assert (generator.stats.drafts_taken, generator.stats.drafts_refused) == (2, 2)
    assert generator.stats.refusal == "the drafts before saved too little"


def test_a_model_that_cannot_take_several_tokens_decodes_plainly(folders, any_length):
    generator = Generator.load(folders["qwen2"])
    prompts = [Prompt(str(i), "what " * (i + 1)) for i in range(5)]
    expected = generator.responses(prompts, max_new_tokens=8)
    original = generator.model.forward

    def broken(input_ids=None, past_key_values=None, **kwargs):
        found = original(input_ids=input_ids, past_key_values=past_key_values, **kwargs)
        if past_key_values.get_seq_length() > input_ids.shape[1] > 1:
            found.logits = found.logits.flip(-1)
        return found

    generator.model.forward = broken
    assert generator.responses(prompts, max_new_tokens=8, drafts=expected) == expected
    assert "differ when several tokens are fed at once" in generator.stats.refusal
    assert (generator.stats.drafts_taken, generator.stats.drafts_refused) == (0, 1)
    with pytest.raises(GenerationError, match="cannot follow given answers"):
        generator.teacher_forced(prompts, expected)


def test_a_model_that_fails_on_several_tokens_decodes_plainly(folders, any_length, monkeypatch):
    generator = Generator.load(folders["qwen2"])
    prompts = [Prompt("a", "what")]
    expected = generator.responses(prompts, max_new_tokens=8)

    def failing(*_args, **_kwargs):
        raise TypeError("unexpected keyword argument 'logits_to_keep'")

    monkeypatch.setattr(drafting, "follow", failing)
    assert generator.responses(prompts, max_new_tokens=8, drafts=expected) == expected
    assert "unexpected keyword argument" in generator.stats.refusal


def test_an_encoder_decoder_model_is_refused():
    config = SimpleNamespace(is_encoder_decoder=True)
    model = SimpleNamespace(config=config, dtype=torch.float32)
    stats = GenerationStats()
    drafter = Drafter(model, frozenset(), stats)
    assert not drafter.takes([Response("a", "", (1,) * 9)], 32)
    assert "encoder-decoder" in stats.refusal


@pytest.mark.parametrize("name", ["qwen2", "qwen2_vl"])
def test_teacher_forcing_gives_the_models_own_next_tokens(folders, images, name):
    generator = Generator.load(folders[name])
    shown = (images[0],) if name == "qwen2_vl" else ()
    prompts = [Prompt(str(i), "what " * (i + 1), shown) for i in range(5)]
    own = generator.responses(prompts, max_new_tokens=8)
    followed = generator.teacher_forced(prompts, own, batch_size=3)
    assert all(tokens[: len(r.tokens)] == r.tokens for tokens, r in zip(followed, own, strict=True))
    assert all(len(tokens) == len(r.tokens) + 1 for tokens, r in zip(followed, own, strict=True))
    stops = generator._answering._stops
    ended = [t[-1] in stops for t, r in zip(followed, own, strict=True) if len(r.tokens) < 8]
    assert all(ended)

    other = [Response(r.id, "", (60, 61, *r.tokens[2:5])) for r in own]
    found = generator.teacher_forced(prompts, other)
    assert [tokens[0] for tokens in found] == [r.tokens[0] for r in own]
    for prompt, answer, tokens in zip(prompts, other, found, strict=True):
        encoded = generator.processor.encode([prompt])
        fed = torch.tensor([answer.tokens])
        inputs = {**encoded, "input_ids": torch.cat([encoded["input_ids"], fed], dim=1)}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if "mm_token_type_ids" in inputs:
            kinds = inputs["mm_token_type_ids"]
            inputs["mm_token_type_ids"] = torch.cat([kinds, torch.zeros_like(fed)], dim=1)
        with torch.inference_mode():
            logits = generator.model(**inputs).logits[0, -len(answer.tokens) - 1 :]
        assert tokens == tuple(logits.argmax(-1).tolist())


def test_drafts_have_to_be_those_of_the_prompts(folders):
    generator = Generator.load(folders["qwen2"])
    prompts = [Prompt("a", "what"), Prompt("b", "what is it")]
    for given in ([Response("a", "")], [Response("b", ""), Response("a", "")]):
        with pytest.raises(GenerationError, match="do not match the 2 prompts one by one"):
            generator.responses(prompts, drafts=given)
        with pytest.raises(GenerationError, match="do not match the 2 prompts one by one"):
            generator.teacher_forced(prompts, given)

"""Batches of similar length, and what happens when one does not fit into memory."""

from types import SimpleNamespace

import pytest
import torch

from omnimerge.errors import GenerationError
from omnimerge.generate.batching import (
    BatchLimit,
    Size,
    batches,
    in_batches,
    is_out_of_memory,
    tokens_that_fit,
)
from omnimerge.generate.response import GenerationStats


def sizes(*rows):
    return [Size((images, 0, 0), pixels, tokens) for images, pixels, tokens in rows]


def test_longest_first_and_image_counts_apart():
    asked = sizes((0, 0, 5), (1, 100, 3), (0, 0, 9), (1, 400, 1), (1, 100, 8), (0, 0, 5))
    # with an image, by pixels then text: 3, 4, 1; without: 2, then 0 and 5 in their order
    assert batches(asked, 2) == [[3, 4], [1], [2, 0], [5]]
    assert batches(asked, 99) == [[3, 4, 1], [2, 0, 5]]
    assert batches([], 4) == []


def test_sounds_and_videos_apart():
    asked = [Size((0, 1, 0), 9, 5), Size((0, 0, 1), 9, 5), Size((0, 1, 0), 9, 5)]
    assert batches(asked, 9) == [[0, 2], [1]]


def test_automatic_batches_hold_few_large_prompts_and_many_small_ones():
    small, large = Size((1, 0, 0), 48 * 48, 20), Size((1, 0, 0), 1000 * 1000, 20)
    assert [len(b) for b in batches([small] * 70 + [large] * 2, None)] == [1, 1, 64, 6]
    assert [len(b) for b in batches([large] * 20, None, 32768)] == [12, 8]
    assert batches([Size((1, 0, 0), 10**9, 20)], None) == [[0]]


def test_a_batch_size_does_not_lift_the_bound_on_tokens():
    short, long = Size((0, 0, 0), 0, 40), Size((0, 0, 0), 0, 4000)
    found = batches([short] * 29 + [long], 64)
    assert [len(b) for b in found] == [1, 29] and found[0] == [29]
    assert [len(b) for b in batches([short] * 200, 128, 1 << 20)] == [128, 72]
    assert [len(b) for b in batches([short] * 100, None, 1 << 20)] == [64, 36]


def test_room_on_a_gpu_is_what_is_free_over_what_a_token_takes(monkeypatch):
    text = SimpleNamespace(
        num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, hidden_size=3584,
        intermediate_size=18944, vocab_size=152064,
    )  # fmt: skip
    model = SimpleNamespace(
        device=torch.device("cuda"), dtype=torch.bfloat16,
        config=SimpleNamespace(get_text_config=lambda decoder: text),
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 << 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1 << 30)
    # keys and values 2 * 28 * 4 * 128, passing 8 * 3584 + 3 * 18944, in 2 bytes; logits in 4
    token = 2 * (28672 + 28672 + 56832) + 4 * 152064
    assert tokens_that_fit(model) == (4 << 30) // token == 5133
    model.device = torch.device("cpu")
    assert tokens_that_fit(model) == 4096
    model.device, model.config = torch.device("cuda"), SimpleNamespace()
    assert tokens_that_fit(model) == 32768


def run(groups, fits, *, error=None):
    """Work that fails on batches of more than `fits`; returns what was done, and the stats."""
    stats = GenerationStats()
    tried = []

    def work(batch):
        tried.append(list(batch))
        if len(batch) > fits:
            raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return [-i for i in batch]

    done = in_batches(groups, BatchLimit(stats), work, lambda i: f"prompt 'p{i}'")
    return done, tried, stats


def test_what_does_not_fit_is_halved_and_so_is_all_after_it():
    done, tried, stats = run([range(8), range(8, 12), range(12, 13)], 3)
    found = list(done)
    assert [i for batch, _ in found for i in batch] == list(range(13))
    assert all(result == [-i for i in batch] for batch, result in found)
    assert [len(batch) for batch in tried] == [8, 4, 2, 2, 2, 2, 2, 2, 1]
    assert stats.batches_halved == 2


def test_a_limit_learned_is_kept():
    limit = BatchLimit(GenerationStats())
    assert (limit.size(3), limit.size(100)) == (3, 100)
    limit.halve(4)
    assert (limit.size(1), limit.size(100)) == (1, 2)


def test_a_prompt_that_does_not_fit_is_named_after_the_others_were_given():
    error = RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: 9e9 bytes")
    done, _, _ = run([range(2)], 0, error=error)
    with pytest.raises(GenerationError, match=r"prompt 'p0' does not fit .* lower max_new_tokens"):
        list(done)


def test_other_errors_pass():
    done, tried, _ = run([range(4)], 0, error=RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        list(done)
    assert len(tried) == 1


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("no text"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("expected scalar type Float"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_out_of_memory_is_recognised(error, expected):
    assert is_out_of_memory(error) is expected

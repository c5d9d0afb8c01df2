"""Time of a coefficient search: as published, in memory, and with what points have in common.

    python benchmarks/search.py --json benchmarks/results/search.json      # about 4 minutes

Seven points, a hundred prompts with an image each, three ways:

* published: at every point the merged checkpoint is written to disk, loaded, and asked one prompt
  after the other;
* plain: one model whose weights are swapped in place, batches of 16, nothing kept;
* reused: batches as large as seems right, inputs and image features kept, the answers at the point
  before as drafts.

The answers of all are compared token by token, and have to be equal. One thread. In the tables
about drafts inputs and features are kept on both sides, and batches are of 16; seconds there are
those of the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file

from omnimerge.bench import zoo
from omnimerge.bench.saving import published_name
from omnimerge.bench.zoo import demo, miniatures, scenes
from omnimerge.engine import build_plan, load_recipe, merged_tensors, run_plan, with_parameters
from omnimerge.engine.manifest import versions
from omnimerge.generate import Generator, Prompt, Response, drafting, read_prompts

POINTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
PROMPTS, SEED, BATCH = 100, 31, 16
LARGE, SMALL = {"depth": 8, "embed_dim": 256}, {"depth": 1, "embed_dim": 64}
NOISES = (0.002, 0.01, 0.05)
LENGTHS = (2, 4, 6, 8, 16)

T = TypeVar("T")
Answers = list[list[Response]]
Row = dict[str, Any]


class Search:
    """One target, one donor, the same prompts at all points."""

    def __init__(self, target: Path, donor: Path, prompts: list[Prompt], longest: int) -> None:
        recipe = {"method": "adamms", "target": str(target), "models": [str(donor)]}
        self.target = target
        self.prompts = prompts
        self.longest = longest
        self._plan = build_plan(load_recipe(recipe, defaults={"alpha": 0.0}))

    def published(self, scratch: Path) -> Answers:
        """Write, load, and ask one by one."""
        answers = []
        for point in POINTS:
            folder = scratch / "merged"
            shutil.rmtree(folder, ignore_errors=True)
            run_plan(with_parameters(self._plan, {"alpha": point}), folder)
            generator = Generator.load(folder, cache_bytes=0)
            answers.append(self._ask(generator, 1))
        return answers

    def in_memory(self, batch_size: int | None, *, keep: bool) -> Answers:
        """Swap in place, and decode in batches."""
        generator = self._load(keep=keep)
        return [self._ask(generator, batch_size) for _ in self._points(generator)]

    def drafted(self, batch_size: int | None) -> tuple[Answers, Generator]:
        """Keep inputs and features, and verify the answers at the point before."""
        generator = self._load(keep=True)
        answers: Answers = []
        for _ in self._points(generator):
            drafts = answers[-1] if answers else None
            answers.append(self._ask(generator, batch_size, drafts))
        return answers, generator

    def _load(self, *, keep: bool) -> Generator:
        return Generator.load(self.target) if keep else Generator.load(self.target, cache_bytes=0)

    def _points(self, generator: Generator) -> Iterator[float]:
        for point in POINTS:
            generator.set_weights(merged_tensors(self._plan, {"alpha": point}))
            yield point

    def _ask(
        self,
        generator: Generator,
        batch_size: int | None,
        drafts: list[Response] | None = None,
    ) -> list[Response]:
        return generator.responses(
            self.prompts, max_new_tokens=self.longest, batch_size=batch_size, drafts=drafts
        )


def timed(work: Callable[[], T], clock: Callable[[], float] = time.perf_counter) -> tuple[T, float]:
    """Return a result and the seconds that it took."""
    start = clock()
    result = work()
    return result, clock() - start


def changed(answers: Answers) -> float:
    """Share of the answers that differ from those at the point before."""
    pairs = [pair for a, b in pairwise(answers) for pair in zip(a, b, strict=True)]
    return sum(a != b for a, b in pairs) / len(pairs)


def compare(name: str, search: Search, scratch: Path) -> Row:
    """Run a search in all ways; return the row of the table."""
    published, first = timed(lambda: search.published(scratch))
    plain, second = timed(lambda: search.in_memory(BATCH, keep=False))
    larger, third = timed(lambda: search.in_memory(None, keep=False))
    (reused, generator), last = timed(lambda: search.drafted(None))
    assert published == plain == larger == reused, f"{name}: the ways give different answers"
    tokens = [len(response.tokens) for answers in plain for response in answers]
    return {
        "case": name,
        "published_s": first,
        "plain_s": second,
        "plain_automatic_batches_s": third,
        "reused_s": last,
        "over_published": first / last,
        "over_plain": second / last,
        "mean_tokens": sum(tokens) / len(tokens),
        **_drafts(plain, generator),
    }


def drafting_pays(name: str, search: Search) -> Row:
    """Decoding and drafts side by side."""
    clock = time.process_time
    plain, decoded = timed(lambda: search.in_memory(BATCH, keep=True), clock)
    (reused, generator), verified = timed(lambda: search.drafted(BATCH), clock)
    assert plain == reused, f"{name}: drafts change answers"
    ratio = {"decoded_s": decoded, "drafted_s": verified, "ratio": decoded / verified}
    return {"case": name, **ratio, **_drafts(plain, generator)}


def _drafts(answers: Answers, generator: Generator) -> Row:
    stats = generator.stats
    return {"changed": changed(answers), "refusal": stats.refusal, "stats": stats.to_dict()}


def endless(source: Path, folder: Path) -> Path:
    """Copy a checkpoint so that no token ends its answers."""
    shutil.copytree(source, folder)
    for name, key in (
        ("generation_config.json", "eos_token_id"),
        ("tokenizer_config.json", "eos_token"),
    ):
        file = folder / name
        content = json.loads(file.read_text())
        content[key] = None
        file.write_text(json.dumps(content))
    return folder


def random_pair(folder: Path, noise: float, tower: dict[str, int]) -> tuple[Path, Path]:
    """A Qwen2-VL of random weights that never ends, and the same with noise on its LLM."""
    from transformers import Qwen2VLForConditionalGeneration

    config = miniatures.config(miniatures.TARGET)
    for key, value in tower.items():
        setattr(config.vision_config, key, value)
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        config.text_config.initializer_range = 0.2
        model = Qwen2VLForConditionalGeneration(config)
    pair = []
    for number, name in enumerate(("target", "donor")):
        place = endless(zoo.path(demo.TARGET), folder / name)
        tensors = {}
        for key, value in model.state_dict().items():
            if number and "language_model" in key:
                random = torch.Generator().manual_seed(len(tensors))
                step = torch.randn(value.shape, generator=random) * value.std(correction=0)
                value = value + noise * step
            published = published_name(key, miniatures.PUBLISHED[miniatures.TARGET])
            tensors[published] = value.to(torch.bfloat16).contiguous()
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
        config.dtype = torch.bfloat16
        config.architectures = [type(model).__name__]
        config.save_pretrained(place)
        pair.append(place)
    return pair[0], pair[1]


def main() -> None:
    """Run all cases, print and save the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also save the tables here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shortest = drafting.SHORTEST_MEAN  # type: ignore[attr-defined]
    rows, drafts = [], []
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        file = scenes.write_prompts(scratch / "asked", count=PROMPTS, seed=SEED, labels=False)
        prompts = read_prompts(file)
        target, donor = zoo.path(demo.TARGET), zoo.path(demo.DONOR)
        Search(target, donor, prompts, 4).in_memory(BATCH, keep=False)  # what is compiled once
        rows.append(compare("miniatures", Search(target, donor, prompts, 32), scratch))
        long = endless(target, scratch / "long")
        rows.append(compare("miniatures, endless", Search(long, donor, prompts, 32), scratch))
        pair = random_pair(scratch / "large", NOISES[1], LARGE)
        rows.append(compare("large tower", Search(*pair, prompts, 8), scratch))
        for noise in NOISES:
            pair = random_pair(scratch / f"noise-{noise}", noise, SMALL)
            case = f"32 tokens, noise {noise}"
            drafts.append(drafting_pays(case, Search(*pair, prompts, 32)))
        pair = random_pair(scratch / "lengths", NOISES[1], SMALL)
        drafting.SHORTEST_MEAN, drafting._WORTH_IT = 0.0, 1e9  # type: ignore[attr-defined]  # always
        for longest in LENGTHS:
            case = f"{longest} tokens, noise {NOISES[1]}, always drafted"
            drafts.append(drafting_pays(case, Search(*pair, prompts, longest)))
    for row in (*rows, *drafts):
        print("  ".join(f"{k} {_short(v)}" for k, v in row.items() if k not in ("stats",)))
    if options.json:
        machine = {"cores": os.cpu_count(), "processor": platform.machine(), "threads": 1}
        content = {
            "machine": machine,
            "versions": versions(),
            "points": len(POINTS),
            "prompts": PROMPTS,
            "shortest_mean": shortest,
            "searches": rows,
            "drafts": drafts,
        }
        options.json.write_text(json.dumps(content, indent=1) + "\n")


def _short(value: object) -> object:
    return f"{value:.3g}" if isinstance(value, float) else value


if __name__ == "__main__":
    main()

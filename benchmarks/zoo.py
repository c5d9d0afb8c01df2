"""The miniature pair on questions that no setting was chosen on: accuracy per kind and per alpha.

    python benchmarks/zoo.py --json benchmarks/results/zoo.json

The coefficients are searched as `omnimerge search` does; the donor answers through its own tower.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from pathlib import Path

from omnimerge.bench import zoo
from omnimerge.bench.zoo import demo, scenes
from omnimerge.generate import Generator, Prompt, Response, read_prompts, without_answers
from omnimerge.search import search
from omnimerge.search.store import AnswerStore

SEED, COUNT = 9001, 60 * len(scenes.KINDS)


def per_kind(asked: list[Prompt], given: list[Response]) -> dict[str, float]:
    """Share of right answers, in all and per kind of question."""
    right = {r.id: r.text for r in given}
    found: dict[str, list[bool]] = {"all": []}
    for prompt in asked:
        good = right[prompt.id].lower() == str(prompt.answer).lower()
        found["all"].append(good)
        found.setdefault(str(prompt.kind), []).append(good)
    return {kind: round(sum(marks) / len(marks), 3) for kind, marks in found.items()}


def main() -> None:
    """Ask, count, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also save the table here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        labelled = scenes.write_prompts(folder / "labelled", count=COUNT, seed=SEED)
        prompts = scenes.write_prompts(folder / "asked", count=100, seed=SEED + 1, labels=False)
        recipe = {
            "method": "adamms",
            "target": str(zoo.path(demo.TARGET)),
            "models": [str(zoo.path(demo.DONOR))],
        }
        size = {"max_new_tokens": demo.MAX_NEW_TOKENS, "batch_size": demo.BATCH_SIZE}
        result = search(recipe, prompts, folder / "out", heldout=labelled, **size)
        asked = read_prompts(labelled)
        donor = Generator.load(zoo.path(demo.DONOR)).responses(without_answers(asked), **size)
        rows = [{"alpha": "donor alone", "score": None, **per_kind(asked, donor)}]
        store = AnswerStore(folder / "out" / "heldout", [p.id for p in asked])
        for point in result.points:
            answers = store.read(Path(point.responses).stem) or []
            rows.append({"alpha": point.alpha, "score": point.score, **per_kind(asked, answers)})
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    print(f"chosen without labels: alpha {result.alpha:g}")
    if options.json:
        machine = {"cores": os.cpu_count(), "processor": platform.machine()}
        content = {
            "machine": machine,
            "versions": result.versions,
            "questions": COUNT,
            "seed": SEED,
            "selected": result.alpha,
            "rows": rows,
        }
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()

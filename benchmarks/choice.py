"""How good is the choice without labels? Chosen against best coefficient on the miniature pair.

python benchmarks/choice.py --json benchmarks/results/choice.json

One pair of models, trained once; three draws of 200 unlabelled prompts, which is what the seeds are
of; the choice from the first 25, 50, 100 and 200 of each, by every criterion; the accuracy of all
points on 520 held-out labelled prompts. AdaMMS reports a mean loss of 0.2 points a task against the
best interior point.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

from omnimerge.bench import zoo
from omnimerge.bench.zoo import demo, scenes
from omnimerge.search import CRITERIA, search, select
from omnimerge.search.result import SearchResult

COUNTS = (25, 50, 100, 200)
SEEDS = (11, 12, 13)
HELDOUT = 520


def main() -> None:
    """Run the searches and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        labelled = scenes.write_prompts(folder / "labelled", count=HELDOUT, seed=5)
        recipe = {
            "method": "adamms",
            "target": str(zoo.path(demo.TARGET)),
            "models": [str(zoo.path(demo.DONOR))],
        }
        for seed in SEEDS:
            prompts = scenes.write_prompts(
                folder / f"asked{seed}", count=max(COUNTS), seed=seed, labels=False
            )
            out = folder / f"out{seed}"
            result = search(
                recipe, prompts, out, sample=None, heldout=labelled, checks=False,
                max_new_tokens=demo.MAX_NEW_TOKENS, batch_size=demo.BATCH_SIZE,
            )  # fmt: skip
            rows += _choices(result, out, seed)
    _print(rows)
    if options.json:
        machine = {"cores": os.cpu_count(), "processor": platform.machine()}
        content = {"machine": machine, "versions": result.versions, "rows": rows}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


def _choices(result: SearchResult, out: Path, seed: int) -> list[dict[str, Any]]:
    alphas = [point.alpha for point in result.points]
    accuracy = {point.alpha: point.accuracy for point in result.points}
    best = max(alphas[1:-1], key=lambda alpha: (accuracy[alpha], -alpha))
    files = [out / point.responses for point in result.points]
    lines = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    answers = [[row["response"] for row in at_point] for at_point in lines]
    rows = []
    for name, criterion in CRITERIA.items():
        for count in COUNTS:
            scores = criterion([at_point[:count] for at_point in answers])
            chosen = select(alphas, scores).point
            rows.append(
                {
                    "seed": seed,
                    "criterion": name,
                    "prompts": count,
                    "chosen": chosen,
                    "best": best,
                    "lost": round(accuracy[best] - accuracy[chosen], 4),
                    "steps": round(abs(chosen - best) / 0.1),
                    "target": accuracy[0.0],
                    "accuracy": accuracy[chosen],
                }
            )
    return rows


def _print(rows: list[dict[str, Any]]) -> None:
    print("criterion   prompts  within one step  mean accuracy lost  chosen (best)")
    for name in CRITERIA:
        for count in COUNTS:
            here = [r for r in rows if (r["criterion"], r["prompts"]) == (name, count)]
            near = sum(r["steps"] <= 1 for r in here)
            lost = sum(r["lost"] for r in here) / len(here)
            shown = ", ".join(f"{r['chosen']:g} ({r['best']:g})" for r in here)
            print(f"{name:11} {count:7}  {near} of {len(here):10}  {lost:18.4f}  {shown}")


if __name__ == "__main__":
    main()

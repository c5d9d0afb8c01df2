"""A merged model is a model: fine-tune it with PEFT, beside the model it was merged into.

python examples/finetune_merged.py --json benchmarks/results/finetune.json

Merges the shipped miniatures (LLaVA-OneVision into Qwen2-VL), then trains one LoRA adapter for one
kind of question on the merged checkpoint, and one on the unmerged target: same examples, same
steps, same seeds. For a kind that the donor knows and the target does not, and for three that
neither knows. Accuracy is counted on held-out questions before, during and
after, and on all kinds that the two were trained for before and after.
"""

# ruff: noqa: T201

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from transformers import AutoModelForImageTextToText

import omnimerge
from omnimerge.bench import zoo
from omnimerge.bench.zoo import miniatures, quiz, scenes

ALPHA = 0.4
BATCH = 16
RATE = 1e-3
RANK = 8
# The matrices of the language model; the vision tower has none of these names.
TARGETS = r".*language_model\.layers\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"

DOMAINS = {
    "name": "“name the red object.” The donor has learned it, the target has not.",
    "row colour": "“which colour is in the top row?” Neither has learned it.",
    "top colour": "“colour of the topmost object?” Neither has learned it.",
    "reversed": "“name the top row.”, “circle red” Neither has learned it.",
}
# What neither has learned, made of a kind that both have: kind, question, words of the answer.
NEW = {
    "row colour": ("what", "which colour is in the {row} row?", slice(0, 1)),
    "top colour": ("topmost", "colour of the topmost object?", slice(0, 1)),
    "reversed": ("what", "name the {row} row.", slice(None, None, -1)),
}

Sheet = list[tuple[scenes.Scene, scenes.Question]]


def main() -> None:
    """Run the comparison and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=80, help="of training (default 80)")
    parser.add_argument("--questions", type=int, default=200, help="held out, for each test")
    parser.add_argument("--seeds", type=int, default=3, help="number of training seeds")
    parser.add_argument("--domains", nargs="+", default=list(DOMAINS), choices=list(DOMAINS))
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the miniatures' kernels are too small for more
    transformers.utils.logging.disable_progress_bar()

    with tempfile.TemporaryDirectory() as scratch:
        merged = merge(Path(scratch) / "merged")
        models = {"unmerged": zoo.path("mini-qwen2-vl"), "merged": merged}
        rows = [
            compare_one(models, domain, seed, options.steps, options.questions)
            for domain in options.domains
            for seed in range(options.seeds)
        ]
    show(rows)
    if options.json:
        options.json.write_text(json.dumps(result(options, rows), indent=1) + "\n")


def merge(out: Path) -> Path:
    """Merge the miniature pair, as `omnimerge merge` does."""
    recipe = {
        "method": "adamms",
        "target": str(zoo.path("mini-qwen2-vl")),
        "models": [str(zoo.path("mini-llava-onevision"))],
        "parameters": {"alpha": ALPHA},
    }
    omnimerge.merge(recipe, out)
    return out


def compare_one(
    models: dict[str, Path], domain: str, seed: int, steps: int, questions: int
) -> dict[str, Any]:
    """Fine-tune every model for one domain with one seed."""
    print(f"{domain}, seed {seed} …", flush=True)
    heldout = ask(domain, questions, seed=1000)
    curves = {name: fine_tune(path, domain, heldout, seed, steps) for name, path in models.items()}
    return {"domain": domain, "seed": seed, **curves}


def fine_tune(path: Path, domain: str, heldout: Sheet, seed: int, steps: int) -> dict[str, Any]:
    """Train a LoRA adapter; count right answers on the way, and on all else before and after."""
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    others = quiz.exam(count=max(4, len(heldout) // 10), seed=2000)
    elsewhere = [accuracy(model, others)]
    begun = accuracy(model, heldout, only_beginning=True)
    with torch.random.fork_rng():
        torch.random.manual_seed(seed)  # PEFT draws the adapter from the global generator
        model = peft.get_peft_model(
            model, peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS)
        )
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    processor = miniatures.processor("mini-qwen2-vl")
    lessons = ask(domain, steps * BATCH, seed=seed)  # the same ones for both models
    marks = {steps * part // 80 for part in (0, 2, 5, 10, 20, 40, 80)}
    curve = {}
    for step in range(steps + 1):
        if step in marks:
            curve[step] = accuracy(model.eval(), heldout)
        if step < steps:
            batch = encode(processor, lessons[step * BATCH : (step + 1) * BATCH])
            loss = model.train()(**batch, use_cache=False).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    elsewhere.append(accuracy(model, others))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "accuracy": curve,
        "begins_right": begun,
        "elsewhere": elsewhere,
        "loss": round(loss.item(), 4),
        "trained_parameters": trained,
    }


def ask(domain: str, count: int, *, seed: int) -> Sheet:
    """Draw scenes with a question each."""
    rng = np.random.default_rng([seed, *domain.encode()])
    if domain not in NEW:
        return [scenes.sample(rng, domain) for _ in range(count)]
    kind, text, words = NEW[domain]
    sheet = []
    for _ in range(count):
        scene, known = scenes.sample(rng, kind)
        row = next((row for row in scenes.ROWS if row in known.text.split()), "")
        answer = " ".join(known.answer.split()[words])
        sheet.append((scene, scenes.Question(domain, text.format(row=row), answer)))
    return sheet


def encode(processor: Any, lessons: Sheet) -> dict[str, torch.Tensor]:
    """Make a batch; the loss counts the answers alone."""
    asked, told = [], []
    for _, question in lessons:
        content = [{"type": "image"}, {"type": "text", "text": question.text}]
        chat = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        asked.append(text)
        told.append(f"{text}{question.answer}<|im_end|>")
    images = [scenes.draw(scene) for scene, _ in lessons]
    batch = processor(text=told, images=images, padding=True, return_tensors="pt")
    answers = [len(processor.tokenizer(f"{q.answer}<|im_end|>")["input_ids"]) for _, q in lessons]
    labels = torch.full_like(batch["input_ids"], -100)
    for row, length in enumerate(answers):  # padded on the left: answers are at the end
        labels[row, -length:] = batch["input_ids"][row, -length:]
    return {**batch, "labels": labels}


def accuracy(model: Any, sheet: Sheet, *, only_beginning: bool = False) -> float:
    """Return the share of right answers, greedy, by exact match; or of those that begin right."""
    given = quiz.answers("mini-qwen2-vl", model, sheet)
    right = 0
    for answer, (_, question) in zip(given, sheet, strict=True):
        words = question.answer.split()
        said = answer.split()
        right += (said[: len(words)] if only_beginning else said) == words
    return right / len(sheet)


def show(rows: list[dict[str, Any]]) -> None:
    """Print the mean over the seeds."""
    for domain in dict.fromkeys(row["domain"] for row in rows):
        chosen = [row for row in rows if row["domain"] == domain]
        steps = list(chosen[0]["merged"]["accuracy"])
        print(f"\n{domain}: {DOMAINS[domain]}")
        print(f"{'held-out accuracy after step':30}" + "".join(f"{step:>7}" for step in steps))
        for name in ("unmerged", "merged"):
            means = [np.mean([row[name]["accuracy"][step] for row in chosen]) for step in steps]
            print(f"{name:30}" + "".join(f"{mean:7.3f}" for mean in means))
        begun = {
            name: np.mean([row[name]["begins_right"] for row in chosen])
            for name in ("unmerged", "merged")
        }
        print(
            f"{'answers that begin right, at 0':30}"
            + "".join(f"  {name} {share:.3f}" for name, share in begun.items())
        )
        for name in ("unmerged", "merged"):
            before, after = np.mean([row[name]["elsewhere"] for row in chosen], axis=0)
            print(f"{name + ', the 13 known kinds':30}{before:7.3f} before, {after:.3f} after")


def result(options: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what is written as JSON."""
    return {
        "machine": {"processor": platform.machine(), "threads": 1},
        "versions": {
            "omnimerge": omnimerge.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
        "settings": {
            "alpha": ALPHA,
            "steps": options.steps,
            "batch": BATCH,
            "rate": RATE,
            "rank": RANK,
            "questions": options.questions,
        },
        "domains": DOMAINS,
        "rows": rows,
    }


if __name__ == "__main__":
    main()

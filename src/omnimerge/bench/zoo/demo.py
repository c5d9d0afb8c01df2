"""What `omnimerge demo` needs beside the commands that it runs: prompts, a recipe, scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from omnimerge.bench import zoo
from omnimerge.bench.zoo import scenes
from omnimerge.errors import OutputError

TARGET, DONOR = "mini-qwen2-vl", "mini-llava-onevision"
PROMPT_COUNT, HELDOUT_COUNT = 100, 520
MAX_NEW_TOKENS, BATCH_SIZE = 4, 64
_PROMPT_SEED, _HELDOUT_SEED = 11, 12
_MARK = "This folder was written by `omnimerge demo`, which replaces it when it runs again.\n"

GROUPS = {
    "both know": scenes.SHARED_KINDS,
    "only the target learned": scenes.TARGET_KINDS,
    "only the donor learned": scenes.DONOR_KINDS,
    "all": scenes.KINDS,
}
"""Row of the demo's table -> kinds of question."""


def prepare(folder: Path) -> None:
    """Write what a user would bring: a recipe, prompts without labels, and labelled ones.

    Args:
        folder: an empty or new folder, or one of an earlier demo.

    Raises:
        OutputError: if the folder holds something else.
    """
    mark = folder / "README.txt"
    if folder.exists() and any(folder.iterdir()) and not mark.is_file():
        raise OutputError(f"{folder} holds files of yours; give another folder with -o")
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(_MARK, encoding="utf-8")
    scenes.write_prompts(folder / "prompts", count=PROMPT_COUNT, seed=_PROMPT_SEED, labels=False)
    scenes.write_prompts(folder / "heldout", count=HELDOUT_COUNT, seed=_HELDOUT_SEED, labels=True)
    recipe = {
        "method": "adamms",
        "target": str(zoo.path(TARGET)),
        "models": [str(zoo.path(DONOR))],
    }
    text = yaml.safe_dump(recipe, sort_keys=False)
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")


def score(checkpoint: Path, prompts: Path) -> dict[str, float]:
    """Load a checkpoint with transformers, let it answer labelled prompts, and count.

    Args:
        checkpoint: the folder.
        prompts: a JSONL file whose lines have ``answer`` and ``kind``.

    Returns:
        Accuracy in [0, 1] per group of `GROUPS`.

    Raises:
        GenerationError: if a tensor is missing, unexpected or of another shape.
    """
    from omnimerge.generate import Generator, read_prompts, without_answers
    from omnimerge.search import accuracy

    asked = read_prompts(prompts)
    responses = Generator.load(checkpoint).responses(
        without_answers(asked), max_new_tokens=MAX_NEW_TOKENS, batch_size=BATCH_SIZE
    )
    found = {}
    for group, kinds in GROUPS.items():
        chosen = [i for i, prompt in enumerate(asked) if prompt.kind in kinds]
        found[group] = accuracy(_pick(asked, chosen), _pick(responses, chosen)) or 0.0
    return found


def _pick(entries: Sequence, chosen: Sequence[int]) -> list:  # type: ignore[type-arg]
    return [entries[i] for i in chosen]

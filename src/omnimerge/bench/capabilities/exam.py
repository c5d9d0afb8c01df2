"""Held-out questions on disk, as prompt files that `omnimerge search` reads, and their marking."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from omnimerge.bench.capabilities.tasks import TASKS, Question, Scene, scenes_of
from omnimerge.bench.capabilities.tasks.task import Part
from omnimerge.bench.line import Scores
from omnimerge.generate import Prompt, Response, read_prompts

FOLDER = "prompts"
MAX_NEW_TOKENS = 6
"""Enough for the longest answer, a word or a box of four characters, and the end of the turn."""


def sheet(
    task: str, kinds: Sequence[str], part: Part, count: int, *, seed: int
) -> list[tuple[Scene, Question]]:
    """Draw questions about scenes that no training saw, as many of each kind.

    Args:
        task: the task's name.
        kinds: which kinds of question.
        part: what for.
        count: how many questions in total, rounded down to as many of each kind.
        seed: same seed, same questions.

    Returns:
        A scene with a question each, kind after kind.
    """
    wanted = max(1, count // len(kinds))
    scenes = scenes_of(TASKS[task], part, seed=seed)
    drawn: list[tuple[Scene, Question]] = []
    for kind in kinds:
        found: dict[bytes, tuple[Scene, Question]] = {}  # no picture twice
        while len(found) < wanted:
            scene = next(scenes)
            asked = TASKS[task].questions(scene, kind)
            if asked:
                found.setdefault(scene.draw().tobytes(), (scene, asked[len(found) % len(asked)]))
        drawn += found.values()
    return drawn


def write(folder: Path, part: Part, count: int, *, kinds: Sequence[str], seed: int) -> None:
    """Write the questions of all tasks: ``prompts/PART.jsonl`` and a picture each.

    Args:
        folder: a built folder.
        part: ``val`` or ``test``.
        count: questions of each task.
        kinds: which kinds of question, ``task.kind`` each.
        seed: same seed, same files.
    """
    pictures = folder / FOLDER / part
    pictures.mkdir(parents=True, exist_ok=True)
    lines = []
    for task in TASKS:
        chosen = [kind.partition(".")[2] for kind in kinds if kind.startswith(f"{task}.")]
        for number, (scene, question) in enumerate(sheet(task, chosen, part, count, seed=seed)):
            name = f"{task}-{number:04}"
            scene.draw().save(pictures / f"{name}.png")
            entry = {
                "id": name,
                "prompt": question.text,
                "image": f"{part}/{name}.png",
                "answer": question.answer,
                "kind": f"{task}.{question.kind}",
            }
            lines.append(json.dumps(entry))
    (folder / FOLDER / f"{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def read(folder: Path, part: Part) -> list[Prompt]:
    """Read the questions that `write` wrote.

    Args:
        folder: a built folder.
        part: ``val`` or ``test``.

    Returns:
        The prompts, with their answers.
    """
    return read_prompts(folder / FOLDER / f"{part}.jsonl")


def mark(prompts: Sequence[Prompt], responses: Sequence[Response]) -> Scores:
    """Mark answers.

    Args:
        prompts: the questions, with the right answers.
        responses: one per prompt.

    Returns:
        Task -> share of right answers.
    """
    marks: dict[str, list[bool]] = {task: [] for task in TASKS}
    for prompt, response in zip(prompts, responses, strict=True):
        task = (prompt.kind or "").partition(".")[0]
        marks[task].append(TASKS[task].right(prompt.answer or "", response.text))
    return {task: sum(found) / len(found) for task, found in marks.items()}

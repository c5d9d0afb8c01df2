"""The two lines over five capabilities: fully fine-tuned experts, and LoRA experts.

This file imports neither torch nor transformers until something is built or asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omnimerge.bench import results
from omnimerge.bench.capabilities.presets import MIXTURE, PRESETS
from omnimerge.bench.capabilities.tasks import TASKS
from omnimerge.bench.line import BASE, BenchError, Line, Report, Scores, Split

if TYPE_CHECKING:
    from omnimerge.generate import Generator, Prompt, Response


@dataclass(frozen=True)
class CapabilityLine:
    """A line over the five tasks; see `omnimerge.bench.line.Line`.

    Attributes:
        name: what ``--line`` takes.
        model: the miniature, a name of `omnimerge.bench.capabilities.models`.
        lora: whether the experts are LoRA adapters.
        about: one line for people.
    """

    name: str
    model: str
    lora: bool
    about: str

    @property
    def columns(self) -> tuple[str, ...]:
        """The tasks."""
        return tuple(TASKS)

    @property
    def experts(self) -> tuple[str, ...]:
        """One expert per task, named like it."""
        return tuple(TASKS)

    @property
    def references(self) -> tuple[str, ...]:
        """The model trained on all experts' data together."""
        return (MIXTURE,)

    @property
    def presets(self) -> tuple[str, ...]:
        """Sizes of the training."""
        return tuple(PRESETS[self.name])

    def settings(self, preset: str) -> dict[str, Any]:
        """Tell what a preset holds.

        Args:
            preset: one of `presets`.

        Returns:
            Steps, rates, kinds of question and numbers.
        """
        return asdict(PRESETS[self.name][preset])

    def build(self, folder: Path, *, preset: str, seed: int, on_progress: Report) -> None:
        """Train base, experts and mixture, and write the held-out questions.

        Args:
            folder: where to; exists.
            preset: one of `presets`.
            seed: same seed, same bytes.
            on_progress: told how far it is.
        """
        from omnimerge.bench.capabilities import exam, training

        sizes = PRESETS[self.name][preset]
        for part in ("val", "test"):
            count = sizes.questions[part]
            exam.write(folder, part, count, kinds=list(sizes.kinds), seed=seed)
        training.build(
            self.model, folder, sizes, lora=self.lora, seed=seed, on_progress=on_progress
        )

    def trainer(self, folder: Path) -> Callable[[Path, float], None]:
        """Return what trains the experts again, for longer or shorter.

        Args:
            folder: a built folder.

        Returns:
            Takes a folder, which gets one subfolder per expert, and a factor on the usual steps.
        """
        from omnimerge.bench.capabilities import training

        built = results.read(results.Build, folder / results.BUILD_NAME)
        sizes = PRESETS[self.name][built.preset]

        def train(out: Path, factor: float) -> None:
            expert = replace(sizes.expert, steps=max(1, round(factor * sizes.expert.steps)))
            training.train_experts(
                self.model,
                folder,
                replace(sizes, expert=expert),
                lora=self.lora,
                seed=built.seed,
                out=out,
            )

        return train

    def recipe(self, folder: Path, method: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Return the recipe that merges all experts: the matrices of the LLM's layers, as OptMerge.

        Args:
            folder: a built folder.
            method: name of a merge method.
            parameters: its keywords.

        Returns:
            What `load_recipe` takes.
        """
        key = "adapter" if self.lora else "model"
        return {
            "method": method,
            "base": str(folder / BASE),
            "models": [{key: str(folder / expert)} for expert in self.experts],
            "parameters": dict(parameters),
            "select": "linear",
        }

    def task_vectors(self, folder: Path) -> dict[str, Any]:
        """Return a recipe whose base and models are those that task vectors are measured of.

        Args:
            folder: a built folder.

        Returns:
            What `load_recipe` takes.
        """
        return self.recipe(folder, "task_arithmetic", {})

    def subject(self, folder: Path) -> Merged:
        """Load the base, to take merges.

        Args:
            folder: a built folder.

        Returns:
            The model.
        """
        return Merged(folder)

    def alone(self, folder: Path, name: str, split: Split) -> Scores:
        """Score the base, an expert or the mixture-trained model.

        Args:
            folder: a built folder.
            name: which.
            split: which questions.

        Returns:
            Column -> share of right answers.
        """
        if name not in (BASE, *self.experts, *self.references):
            raise BenchError(f"the line {self.name} has no model {name!r}")
        if self.lora and name in self.experts:
            recipe = self.recipe(folder, "task_arithmetic", {"scale": 1.0})
            recipe["models"] = [{"adapter": str(folder / name)}]
            merged = Merged(folder)
            merged.put(recipe)
            return merged.score(split)
        return Merged(folder, name).score(split)

    def warm_up(self, recipe: Mapping[str, Any]) -> None:
        """Plan what `write` does, so that all code that it needs is loaded.

        Args:
            recipe: from `recipe`.
        """
        from omnimerge.engine import build_plan, load_recipe

        build_plan(load_recipe(recipe))

    def write(self, recipe: Mapping[str, Any], out: Path) -> None:
        """Merge to disk.

        Args:
            recipe: from `recipe`.
            out: the folder to create.
        """
        from omnimerge.engine import build_plan, load_recipe, run_plan

        run_plan(build_plan(load_recipe(recipe)), out, overwrite=True)

    def check(self, out: Path) -> None:
        """Load a written merge with transformers, and let it answer one question.

        Args:
            out: what `write` wrote.
        """
        from PIL import Image

        from omnimerge.bench.capabilities.tasks import IMAGE_SIZE
        from omnimerge.generate import Generator, Prompt

        picture = out / "blank.png"
        try:
            Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE)).save(picture)
            asked = Prompt("check", "how many objects", (picture,))
            Generator.load(out).responses([asked], max_new_tokens=1)
        finally:
            picture.unlink(missing_ok=True)


class Merged:
    """One loaded model of a built folder, which takes merges; see `Subject`.

    Args:
        folder: the built folder.
        name: which of its models to load.
    """

    def __init__(self, folder: Path, name: str = BASE) -> None:
        from omnimerge.bench.capabilities import exam
        from omnimerge.generate import Generator, without_answers

        self._generator: Generator = Generator.load(folder / name)
        self._labelled: dict[str, list[Prompt]] = {
            split: exam.read(folder, split) for split in ("val", "test")
        }
        self._prompts = {name: without_answers(asked) for name, asked in self._labelled.items()}
        self._drafts: dict[str, list[Response]] = {}
        self._answers: dict[str, list[Response]] = {}

    def put(self, recipe: Mapping[str, Any]) -> None:
        """Merge in memory and take the result.

        Args:
            recipe: what to merge.
        """
        from omnimerge.engine import build_plan, load_recipe, merged_tensors

        plan = build_plan(load_recipe(recipe), ancestor=False)
        self._answers = {}
        self._generator.set_weights(merged_tensors(plan))

    def score(self, split: Split) -> Scores:
        """Score the model as it is now.

        Args:
            split: which questions.

        Returns:
            Column -> share of right answers.
        """
        from omnimerge.bench.capabilities import exam

        return exam.mark(self._labelled[split], self._answered(split))

    def answers(self) -> Sequence[str]:
        """Answer the validation questions, whose labels are not looked at.

        Returns:
            One text per question.
        """
        return [response.text for response in self._answered("val")]

    def _answered(self, split: str) -> list[Response]:
        from omnimerge.bench.capabilities.exam import MAX_NEW_TOKENS

        if split not in self._answers:
            found = self._generator.responses(
                self._prompts[split],
                max_new_tokens=MAX_NEW_TOKENS,
                drafts=self._drafts.get(split),
            )
            self._answers[split] = self._drafts[split] = found
        return self._answers[split]


INTERNVL: Line = CapabilityLine(
    "internvl",
    "mini-internvl",
    lora=False,
    about="InternVL over a small Qwen2; five fully fine-tuned experts",
)
"""As OptMerge's Table 2."""

QWEN2VL: Line = CapabilityLine(
    "qwen2vl", "mini-qwen2-vl", lora=True, about="Qwen2-VL; five LoRA experts trained with PEFT"
)
"""As OptMerge's Table 3."""

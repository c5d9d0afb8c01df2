"""The modality line: experts that see, hear and watch, composed into one model that does all three.

A question is shown with the media that it needs. A model on its own is shown those of its own
modality only, as the paper's experts are; the composed model and the online reference are shown
all of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omnimerge.bench.line import BASE, BenchError, Report, Scores, Split
from omnimerge.bench.modalities.places import ADAPTERS, TOWERS
from omnimerge.bench.modalities.world import COLUMNS, MODALITIES, Modality

if TYPE_CHECKING:
    from omnimerge.bench.modalities.asking import Asked

ONLINE = "online"
LLM = "llm"
_COMPOSED = "base"  # the folder of the composed model with the base's language model
_SETTINGS = "line.json"


@dataclass(frozen=True)
class ModalityLine:
    """The line; see `omnimerge.bench.line.Line`."""

    name: str = "modality"
    about: str = "image, audio and video experts over one mini-LLM, composed into one model"
    columns: tuple[str, ...] = COLUMNS
    experts: tuple[str, ...] = MODALITIES
    references: tuple[str, ...] = (ONLINE,)
    presets: tuple[str, ...] = ("full", "quick")

    def settings(self, preset: str) -> dict[str, Any]:
        """Tell what a preset holds.

        Args:
            preset: one of `presets`.

        Returns:
            Steps, rates and numbers.
        """
        from omnimerge.bench.modalities.training import PRESETS

        return asdict(PRESETS[preset])

    def build(self, folder: Path, *, preset: str, seed: int, on_progress: Report) -> None:
        """Train the language model and the experts; compose them with the base's language model.

        Args:
            folder: where to; exists.
            preset: one of `presets`.
            seed: same seed, same bytes, on one machine with the same versions.
            on_progress: told how far it is.

        Raises:
            BenchError: if the folder holds a build of another preset or seed, or PEFT is missing.
        """
        import torch

        from omnimerge.bench.adapters import check_peft
        from omnimerge.bench.modalities import training
        from omnimerge.bench.teaching import complete_folder
        from omnimerge.compose.write import compose
        from omnimerge.generate.quiet import quiet

        check_peft()
        settings = {"preset": preset, "seed": seed}
        file = folder / _SETTINGS
        if file.is_file() and json.loads(file.read_text(encoding="utf-8")) != settings:
            raise BenchError(f"{folder} holds another preset or seed; give another folder")
        file.write_text(json.dumps(settings) + "\n", encoding="utf-8")
        chosen = training.PRESETS[preset]
        before = torch.get_num_threads()
        torch.set_num_threads(1)  # sums in one order
        try:
            with quiet():
                steps = training.steps(folder, chosen, seed=seed, report=on_progress)
                for name, step in steps:
                    if not (folder / name).is_dir():
                        with complete_folder(folder / name) as draft:
                            step(draft)
                if not (folder / _COMPOSED).is_dir():
                    compose(self.recipe(folder, "task_arithmetic", {"scale": 0.0}),
                            folder / _COMPOSED)  # fmt: skip
        finally:
            torch.set_num_threads(before)

    def recipe(self, folder: Path, method: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Return the recipe that composes all experts.

        Args:
            folder: a built folder.
            method: name of a merge method.
            parameters: its keywords.

        Returns:
            What `omnimerge.compose.load_recipe` takes. The target is the model with M-RoPE before
            the base's language model, which a method that merges into a target starts from.
        """
        return {
            "method": method,
            "base": str(folder / LLM),
            "target": str(folder / TOWERS / "video"),
            "models": [
                {
                    "model": str(folder / TOWERS / name),
                    "adapter": str(folder / ADAPTERS / name),
                    "provides": name,
                }
                for name in MODALITIES
            ],
            "parameters": dict(parameters),
        }

    def task_vectors(self, folder: Path) -> dict[str, Any]:
        """Return a recipe whose base and models are those that task vectors are measured of.

        Args:
            folder: a built folder.

        Returns:
            What `omnimerge.engine.load_recipe` takes: the language models alone.
        """
        made = self.recipe(folder, "task_arithmetic", {})
        models = [{k: v for k, v in each.items() if k != "provides"} for each in made["models"]]
        return {**made, "models": models, "select": "linear"}

    def subject(self, folder: Path) -> ComposedSubject:
        """Load the composed model; it holds the base's language model at first.

        Args:
            folder: a built folder.

        Returns:
            The model.
        """
        return ComposedSubject(folder)

    def alone(self, folder: Path, name: str, split: Split) -> Scores:
        """Score a model that is no merge.

        Args:
            folder: a built folder.
            name: `base` (all towers before the base's language model), an expert, or `online`.
            split: which questions.

        Returns:
            Column -> share of right answers.

        Raises:
            BenchError: if there is no model of that name.
        """
        if name == BASE:
            return ComposedSubject(folder).score(split)
        if name == ONLINE:
            subject = ComposedSubject(folder)
            subject.route()
            return subject.score(split)
        if name not in MODALITIES:
            known = ", ".join((BASE, *self.experts, *self.references))
            raise BenchError(f"unknown model {name!r}; known: {known}")
        return _expert(folder, name, split)

    def warm_up(self, recipe: Mapping[str, Any]) -> None:
        """Plan what `write` does, so that all code that it needs is loaded.

        Args:
            recipe: from `recipe`.
        """
        from omnimerge.compose import write  # noqa: F401 what it imports counts
        from omnimerge.compose.plan import build_plan
        from omnimerge.compose.recipe import load_recipe

        build_plan(load_recipe(dict(recipe)))

    def write(self, recipe: Mapping[str, Any], out: Path) -> None:
        """Compose to disk.

        Args:
            recipe: from `recipe`.
            out: the folder to create.
        """
        from omnimerge.compose.write import compose

        compose(dict(recipe), out)

    def check(self, out: Path) -> None:
        """Load a composed model with transformers; refuse one with anything amiss.

        Args:
            out: what `write` wrote.

        Raises:
            BenchError: naming tensors that are missing, unexpected or of another shape, or if the
                model does not answer.
        """
        from omnimerge.bench.modalities.asking import answer, ask

        model, processor = _load(out)
        batches = ask(processor, MODALITIES, seed=0, split="val", count=1)
        given = answer(model, processor.tokenizer, batches)
        if len(given) != len(COLUMNS):
            raise BenchError(f"{out} answers {len(given)} of {len(COLUMNS)} questions")
        before = batches[0].inputs["input_ids"].shape[1]
        said = model.generate(**batches[0].inputs, max_new_tokens=2, do_sample=False)
        if said.shape[1] <= before:
            raise BenchError(f"{out} generates nothing")


LINE = ModalityLine()
"""The line, as ``--line modality`` names it."""


@dataclass
class ComposedSubject:
    """The composed model in memory, which takes one merged language model after the other.

    Attributes:
        folder: a built folder.
    """

    folder: Path
    _model: Any = field(init=False)
    _processor: Any = field(init=False)
    _router: Any = field(init=False, default=None)
    _asked: dict[str, list[Asked]] = field(init=False, default_factory=dict)
    _given: dict[str, list[str]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Load it, with the base's language model."""
        self._model, self._processor = _load(self.folder / _COMPOSED)

    def put(self, recipe: Mapping[str, Any]) -> None:
        """Merge in memory and take the result.

        Args:
            recipe: from `ModalityLine.recipe`; the whole language model is set every time.
        """
        import torch

        from omnimerge.compose.plan import build_plan
        from omnimerge.compose.recipe import load_recipe
        from omnimerge.compose.write import language_model

        plan = build_plan(load_recipe(dict(recipe)), ancestor=False)
        self._given = {}
        state = self._model.state_dict()
        with torch.no_grad():
            for name, value in language_model(plan):
                state[name].copy_(value)

    def route(self) -> None:
        """Keep every expert's language model beside the others; see `online`."""
        from omnimerge.bench.modalities.online import experts_of, route

        self._given = {}
        self._router = route(self._model, experts_of(self.folder, MODALITIES))

    def score(self, split: Split) -> Scores:
        """Score the model as it is now.

        Args:
            split: which questions.

        Returns:
            Column -> share of right answers.
        """
        from omnimerge.bench.modalities.asking import scores

        return scores(self._questions(split), self._answers(split))

    def answers(self) -> Sequence[str]:
        """Answer the questions of `val`.

        Returns:
            One word per question.
        """
        return self._answers("val")

    def _answers(self, split: Split) -> list[str]:
        from omnimerge.bench.modalities.asking import answer

        if split not in self._given:
            asked, within = self._questions(split), self._router.batch if self._router else None
            self._given[split] = answer(self._model, self._processor.tokenizer, asked, within)
        return self._given[split]

    def _questions(self, split: Split) -> list[Asked]:
        from omnimerge.bench.modalities.asking import ask

        if split not in self._asked:
            seed, count = _counted(self.folder, split)
            asked = ask(self._processor, MODALITIES, seed=seed, split=split, count=count)
            self._asked[split] = asked
        return self._asked[split]


def _expert(folder: Path, modality: Modality, split: Split) -> Scores:
    """Score an expert, shown media of its own modality only."""
    from omnimerge.bench.modalities import models
    from omnimerge.bench.modalities.asking import Asked, answer, ask, scores

    model = models.load(modality, folder / modality)
    processor = models.processor(modality, folder / modality)
    seed, count = _counted(folder, split)
    batches = ask(processor, (modality,), seed=seed, split=split, count=count)
    own = [
        Asked(each.column, models.own_inputs(modality, each.inputs), each.answers)
        for each in batches
    ]
    return scores(own, answer(model, processor.tokenizer, own))


def _counted(folder: Path, split: Split) -> tuple[int, int]:
    """The seed of a built folder, and its questions per column."""
    from omnimerge.bench.modalities.training import PRESETS

    file = folder / _SETTINGS
    if not file.is_file():
        raise BenchError(f"{folder} is no build of the modality line; build it first")
    settings = json.loads(file.read_text(encoding="utf-8"))
    preset = PRESETS[settings["preset"]]
    return int(settings["seed"]), preset.val if split == "val" else preset.test


@lru_cache(maxsize=1)
def _ensure() -> None:
    from omnimerge.compose.registration import ensure

    ensure()


def _load(folder: Path) -> tuple[Any, Any]:
    """Model and processor of a composed checkpoint, nothing amiss."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from omnimerge.generate.quiet import quiet

    _ensure()
    with quiet():
        model, info = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
        processor = AutoProcessor.from_pretrained(folder)
    amiss = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if amiss:
        raise BenchError(f"{folder} does not load cleanly: {amiss}")
    processor.tokenizer.padding_side = "left"
    return model.eval(), processor

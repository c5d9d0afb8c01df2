"""What a line of the benchmark is: a base, experts of it, and questions to score merges on.

A line knows its models, its tasks and how a recipe becomes a model. It knows no merge method: which
methods, which scales, what is chosen on which split, times, files of results and tables are the
runner's (`omnimerge.bench.runner`), and the same for all lines.

A built folder belongs to one seed. The line writes its checkpoints into it, in subfolders of its
own choice; ``build.json`` (the mark of a complete build) and ``results/`` are the runner's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from omnimerge.errors import OmnimergeError

Split = Literal["val", "test"]
"""`val` is for choosing a scale, `test` for what is reported. Their questions are disjoint from
each other and from those of the training."""

Report = Callable[[str], None]
"""Told one line about what is going on."""

Scores = dict[str, float]
"""Column -> share of right answers in [0, 1]; every column of the line, in its order."""

BASE = "base"
"""Name of the common ancestor in `Line.alone`."""


class BenchError(OmnimergeError):
    """A benchmark cannot be built, run or tabulated as asked."""


class Subject(Protocol):
    """One loaded model of a line, which takes the weights of one merge after the other."""

    def put(self, recipe: Mapping[str, Any]) -> None:
        """Merge in memory and take the result, always from the parents, never incrementally.

        Args:
            recipe: from `Line.recipe`; every recipe of one subject merges the same tensors, or
                more than the one before (see `Generator.set_weights`), or puts the others back.
        """

    def score(self, split: Split) -> Scores:
        """Score the model as it is now.

        Args:
            split: which questions.

        Returns:
            Column -> share of right answers.
        """

    def answers(self) -> Sequence[str]:
        """Answer the unlabelled prompts: those of `val`, all columns, in a fixed order.

        Returns:
            One text per prompt.
        """


class Line(Protocol):
    """A line of the benchmark. Making one costs nothing: no torch, no files."""

    @property
    def name(self) -> str:
        """What ``--line`` takes."""

    @property
    def about(self) -> str:
        """One line for people."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The tasks; their plain mean is the average that rows are sorted by."""

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts, as rows of the table have them."""

    @property
    def references(self) -> tuple[str, ...]:
        """Names of further models to score: ``mixture``, ``online``. May be empty."""

    @property
    def presets(self) -> tuple[str, ...]:
        """What ``--preset`` takes; ``full`` and ``quick``."""

    def settings(self, preset: str) -> dict[str, Any]:
        """Tell what a preset holds: a build with other settings is another build.

        Args:
            preset: one of `presets`.

        Returns:
            Plain values, as JSON has them.
        """

    def build(self, folder: Path, *, preset: str, seed: int, on_progress: Report) -> None:
        """Train everything for one seed. What is there already, complete, is not trained again.

        Args:
            folder: where to; exists.
            preset: one of `presets`.
            seed: same seed, same bytes, on one machine with the same versions.
            on_progress: told how far it is.
        """

    def recipe(self, folder: Path, method: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Return the recipe that merges all experts, as a user would write it.

        Args:
            folder: a built folder.
            method: name of a merge method.
            parameters: its keywords.

        Returns:
            What `omnimerge.engine.load_recipe` takes; for a line that composes, what its own
            `put` and `write` take.
        """

    def task_vectors(self, folder: Path) -> dict[str, Any]:
        """Return a recipe whose base and models are those that task vectors are measured of.

        Args:
            folder: a built folder.

        Returns:
            What `omnimerge.engine.load_recipe` takes.
        """

    def subject(self, folder: Path) -> Subject:
        """Load the model that takes merges; it holds the base's weights at first.

        Args:
            folder: a built folder.

        Returns:
            The model.
        """

    def alone(self, folder: Path, name: str, split: Split) -> Scores:
        """Score one model that is no merge.

        Args:
            folder: a built folder.
            name: `BASE`, one of `experts` or one of `references`.
            split: which questions.

        Returns:
            Column -> share of right answers.
        """

    def warm_up(self, recipe: Mapping[str, Any]) -> None:
        """Plan what `write` does, so that all code that it needs is loaded.

        Args:
            recipe: from `recipe`.
        """

    def write(self, recipe: Mapping[str, Any], out: Path) -> None:
        """Merge to disk, as a user would; the runner takes time and memory of this call.

        Args:
            recipe: from `recipe`.
            out: the checkpoint folder to create.
        """

    def check(self, out: Path) -> None:
        """Load a written merge with transformers; refuse one with anything amiss.

        Args:
            out: what `write` wrote.

        Raises:
            BenchError: naming tensors that are missing, unexpected or of another shape, or if the
                model does not answer.
        """

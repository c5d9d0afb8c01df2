"""The schema of ``search.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from omnimerge.errors import SearchError
from omnimerge.search.store import write_atomically

RESULT_NAME = "search.json"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AxisInfo(_Strict):
    """One number that was searched.

    Attributes:
        name: what it is called in `values`, for example ``alpha`` or ``alpha@layers:0-13``.
        grid: where it was tried, refinements included.
    """

    name: str
    grid: tuple[float, ...]


class Point(_Strict):
    """One evaluated point.

    Attributes:
        values: axis -> coefficient.
        score: the criterion's value, smaller is better; None where the point cannot be chosen.
        responses: file of the answers, relative to the folder of search.json.
        accuracy: share of right answers on held-out labelled prompts, for display only.
    """

    values: dict[str, float]
    score: float | None
    responses: str
    accuracy: float | None = None

    @property
    def alpha(self) -> float:
        """The coefficient, where there is one axis; else the first of them."""
        return next(iter(self.values.values()))

    @property
    def label(self) -> str:
        """The point for people: ``0.3``, or ``alpha 0.3, density 0.5``."""
        return label(self.values)


class PromptSource(_Strict):
    """Which prompts were answered.

    Attributes:
        file: the prompt file.
        sha256: of its bytes.
        count: prompts that were answered.
        sample: how many were asked for; None means all.
        seed: seed of the draw.
    """

    file: str
    sha256: str
    count: int
    sample: int | None
    seed: int


class PointDiagnostics(_Strict):
    """What the answers at one point look like; None for what is not known of them.

    Attributes:
        values: axis -> coefficient.
        distinct_rate: different answers (case aside) over prompts, in (0, 1].
        empty_rate: share of empty answers.
        mean_tokens: mean length of the answers in tokens.
        mean_characters: mean length of the answers in characters.
        like_target: share of prompts answered as the target alone does.
        like_donor: the same for the (first) donor.
    """

    values: dict[str, float]
    distinct_rate: float | None = None
    empty_rate: float | None = None
    mean_tokens: float | None = None
    mean_characters: float | None = None
    like_target: float | None = None
    like_donor: float | None = None


class NoiseFloor(_Strict):
    """How much answers differ with nothing changed: one point, answered twice.

    Attributes:
        values: the point.
        prompts: how many were answered twice.
        differing: how many of them differ.
    """

    values: dict[str, float]
    prompts: int
    differing: int


class Bootstrap(_Strict):
    """How the choice varies over resampled prompts.

    Attributes:
        samples: number of resamples.
        interval: axis -> the 2.5 % and 97.5 % quantiles of the chosen coefficient.
        same: share of resamples in which the chosen point alone is best.
    """

    samples: int
    interval: dict[str, tuple[float, float]]
    same: float


class Diagnostics(_Strict):
    """Signs of whether the choice can be trusted.

    Attributes:
        points: one entry per point.
        changed_prompts: prompts whose answer is not the same at all points.
        noise: answers that change although nothing did; None if it was not measured.
        bootstrap: how the choice varies over resampled prompts.
        warnings: plain sentences where the criterion is known to fail.
        notes: checks that could not be made, each with the reason.
    """

    points: tuple[PointDiagnostics, ...]
    changed_prompts: int
    noise: NoiseFloor | None = None
    bootstrap: Bootstrap | None = None
    warnings: tuple[str, ...]
    notes: tuple[str, ...] = ()


class SearchResult(_Strict):
    """Everything that a search found.

    Attributes:
        points: the evaluated points, increasing.
        selected: the chosen point, axis -> coefficient.
        criterion: name of the criterion.
        distance: how two answers are compared.
        per_step: whether distances were divided by the step between the points.
        axes: what was searched.
        tie_set: all points with the best score.
        grid: the axes as they were asked for.
        prompts: the unlabelled prompts that the choice rests on.
        heldout: the labelled prompts that accuracies are of, if there were any.
        max_new_tokens: the most tokens of an answer.
        diagnostics: see `Diagnostics`.
        recipe: the recipe, with its defaults.
        cost: what answering took and what was saved, in counts; empty where all was on disk.
        versions: of what computed the answers.
        elapsed_s: seconds that this run took; points found on disk cost none.
    """

    points: tuple[Point, ...]
    selected: dict[str, float]
    criterion: str
    distance: str = "exact"
    per_step: bool = False
    axes: tuple[AxisInfo, ...]
    tie_set: tuple[dict[str, float], ...]
    grid: str
    prompts: PromptSource
    heldout: PromptSource | None = None
    max_new_tokens: int
    diagnostics: Diagnostics
    recipe: dict[str, Any]
    cost: dict[str, float] = {}
    versions: dict[str, str]
    elapsed_s: float

    @property
    def parameter(self) -> str:
        """The names of the axes."""
        return ", ".join(axis.name for axis in self.axes)

    @property
    def alpha(self) -> float:
        """The chosen coefficient, where there is one axis; else the first of them."""
        return next(iter(self.selected.values()))

    @property
    def label(self) -> str:
        """The chosen point for people."""
        return label(self.selected)

    def write(self, folder: Path) -> Path:
        """Write ``search.json``.

        Args:
            folder: the search's folder.

        Returns:
            The file, which is complete or not there at all.
        """
        text = json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False)
        return write_atomically(folder / RESULT_NAME, text + "\n")


def label(values: Mapping[str, float]) -> str:
    """Return a point for people.

    Args:
        values: axis -> coefficient.

    Returns:
        ``0.3`` for one axis, else ``alpha 0.3, density 0.5``.
    """
    if len(values) == 1:
        return f"{next(iter(values.values())):g}"
    return ", ".join(f"{name} {value:g}" for name, value in values.items())


def read_result(path: Path) -> SearchResult:
    """Read the result of a search.

    Args:
        path: ``search.json``, or the folder that holds it.

    Returns:
        The result.

    Raises:
        SearchError: if there is none, or it does not fit the schema.
    """
    file = path / RESULT_NAME if path.is_dir() else path
    try:
        return SearchResult.model_validate_json(file.read_bytes())
    except OSError as error:
        raise SearchError(f"cannot read {file} ({error.strerror}); run the search first") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise SearchError(
            f"{file} is no search result: {where}: {first['msg']}; run the search again"
        ) from error

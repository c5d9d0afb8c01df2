"""The schema of ``search.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from omnimerge.errors import SearchError
from omnimerge.search.store import write_atomically

RESULT_NAME = "search.json"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Point(_Strict):
    """One evaluated coefficient.

    Attributes:
        alpha: the coefficient.
        score: the criterion's value, smaller is better; None where the point cannot be chosen.
        responses: file of the answers, relative to the folder of search.json.
        accuracy: share of right answers on held-out labelled prompts, for display only.
    """

    alpha: float
    score: float | None
    responses: str
    accuracy: float | None = None


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
    """What the answers at one coefficient look like.

    Attributes:
        alpha: the coefficient.
        distinct_rate: different answers (case aside) over prompts, in (0, 1].
        empty_rate: share of empty answers.
        mean_tokens: mean length of the answers in tokens.
    """

    alpha: float
    distinct_rate: float
    empty_rate: float
    mean_tokens: float


class Diagnostics(_Strict):
    """Signs of whether the choice can be trusted.

    Attributes:
        points: one entry per coefficient.
        changed_prompts: prompts whose answer is not the same at all coefficients.
        warnings: plain sentences where the criterion is known to fail.
    """

    points: tuple[PointDiagnostics, ...]
    changed_prompts: int
    warnings: tuple[str, ...]


class SearchResult(_Strict):
    """Everything that a search found.

    Attributes:
        points: the evaluated coefficients, increasing.
        selected: the chosen coefficient.
        criterion: name of the criterion.
        parameter: the method's keyword that was searched.
        tie_set: all coefficients with the best score.
        grid: the grid as it was asked for.
        prompts: the unlabelled prompts that the choice rests on.
        heldout: the labelled prompts that accuracies are of, if there were any.
        max_new_tokens: the most tokens of an answer.
        diagnostics: see `Diagnostics`.
        recipe: the recipe, with its defaults.
        versions: of what computed the answers.
        elapsed_s: seconds that this run took; points found on disk cost none.
    """

    points: tuple[Point, ...]
    selected: float
    criterion: str
    parameter: str
    tie_set: tuple[float, ...]
    grid: str
    prompts: PromptSource
    heldout: PromptSource | None = None
    max_new_tokens: int
    diagnostics: Diagnostics
    recipe: dict[str, Any]
    versions: dict[str, str]
    elapsed_s: float

    def write(self, folder: Path) -> Path:
        """Write ``search.json``.

        Args:
            folder: the search's folder.

        Returns:
            The file, which is complete or not there at all.
        """
        text = json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False)
        return write_atomically(folder / RESULT_NAME, text + "\n")


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

"""Answers on disk, one file per finished point; a file is complete or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omnimerge.errors import SearchError
from omnimerge.search.grid import point_name

if TYPE_CHECKING:
    from omnimerge.generate import Response


class AnswerStore:
    """The answers to one list of prompts at several coefficients.

    Each line of a file is ``{"id", "response", "tokens"}``.

    Args:
        folder: where the files are.
        ids: the prompts' ids, in order.
        parameter: the keyword that is searched, as in ``alpha_0.30.jsonl``.
    """

    def __init__(self, folder: Path, ids: Sequence[str], parameter: str = "alpha") -> None:
        self.folder = folder
        self.ids = tuple(ids)
        self.parameter = parameter

    def path(self, point: float) -> Path:
        """Return the file of a point.

        Args:
            point: the coefficient.

        Returns:
            The file, whether it exists or not.
        """
        return self.folder / f"{self.parameter}_{point_name(point)}.jsonl"

    def any(self) -> bool:
        """Return whether there are answers at any point, complete ones or not."""
        return self.folder.is_dir() and any(self.folder.iterdir())

    def read(self, point: float) -> list[Response] | None:
        """Return the answers at a point, if it was finished.

        Args:
            point: the coefficient.

        Returns:
            The answers in the order of `ids`; None if there is no file, or it does not hold
            exactly the answers to these prompts.
        """
        from omnimerge.generate import Response

        try:
            lines = self.path(point).read_text(encoding="utf-8").splitlines()
            raw = [json.loads(line) for line in lines]
            found = [Response(r["id"], r["response"], tuple(r["tokens"])) for r in raw]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return found if tuple(response.id for response in found) == self.ids else None

    def write(self, point: float, responses: Sequence[Response]) -> Path:
        """Write the answers at a point, in one step.

        Args:
            point: the coefficient.
            responses: the answers, one per prompt, in the order of `ids`.

        Returns:
            The file.

        Raises:
            SearchError: if the answers are not those of the prompts, or cannot be written.
        """
        if tuple(response.id for response in responses) != self.ids:
            raise SearchError(
                f"{len(responses)} answers at {self.parameter} {point} do not match the "
                f"{len(self.ids)} prompts one by one; answer every prompt once, in order"
            )
        rows = [{"id": r.id, "response": r.text, "tokens": list(r.tokens)} for r in responses]
        # ASCII only: line separators inside answers must not split a line when it is read.
        return write_atomically(self.path(point), "".join(json.dumps(row) + "\n" for row in rows))

    def clear(self) -> None:
        """Delete the files of all points."""
        for file in self.folder.glob(f"{self.parameter}_*.jsonl"):
            file.unlink()


def write_atomically(path: Path, text: str) -> Path:
    """Write a text file so that it is complete, on the disk, or not there at all.

    Args:
        path: the file; its folder is created.
        text: its content.

    Returns:
        `path`.

    Raises:
        SearchError: if it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise SearchError(
            f"cannot write {path} ({error.strerror}); free the space or choose another folder"
        ) from error
    return path

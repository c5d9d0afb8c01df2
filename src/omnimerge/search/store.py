"""Answers on disk, one file per point: complete under its name, or as far as it came beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omnimerge.errors import SearchError

if TYPE_CHECKING:
    from omnimerge.generate import Response


class AnswerStore:
    """The answers to one list of prompts at several coefficients.

    Each line of a file is ``{"id", "response", "tokens"}``. While a point is answered, what is
    there lies in ``.NAME.jsonl.begun``; a run that was killed goes on from it.

    Args:
        folder: where the files are.
        ids: the prompts' ids, in order.
    """

    def __init__(self, folder: Path, ids: Sequence[str]) -> None:
        self.folder = folder
        self.ids = tuple(ids)

    def path(self, name: str) -> Path:
        """Return the file of a point.

        Args:
            name: the point's name, such as ``alpha_0.30``.

        Returns:
            The file, whether it exists or not.
        """
        return self.folder / f"{name}.jsonl"

    def any(self) -> bool:
        """Return whether there are answers at any point, complete ones or not."""
        return self.folder.is_dir() and any(self.folder.iterdir())

    def read(self, name: str) -> list[Response] | None:
        """Return the answers at a point, if it was finished.

        Args:
            name: the point's name.

        Returns:
            The answers in the order of `ids`; None if there is no file, or it does not hold
            exactly the answers to these prompts.
        """
        try:
            lines = self.path(name).read_text(encoding="utf-8").splitlines()
            found = [_parse(line) for line in lines]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return found if tuple(response.id for response in found) == self.ids else None

    def begun(self, name: str) -> dict[str, Response]:
        """Return the answers at a point that was not finished.

        Args:
            name: the point's name.

        Returns:
            Prompt id -> answer; a last line that was cut off is left out.
        """
        try:
            lines = self._partial(name).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            return {}
        found = {}
        known = set(self.ids)
        for line in lines:
            try:
                response = _parse(line)
            except (ValueError, KeyError, TypeError):
                continue
            if response.id in known:
                found[response.id] = response
        return found

    def append(self, name: str, responses: Sequence[Response]) -> None:
        """Add answers to a point that is being answered; they outlive a killed process.

        Args:
            name: the point's name.
            responses: some of its answers.

        Raises:
            SearchError: if they cannot be written.
        """
        file = self._partial(name)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with file.open("a", encoding="utf-8") as stream:
                # A line that a kill cut off must not swallow the next one.
                stream.write("\n" + "".join(_line(response) for response in responses))
        except OSError as error:
            raise SearchError(
                f"cannot write {file} ({error.strerror}); free the space or choose another folder"
            ) from error

    def write(self, name: str, responses: Sequence[Response]) -> Path:
        """Write the answers at a point, in one step.

        Args:
            name: the point's name.
            responses: the answers, one per prompt, in the order of `ids`.

        Returns:
            The file.

        Raises:
            SearchError: if the answers are not those of the prompts, or cannot be written.
        """
        if tuple(response.id for response in responses) != self.ids:
            raise SearchError(
                f"{len(responses)} answers at {name} do not match the {len(self.ids)} prompts one "
                "by one; answer every prompt once, in order"
            )
        file = write_atomically(self.path(name), "".join(map(_line, responses)))
        self._partial(name).unlink(missing_ok=True)
        return file

    def clear(self) -> None:
        """Delete the files of all points."""
        for pattern in ("*.jsonl", ".*.jsonl.begun"):
            for file in self.folder.glob(pattern):
                file.unlink()

    def _partial(self, name: str) -> Path:
        return self.folder / f".{name}.jsonl.begun"


def _line(response: Response) -> str:
    row = {"id": response.id, "response": response.text, "tokens": list(response.tokens)}
    # ASCII only: line separators inside answers must not split a line when it is read.
    return json.dumps(row) + "\n"


def _parse(line: str) -> Response:
    from omnimerge.generate import Response

    row = json.loads(line)
    return Response(row["id"], row["response"], tuple(row["tokens"]))


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

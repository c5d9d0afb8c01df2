"""A prompt, and the prompts of one file gathered together with everything that is wrong there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from omnimerge.errors import PromptError

FIELDS = ("id", "prompt", "image", "audio", "video", "answer", "kind")
MEDIA = ("image", "audio", "video")

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question to a model.

    The model sees images first, then sounds, then videos, then the text.

    Attributes:
        id: unique in its file.
        prompt: the text of the user's turn.
        images: image files, in the order in which the model sees them.
        answer: the right answer, where known. Never used to choose a coefficient.
        kind: a label to group results by, where given.
        audios: sound files.
        videos: animated images, or folders of frames.
    """

    id: str
    prompt: str
    images: tuple[Path, ...] = ()
    answer: str | None = None
    kind: str | None = None
    audios: tuple[Path, ...] = ()
    videos: tuple[Path, ...] = ()


class Gathering:
    """The prompts of one source as they are read, and all its problems.

    Args:
        source: what is read, for messages.
        unit: what its entries are called: ``line`` or ``row``.
    """

    def __init__(self, source: object, unit: str) -> None:
        self._source = source
        self._unit = unit
        self._prompts: list[Prompt] = []
        self._problems: list[str] = []
        self._seen: dict[str, int] = {}

    def add(self, number: int, prompt: Prompt | None, problems: Sequence[str]) -> None:
        """Add an entry.

        Args:
            number: its line or row, counted from 1.
            prompt: the prompt; None where the entry is no prompt.
            problems: what is wrong with it.
        """
        found = list(problems)
        if prompt is not None and prompt.id in self._seen:
            first = f"{self._unit} {self._seen[prompt.id]}"
            found.append(f"id {prompt.id!r} was used on {first}; give unique ids")
        self._problems += [f"{self._unit} {number}: {problem}" for problem in found]
        if prompt is not None:
            self._seen.setdefault(prompt.id, number)
            self._prompts.append(prompt)

    def finish(self, if_empty: str) -> list[Prompt]:
        """Return the prompts.

        Args:
            if_empty: the problem, where there is neither a prompt nor a problem.

        Returns:
            The prompts, in the order of the source.

        Raises:
            PromptError: naming every problem at once (the first five in full).
        """
        if not self._prompts and not self._problems:
            self._problems.append(if_empty)
        if self._problems:
            refuse(self._source, self._problems)
        return self._prompts


def refuse(source: object, problems: Sequence[str]) -> NoReturn:
    """Raise one error about all problems of a source.

    Args:
        source: what was read.
        problems: at least one.

    Raises:
        PromptError: always; the first five problems in full.
    """
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    raise PromptError(f"{source}: " + "; ".join(problems[:_SHOWN]) + more)


def is_file(path: Path, *, or_folder: bool = False) -> bool:
    """Return whether there is a file at a path, whatever the path looks like.

    Args:
        path: any path.
        or_folder: whether a folder will do.

    Returns:
        Whether it is there.
    """
    try:
        return path.is_file() or (or_folder and path.is_dir())
    except (OSError, ValueError):  # a name too long, a null byte, no permission
        return False


def is_unicode(text: str) -> bool:
    """Return whether a text can be written as UTF-8: JSON can spell half a character.

    Args:
        text: any text.

    Returns:
        Whether it is whole.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

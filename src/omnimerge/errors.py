"""Every error this package raises on purpose.

Each message says what is wrong, with which file, tensor or key, and how to go on. The command line
prints it on one line and exits with 1, and does the same for an `OSError` that names a file;
anything else is a bug and shows its traceback.

* OmnimergeError
  + RecipeError            (the recipe is wrong; carries every problem found, not only the first)
    + ConversionError      (another tool's configuration says what no recipe can)
  + UnknownMethodError     (no merge method has that name)
  + MethodError            (a method was called with inputs it cannot take)
  + CheckpointError        (a checkpoint cannot be read: missing, truncated, corrupt)
    + InputChangedError    (an input file is no longer what it was at the beginning)
  + LayoutError            (a checkpoint's tensors cannot be given slots, or a layout file is wrong)
    + UnknownLayoutError   (no table fits; the layout may still be inferred)
  + NotMergeableError      (two checkpoints must not be merged; carries the reasons)
  + OutputError            (the output cannot be written: exists, disk full, no permission)
    + ExecutorError        (the machines that are to write it cannot be used)
  + NonFiniteError         (an input holds NaN or infinity)
  + PromptError            (a prompt file is wrong)
  + GenerationError        (a model cannot answer)
  + SearchError            (a search cannot be run or continued)
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from textwrap import shorten


class OmnimergeError(Exception):
    """Base class: catch this to catch everything omnimerge raises on purpose."""

    def __str__(self) -> str:
        """The message on one line: names in files may hold anything, terminal escapes too."""
        return printable(super().__str__())


class RecipeError(OmnimergeError):
    """The recipe is not valid. Lists every problem at once."""

    def __init__(self, problems: Sequence[str], source: str = "recipe") -> None:
        self.problems = tuple(problems)
        self.source = source
        super().__init__(f"{source} is not valid: " + "; ".join(self.problems))


class ConversionError(RecipeError):
    """Another tool's configuration has no equivalent recipe. Lists every problem at once."""

    def __init__(self, problems: Sequence[str], source: str = "the configuration") -> None:
        super().__init__(problems, source)
        self.args = ("\n  ".join([f"{source} has no equivalent recipe:", *self.problems]),)

    def __str__(self) -> str:
        """One line per problem."""
        lines = [f"{self.source} has no equivalent recipe:", *self.problems]
        return "\n  ".join(map(printable, lines))


class UnknownMethodError(OmnimergeError):
    """No merge method is registered under this name."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        super().__init__(
            f"unknown merge method {name!r}{suggestion(name, known)}; "
            f"known: {', '.join(sorted(known))}"
        )


class MethodError(OmnimergeError):
    """A merge method was called with inputs that it cannot take."""


class CheckpointError(OmnimergeError):
    """A checkpoint cannot be read."""


class InputChangedError(CheckpointError):
    """An input file is no longer what it was when the merge or the extraction began."""


class LayoutError(OmnimergeError):
    """A checkpoint's tensors cannot be given slots, or a layout file is wrong."""


class UnknownLayoutError(LayoutError):
    """No table fits a checkpoint's tensor names; its layout may still be inferred."""


class NotMergeableError(OmnimergeError):
    """Two checkpoints must not be merged. Lists every reason at once."""

    def __init__(self, reasons: Sequence[str]) -> None:
        self.reasons = tuple(reasons)
        super().__init__("cannot merge: " + "; ".join(self.reasons))


class OutputError(OmnimergeError):
    """The output cannot be written."""


class ExecutorError(OutputError):
    """The machines or processes that are to write the output cannot be used."""


class NonFiniteError(OmnimergeError):
    """A tensor holds NaN or infinity."""


class PromptError(OmnimergeError):
    """A prompt file is wrong."""


class GenerationError(OmnimergeError):
    """A model cannot be loaded for generation, or cannot answer."""


class SearchError(OmnimergeError):
    """A search cannot be run or continued."""


def printable(text: str) -> str:
    r"""Return a text without what a terminal would act on.

    Args:
        text: any text.

    Returns:
        The text with control and format characters, line breaks and halves of characters written
        out, such as ``\x1b`` or ``\u202e``.
    """
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


def one_line(said: object) -> str:
    """Return the first line of what others wrote, as plain text of about 200 characters at most.

    Args:
        said: an exception, or its message.

    Returns:
        Text for the inside of a longer message.
    """
    lines = str(said).strip().splitlines()
    return printable(shorten(lines[0] if lines else type(said).__name__, 200, placeholder=" ..."))


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return ``", did you mean 'x'?"`` for the closest known name, or an empty string.

    Args:
        name: what the user wrote.
        known: the names that exist.

    Returns:
        Text to append to a message.
    """
    close = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""

"""What a model answered to one prompt."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Response:
    """One answer.

    Attributes:
        id: the prompt's id.
        text: the answer, without special tokens, stripped of white space at both ends.
        tokens: ids of the tokens that were generated, without the one that ended the answer.
    """

    id: str
    text: str
    tokens: tuple[int, ...] = ()

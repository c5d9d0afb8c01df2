"""Accuracy on labelled prompts, for display beside a choice that never saw the labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from omnimerge.errors import SearchError

if TYPE_CHECKING:
    from omnimerge.generate import Prompt, Response


def accuracy(prompts: Sequence[Prompt], responses: Sequence[Response]) -> float | None:
    """Return the share of labelled prompts that were answered right.

    An answer is right if it equals the label, case and white space at both ends aside.

    Args:
        prompts: the prompts; those without an answer do not count.
        responses: the responses, joined on the id.

    Returns:
        A share in [0, 1]; None if no prompt has an answer.

    Raises:
        SearchError: if a labelled prompt has no response.
    """
    texts = {response.id: response.text for response in responses}
    labelled = [(prompt.id, prompt.answer) for prompt in prompts if prompt.answer is not None]
    if missing := [id_ for id_, _ in labelled if id_ not in texts]:
        raise SearchError(f"{len(missing)} prompts have no response (first: {missing[0]!r})")
    right = sum(texts[id_].strip().lower() == label.strip().lower() for id_, label in labelled)
    return right / len(labelled) if labelled else None

"""Samples as lmms-eval logs them, in its four generations.

================  ============================  ====================================================
lmms-eval         file                          ``resps``, ``filtered_resps`` of a generated answer
================  ============================  ====================================================
0.1 to 0.2.3      JSON object with ``"logs"``   ``[["text"]]``, ``["text"]``
0.2.4 to 0.3.5    JSON lines                    the same
0.4 to 0.6.1      JSON lines                    no ``resps`` where filtering changed nothing
0.7               JSON lines                    the same, and lists of one are unpacked: ``"text"``
================  ============================  ====================================================

What the model said is ``resps``; where it is missing ``filtered_resps`` is equal to it by
construction, so that reading the one or the other row by row never mixes the two. Both may be
nested to any depth. The label (``target``, ``doc``) and the metrics are not looked at.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omnimerge.errors import SearchError
from omnimerge.search.logs.log import Row, as_text

KIND = "lmms-eval"

# The hash of no document at all, which the versions up to 0.7.3 log for every sample: the line that
# would keep the document for it is commented out in their `construct_requests`.
_NO_HASH = hashlib.sha256(b"null").hexdigest()


def is_sample(raw: Mapping[str, Any]) -> bool:
    """Return whether an object is a sample of lmms-eval.

    Args:
        raw: the object.

    Returns:
        True if it has a document's id and a response.
    """
    return "doc_id" in raw and ("resps" in raw or "filtered_resps" in raw)


def parse_sample(path: Path, raw: Mapping[str, Any], where: str, filtered: bool) -> Row:
    """Return one sample.

    Args:
        path: the file, for messages.
        raw: the sample, with numbers as text.
        where: its place in the file.
        filtered: whether to take what the task's filter kept, instead of what the model said.

    Returns:
        The row.

    Raises:
        SearchError: if it has no answer that is text.
    """
    key = "filtered_resps" if filtered or "resps" not in raw else "resps"
    if raw.get("doc_id") is None or key not in raw:
        missing = "doc_id" if raw.get("doc_id") is None else key
        raise SearchError(f"{path}, {where}: no {missing!r}; run lmms-eval with --log_samples")
    value = raw[key]
    if _is_likelihood(value):
        raise SearchError(
            f"{path}, {where}: the log-likelihoods of choices, not an answer; use a task whose "
            "output_type is generate_until"
        )
    leaves = _leaves(value)
    answer = as_text(leaves[0]) if len(leaves) == 1 else json.dumps(leaves, ensure_ascii=False)
    prompt, source = raw.get("input"), raw.get("doc_hash")
    # For wrappers that take messages, `input` holds generation settings and no prompt.
    asked = (
        prompt if isinstance(prompt, str) else None,
        source if isinstance(source, str) and source != _NO_HASH else None,
    )
    return Row(as_text(raw["doc_id"]), answer if leaves else "", where, asked)


def _leaves(value: Any) -> list[Any]:
    """The values of a nested list: one for a single answer, several where a task repeats."""
    leaves, left = [], [value]
    while left:
        item = left.pop()
        if isinstance(item, list):
            left += reversed(item)
        else:
            leaves.append(item)
    return leaves


def _is_likelihood(value: Any) -> bool:
    """Whether there are pairs (log-likelihood, whether it is the greedy choice) inside."""
    left = [value]
    while left:
        item = left.pop()
        if not isinstance(item, list):
            continue
        if len(item) == 2 and not isinstance(item[1], list) and str(item[1]) in ("True", "False"):
            try:
                float(item[0])
            except (TypeError, ValueError):
                continue
            return True
        left += item
    return False

"""Prove that new weights reach the logits: one short prompt, asked again after every change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from omnimerge.errors import GenerationError
from omnimerge.generate.features import ReadRecorder, address, words_of
from omnimerge.generate.memory import bits

LEAST_SHARE = 0.01
"""Share of a matrix's entries that must have changed for the logits to have to change as well."""


@dataclass
class Canary:
    """The logits of one prompt at the point before.

    Matrices alone count, of which a good part has changed, and which the prompt's forward pass was
    seen to read. So an expert that it is not sent to, or an embedding of words that it does not
    have, raises no alarm.

    Attributes:
        matrices: the parameters that may count, by name.
    """

    matrices: Mapping[str, Tensor]
    _logits: Tensor | None = field(default=None, init=False)
    _read: frozenset[str] = field(default=frozenset(), init=False)
    _changed: frozenset[str] = field(default=frozenset(), init=False)
    _changes: int = field(default=0, init=False)

    @classmethod
    def of(cls, model: Any) -> Canary:
        """Watch a model's matrices, those of words left out.

        Args:
            model: a transformers model.

        Returns:
            The canary.
        """
        words = [m for m in words_of(model) if not isinstance(m, nn.Linear)]
        left_out = {address(p) for module in words for p in module.parameters()}
        state = model.state_dict()
        return cls({n: t for n, t in state.items() if t.ndim == 2 and address(t) not in left_out})

    def changed(self, shares: Mapping[str, float]) -> None:
        """Note which parameters have changed.

        Args:
            shares: name -> share of its entries.
        """
        self._changes += 1
        self._changed = frozenset(n for n, share in shares.items() if share >= LEAST_SHARE)

    def forget(self) -> None:
        """Begin anew with the next logits."""
        self._logits, self._changes = None, 0

    @property
    def due(self) -> bool:
        """Whether weights were set since the last look."""
        return self._changes > 0

    def look(self, logits: Callable[[], Tensor], prompt_id: str) -> None:
        """Compute the prompt's logits and compare them with those of the point before.

        Args:
            logits: computes them, from the same prompt every time.
            prompt_id: that prompt, for the message.

        Raises:
            GenerationError: if they are the same, bit by bit, though weights that they are computed
                from have changed.
        """
        before, skipped = self._logits, self._changes != 1  # after two changes they may be back
        if before is None:
            storages = {address(tensor): name for name, tensor in self.matrices.items()}
            with ReadRecorder(storages) as recorder:
                now = logits()
            self._read = frozenset(storages[seen] for seen in recorder.seen)
        else:
            now = logits()
        self._logits, self._changes = now.detach().clone(), 0
        count = len(self._changed & self._read)
        if before is None or skipped or not count or not bool(torch.isfinite(now).all()):
            return
        if before.shape == now.shape and torch.equal(bits(before), bits(now)):
            raise GenerationError(
                f"{count} matrices have changed, but the model's logits for prompt {prompt_id!r} "
                "are the same to the last bit: it computes with a stale copy of its weights; load "
                "it without quantisation, compilation or offloading"
            )

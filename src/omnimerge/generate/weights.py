"""Put merged tensors into a loaded model, in place, and prove that they arrived."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from omnimerge.arch import memory_names
from omnimerge.checkpoint import Checkpoint
from omnimerge.errors import GenerationError, suggestion
from omnimerge.generate.memory import bits

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Change:
    """What a call of `WeightSlots.fill` did, by names in memory.

    Attributes:
        given: the parameters that were given, changed or not.
        changed: share of the entries, in (0, 1], whose bits differ from before; others are absent.
    """

    given: frozenset[str]
    changed: Mapping[str, float]


class WeightSlots:
    """The parameters of one loaded model, addressed by the checkpoint's names on disk.

    Args:
        folder: the checkpoint's folder.
        parameters: the model's ``state_dict()``.
        prefix: what the loaded part's names start with on disk, where the folder holds more.
    """

    def __init__(self, folder: Path, parameters: Mapping[str, Tensor], prefix: str = "") -> None:
        self.folder = folder
        with Checkpoint.open(folder) as checkpoint:
            names = memory_names(checkpoint, list(parameters))
        self._places = {n: p for n, p in names.items() if n.startswith(prefix)} or names
        self._slots = {name: parameters[place] for name, place in self._places.items()}
        self._given: frozenset[str] = frozenset()

    @torch.no_grad()
    def fill(self, tensors: Iterable[tuple[str, Tensor]]) -> Change:
        """Copy tensors into the parameters, rounding to the parameters' dtype.

        Args:
            tensors: pairs of a name on disk and a tensor of that parameter's shape, of any
                floating-point dtype, on any device. Every call must give at least the names of the
                calls before it: a tensor left out would still hold an earlier merge.

        Returns:
            Which parameters were given, and which of them are others than before.

        Raises:
            GenerationError: for an unknown name, a wrong shape, a name left out, or a parameter
                that does not hold what was given when all are copied (two names for one tied
                parameter that differ).
        """
        prints: dict[str, int] = {}
        changed: dict[str, float] = {}
        for name, tensor in tensors:
            slot = self._slot(name, tensor)
            value = tensor.to(device=slot.device, dtype=slot.dtype)
            if different := int(torch.count_nonzero(bits(slot) != bits(value))):
                changed[self._places[name]] = different / max(1, slot.numel())
                slot.copy_(value)
            prints[name] = _fingerprint(value)
        if left_out := sorted(self._given - prints.keys()):
            raise GenerationError(
                f"{len(left_out)} tensors set before were not set again (first: {left_out[0]!r}) "
                "and still hold an earlier merge; give every merged tensor each time"
            )
        self._given = frozenset(prints)
        for name, expected in prints.items():
            if _fingerprint(self._slots[name]) != expected:
                raise GenerationError(
                    f"parameter {name!r} does not hold the tensor that was given; is it tied to "
                    "another one that was given different values?"
                )
        return Change(frozenset(self._places[name] for name in prints), changed)

    def _slot(self, name: str, tensor: Tensor) -> Tensor:
        slot = self._slots.get(name)
        if slot is None:
            raise GenerationError(
                f"{self.folder} has no parameter {name!r}{suggestion(name, self._slots)}; use the "
                "names of the target's checkpoint"
            )
        if slot.shape != tensor.shape:
            raise GenerationError(
                f"tensor {name!r} has shape {tuple(tensor.shape)}, the model's parameter "
                f"{tuple(slot.shape)}; merge towards this target"
            )
        return slot


def _fingerprint(tensor: Tensor) -> int:
    """The sum of the bit patterns: equal for equal bits, and cheap on every device."""
    return int(bits(tensor).sum(dtype=torch.int64))

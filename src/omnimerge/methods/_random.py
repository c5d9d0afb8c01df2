"""Random numbers that depend on (seed, tensor name, model, position) alone.

So a merge draws the same for an entry in any order, in any slices, on any number of threads or
machines. The generator is the finaliser of SplitMix64 (Steele et al., 2014) applied to a counter.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX1, _MIX2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_WORD = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Stream:
    """A stream of uniform numbers for every model, from any position on.

    Attributes:
        key: 64 bits that tell streams apart; see `of`.
        offset: position of the first entry that is drawn for.
    """

    key: int
    offset: int = 0

    @classmethod
    def of(cls, seed: int, name: str, offset: int = 0) -> "Stream":
        """Return the stream of one tensor.

        Args:
            seed: the recipe's seed.
            name: the tensor's name.
            offset: position of the first entry, where only a slice of the tensor is merged.

        Returns:
            The stream.
        """
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        return cls(int.from_bytes(digest[:8], "little"), offset)

    def keys(self, models: int) -> list[int]:
        """Return one key per model, as signed 64-bit numbers.

        Args:
            models: number of models.

        Returns:
            The keys.
        """
        return [_signed(_mix(self.key + (t + 1) * _GOLDEN)) for t in range(models)]

    def uniform(
        self, models: int, shape: Sequence[int], device: torch.device | None = None
    ) -> Tensor:
        """Draw a number in [0, 1) for every entry of every model.

        Args:
            models: number of models.
            shape: shape of one model's tensor.
            device: where; integers give the same bits on every one. Default: the CPU.

        Returns:
            (models, *shape), float32, multiples of 2^-24.
        """
        count = torch.Size(shape).numel()
        first, last = self.offset + 1, self.offset + count
        position = torch.arange(first, last + 1, device=device) * _signed(_GOLDEN)
        keys = torch.tensor(self.keys(models), dtype=torch.int64).to(position.device)
        bits = _mixed(position + keys.reshape(-1, 1))
        return (_shifted(bits, 40).float() * 2.0**-24).reshape(models, *shape)


def _mix(word: int) -> int:
    word &= _WORD
    word = ((word ^ (word >> 30)) * _MIX1) & _WORD
    word = ((word ^ (word >> 27)) * _MIX2) & _WORD
    return word ^ (word >> 31)


def _mixed(words: Tensor) -> Tensor:
    """`_mix` on int64 tensors, whose products wrap around as unsigned ones do."""
    words = (words ^ _shifted(words, 30)) * _signed(_MIX1)
    words = (words ^ _shifted(words, 27)) * _signed(_MIX2)
    return words ^ _shifted(words, 31)


def _shifted(words: Tensor, bits: int) -> Tensor:
    """Shift to the right, filling with zeros."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word

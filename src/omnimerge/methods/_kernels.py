"""The hot loops of element-wise methods: compiled by numba, with plain torch as the reference.

Both forms take the same tensors and give the same numbers (the tests compare them). The plain form
serves tensors that are not on the CPU, and machines without numba.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

import omnimerge.methods._loops as _loops
from omnimerge.methods._random import Stream


class Plain:
    """The loops in plain torch. `tau` is (models, *shape), float32, contiguous.

    `low`, (models,): entries that are smaller in magnitude are left out.
    """

    def differences(
        self, models: Sequence[Tensor], base: Tensor, step: int, held: Tensor
    ) -> Iterator[Tensor]:
        """Give models - base, in float32, from any dtype; so many entries at a time, in `held`."""
        flat, origin = [model.reshape(-1) for model in models], base.reshape(-1)
        for start in range(0, len(origin), step):
            part = slice(start, min(start + step, len(origin)))
            tau = held[: len(flat) * (part.stop - start)].view(len(flat), -1)
            ancestor = origin[part].float()
            for row, model in zip(tau, flat, strict=True):
                row.copy_(model[part]).sub_(ancestor)
            yield tau

    def count_upper(self, tau: Tensor, counts: Tensor) -> None:
        """Count magnitudes by the upper 16 of their 31 bits in counts, (models, 2^16)."""
        for t, row in enumerate(tau.abs().flatten(1).view(torch.int32)):
            counts[t] += torch.bincount(row >> 15, minlength=1 << 16)

    def count_lower(self, tau: Tensor, bins: Tensor, counts: Tensor) -> None:
        """Count those in `bins`, (ranks, models), by their lower bits, (ranks, models, 2^15)."""
        for t, row in enumerate(tau.abs().flatten(1).view(torch.int32)):
            for r in range(len(bins)):
                inside = row[(row >> 15) == bins[r, t]] & 0x7FFF
                counts[r, t] += torch.bincount(inside, minlength=1 << 15)

    def count_signs(self, tau: Tensor, weights: Sequence[float], low: Tensor | None = None) -> int:
        """How many more entries of Σ w τ are positive than negative."""
        return int(self.weighted_sum(self._from(tau, low), weights).sign().sum())

    def band(self, tau: Tensor, low: Tensor, high: Tensor) -> None:
        """Zero, in place, what is not within [low, high] in magnitude; (models,) each."""
        column = (-1, *[1] * (tau.ndim - 1))
        magnitude = tau.abs()
        least, most = (limit.to(tau.device).view(column) for limit in (low, high))
        tau.mul_((magnitude >= least) & (magnitude <= most))

    def drop(self, tau: Tensor, stream: Stream, density: float) -> None:
        """Keep entries with probability `density`, divided by it, in place."""
        drawn = stream.uniform(len(tau), tau.shape[1:], tau.device)
        tau.mul_(drawn < density).div_(_number(density or 1.0, tau))

    def drop_by_rank(self, tau: Tensor, stream: Stream, density: float, epsilon: float) -> None:
        """Keep entries with `density` ± ε/2 by the rank of their magnitude in their row."""
        ranks = tau.abs().argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)
        centred = (ranks.float() + 0.5) / _number(max(1, tau.shape[-1]), tau) - 0.5
        keep = (density + epsilon * centred).clamp(0, 1)
        drawn = stream.uniform(len(tau), tau.shape[1:], tau.device)
        tau.mul_(drawn < keep).div_(keep.clamp(min=1e-12))

    def weighted_sum(self, tau: Tensor, weights: Sequence[float]) -> Tensor:
        """Σ_t w_t τ_t."""
        total = tau[0] * weights[0]
        for row, weight in zip(tau[1:], weights[1:], strict=True):
            total += row * weight
        return total

    def elected_sum(
        self,
        tau: Tensor,
        weights: Sequence[float],
        *,
        mean: bool,
        majority: float = 0.0,
        low: Tensor | None = None,
    ) -> Tensor:
        """Σ_t w_t τ_t over what has the sum's sign (`majority` where it is 0), or its mean."""
        tau = self._from(tau, low)
        total = self.weighted_sum(tau, weights)
        elected = total.sign().masked_fill(total == 0, majority)
        merged, used = torch.zeros_like(total), torch.zeros_like(total)
        for row, weight in zip(tau, weights, strict=True):
            weighted = row * weight
            agrees = weighted.sign() * elected.sign() > 0
            merged += weighted * agrees
            used += weight * agrees
        if mean:
            merged /= used.masked_fill(used == 0, 1.0)
        return merged

    def _from(self, tau: Tensor, low: Tensor | None) -> Tensor:
        if low is None:
            return tau
        kept = tau.clone()
        self.band(kept, low, torch.full_like(low, float("inf")))
        return kept


class Compiled(Plain):
    """The loops compiled by numba; see `Plain`.

    Raises:
        ImportError: if numba is not installed.
    """

    def __init__(self) -> None:
        import numba

        def compiled(loop: Callable[..., Any]) -> Any:
            plain = inspect.unwrap(getattr(loop, "py_func", loop))
            return numba.njit(nogil=True, cache=True, error_model="numpy")(plain)

        # What loops call is compiled before them.
        called = ("uniform", "weigh", "sum_strip", "count_group", "count_before", "sort_by_digit",
                  "rank_magnitudes")  # fmt: skip
        for name in called:
            setattr(_loops, name, compiled(getattr(_loops, name)))
        self._loops = {
            name: compiled(getattr(_loops, name))
            for name in ("differences", "count_upper", "count_lower", "count_signs", "band",
                         "drop", "drop_by_rank", "elected_sum")
        }  # fmt: skip

    def differences(
        self, models: Sequence[Tensor], base: Tensor, step: int, held: Tensor
    ) -> Iterator[Tensor]:
        """Subtract the base; numbers of 16 bits are widened on the way."""
        one = len({model.dtype for model in models}) == 1
        words, shifts = zip(
            *(_words(model if one else model.float()) for model in models), strict=True
        )
        loop, how, memory = self._loops["differences"], (shifts[0], *_words(base)), held.numpy()
        for start in range(0, base.numel(), step):
            count = min(step, base.numel() - start)
            tau = memory[: len(words) * count].reshape(len(words), count)
            loop(words, *how, start, tau)
            yield torch.from_numpy(tau)

    def count_upper(self, tau: Tensor, counts: Tensor) -> None:
        """Count by the upper bits."""
        self._loops["count_upper"](_bits(tau), counts.numpy())

    def count_lower(self, tau: Tensor, bins: Tensor, counts: Tensor) -> None:
        """Count by the lower bits."""
        self._loops["count_lower"](_bits(tau), bins.numpy(), counts.numpy())

    def count_signs(self, tau: Tensor, weights: Sequence[float], low: Tensor | None = None) -> int:
        """Count the signs of the sum."""
        return int(self._loops["count_signs"](_flat(tau), _least(tau, low), _floats(weights)))

    def band(self, tau: Tensor, low: Tensor, high: Tensor) -> None:
        """Zero what is outside."""
        self._loops["band"](_flat(tau), low.numpy(), high.numpy())

    def drop(self, tau: Tensor, stream: Stream, density: float) -> None:
        """Drop at random."""
        self._loops["drop"](_flat(tau), _keys(stream, tau), stream.offset, np.float32(density))

    def drop_by_rank(self, tau: Tensor, stream: Stream, density: float, epsilon: float) -> None:
        """Drop at random, by rank."""
        lines = tau.view(len(tau), -1, tau.shape[-1]).numpy()
        shares = np.float32(density), np.float32(epsilon)
        self._loops["drop_by_rank"](lines, _keys(stream, tau), stream.offset, *shares)

    def elected_sum(
        self,
        tau: Tensor,
        weights: Sequence[float],
        *,
        mean: bool,
        majority: float = 0.0,
        low: Tensor | None = None,
    ) -> Tensor:
        """Sum what agrees."""
        out = torch.empty(tau.shape[1:])
        how = _least(tau, low), _floats(weights), np.float32(majority), mean
        self._loops["elected_sum"](_flat(tau), *how, out.view(-1).numpy())
        return out


def kernels(tau: Tensor) -> Plain:
    """Return the fastest loops for a tensor.

    Args:
        tau: what they will be used on.

    Returns:
        The compiled ones on the CPU, else the plain ones.
    """
    usable = tau.device.type == "cpu" and tau.numel() > 0
    return (_compiled() if usable else None) or Plain()


@lru_cache(maxsize=1)
def _compiled() -> Plain | None:
    try:
        return Compiled()
    except (ImportError, RuntimeError):  # RuntimeError: nowhere to cache what is compiled
        return None


def _number(value: float, beside: Tensor) -> Tensor:
    """A divisor on a tensor's device: there, dividing by a Python number takes its reciprocal."""
    return beside.new_full((), value)


def _flat(tau: Tensor) -> Any:
    return tau.view(len(tau), -1).numpy()


def _bits(tau: Tensor) -> Any:
    return tau.view(len(tau), -1).view(torch.int32).numpy()


def _words(tensor: Tensor) -> tuple[Any, np.uint32]:
    """Unsigned integers that, shifted so far to the left, are a tensor's bits in float32."""
    flat = tensor.detach().reshape(-1)
    if flat.dtype == torch.bfloat16:
        return flat.view(torch.int16).numpy().view(np.uint16), np.uint32(16)
    return flat.float().view(torch.int32).numpy().view(np.uint32), np.uint32(0)


def _least(tau: Tensor, low: Tensor | None) -> Any:
    return np.zeros(len(tau), np.float32) if low is None else low.numpy()


def _floats(weights: Sequence[float]) -> Any:
    return np.asarray(weights, dtype=np.float32)


def _keys(stream: Stream, tau: Tensor) -> Any:
    return np.asarray(stream.keys(len(tau)), dtype=np.int64).view(np.uint64)

"""The hot loops of element-wise methods, compiled by numba; `_kernels` does without where it must.

A `source` names the numbers of all models where they lie, in the type that they are stored in:
(address per model, an empty array of their type, their shift, address of the base or 0, an empty
array of its type, its shift, number of entries). Integers that are shifted so far to the left are
the bits of float32 numbers. Task vectors are made of them strip by strip and never leave the cache.
"""
# mypy: ignore-errors

import inspect

import numba
import numpy as np
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

_ABS = np.int32(0x7FFFFFFF)
_ONE, _ZERO, _HALF = np.float32(1), np.float32(0), np.float32(0.5)
_UNIT, _TINY = np.float32(2.0**-24), np.float32(1e-12)
_LARGEST = np.float32(np.finfo(np.float32).max)
# Bits of a digit that is sorted by, at most.
_DIGIT = 11
# Entries that are worked on together, so that every inner loop is over one array.
_STRIP = 2048
_GROUP = 16
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1, _MIX2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S27, _S30, _S31, _S40 = np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(40)
# What of a task vector is left.
EVERYTHING, A_BAND, A_DRAW = range(3)


def _compiled(loop):
    """Compile a loop; what checks types at run time may have wrapped it."""
    return numba.njit(nogil=True, cache=True, error_model="numpy")(inspect.unwrap(loop))


@intrinsic
def _pointer(context, address):
    """Take an integer as an address."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


@intrinsic
def _fused(context, a, b, c):
    """Give a · b + c, rounded once: as `torch.add` does with an `alpha`."""

    def generate(context, builder, signature, arguments):
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


@_compiled
def _widen(address, kind, shift, begin, total, out):
    """Read numbers as float32."""
    words, bits = carray(_pointer(address), total, kind.dtype), out.view(np.uint32)
    part = words[begin : begin + len(out)]
    for i in range(len(out)):
        bits[i] = np.uint32(part[i]) << shift


@_compiled
def _load(source, start, base, tau, place):
    """Read a strip of the base, and the task vectors there: `tau` from `place` on."""
    models, kind, shift, origin, base_kind, base_shift, total = source
    if origin:
        _widen(origin, base_kind, base_shift, start, total, base)
    for t in range(len(models)):
        strip = tau[t, place : place + len(base)]
        _widen(models[t], kind, shift, start, total, strip)
        if origin:
            for i in range(len(base)):
                strip[i] -= base[i]


@_compiled
def differences(source, first, out):
    """Give the task vectors, from entry `first` on; `out` is (models, entries)."""
    base = np.empty(_STRIP, np.float32)
    for start in range(0, out.shape[1], _STRIP):
        count = min(_STRIP, out.shape[1] - start)
        _load(source, first + start, base[:count], out, start)


@_compiled
def combine(source, weights, out):
    """Add the weighted task vectors to the base; without one, sum the weighted models."""
    total, has_base = source[6], source[3] != 0
    base, tau = np.empty(_STRIP, np.float32), np.empty((len(weights), _STRIP), np.float32)
    for start in range(0, total, _STRIP):
        count = min(_STRIP, total - start)
        _load(source, start, base[:count], tau, 0)
        merged = out[start : start + count]
        for i in range(count):
            merged[i] = base[i] if has_base else weights[0] * tau[0, i]
        for t in range(0 if has_base else 1, len(weights)):
            weight, line = weights[t], tau[t]
            for i in range(count):
                merged[i] = _fused(weight, line[i], merged[i])


@_compiled
def count_upper(source, counts):
    """Count magnitudes by the upper 16 of their 31 bits, and whether the lower are zero."""
    models, total = len(source[0]), source[6]
    base, tau = np.empty(_STRIP, np.float32), np.empty((models, _STRIP), np.float32)
    for start in range(0, total, _STRIP):
        count = min(_STRIP, total - start)
        _load(source, start, base[:count], tau, 0)
        for t in range(models):
            line, counted = tau[t].view(np.int32), counts[t]
            for i in range(count):
                magnitude = line[i] & _ABS
                counted[((magnitude >> 15) << 1) | np.int32((magnitude & 0x7FFF) != 0)] += 1


@_compiled
def count_lower(source, bins, counts):
    """Count magnitudes in one bin per rank and model by their lower 15 bits."""
    models, total = len(source[0]), source[6]
    base, tau = np.empty(_STRIP, np.float32), np.empty((models, _STRIP), np.float32)
    for start in range(0, total, _STRIP):
        count = min(_STRIP, total - start)
        _load(source, start, base[:count], tau, 0)
        for t in range(models):
            line = tau[t, :count].view(np.int32)
            for r in range(len(bins)):
                if bins[r, t] >= 0:
                    _count_in_bin(line, np.int32(bins[r, t]), counts[r, t])


@_compiled
def _count_in_bin(line, wanted, counted):
    # Few are in the bin: whole groups are passed over by one vectorised look.
    for start in range(0, len(line) - _GROUP + 1, _GROUP):
        found = False
        for i in range(start, start + _GROUP):
            found |= (line[i] & _ABS) >> 15 == wanted
        if found:
            _count_group(line, start, start + _GROUP, wanted, counted)
    _count_group(line, len(line) // _GROUP * _GROUP, len(line), wanted, counted)


@_compiled
def _count_group(line, start, stop, wanted, counted):
    for i in range(start, stop):
        magnitude = line[i] & _ABS
        if magnitude >> 15 == wanted:
            counted[magnitude & 0x7FFF] += 1


@_compiled
def count_signs(source, low, weights):
    """How many more entries of the weighted sum are positive than negative.

    Entries below `low` in magnitude, one number per model, are zero.
    """
    models, total, found = len(source[0]), source[6], 0
    base, tau = np.empty(_STRIP, np.float32), np.empty((models, _STRIP), np.float32)
    summed = np.empty(_STRIP, np.float32)
    for start in range(0, total, _STRIP):
        count = min(_STRIP, total - start)
        _load(source, start, base[:count], tau, 0)
        for t in range(models):
            _band(tau[t, :count], low[t], np.float32(np.inf))
        _weigh(tau, weights, summed[:count])
        for i in range(count):
            found += np.int32(summed[i] > _ZERO) - np.int32(summed[i] < _ZERO)
    return found


@_compiled
def merge(source, left, numbers, keys, weights, election, added, scale, out):
    """Sum what is left of the task vectors, weighted.

    `left` tells what that is, `numbers` (low per model, high per model, first position of the
    stream, density) and `keys` how. `election` is (whether to sum what has the sign of the sum
    only, whether to divide by the weights that were used, the sign where the sum is zero). `added`:
    the sum is multiplied by `scale` and added to the base.
    """
    low, high, offset, density = numbers
    models, total = len(source[0]), source[6]
    base, tau = np.empty(_STRIP, np.float32), np.empty((models, _STRIP), np.float32)
    sign, used = np.empty(_STRIP, np.float32), np.empty(_STRIP, np.float32)
    for start in range(0, total, _STRIP):
        count = min(_STRIP, total - start)
        _load(source, start, base[:count], tau, 0)
        for t in range(models):
            if left == A_BAND:
                _band(tau[t, :count], low[t], high[t])
            elif left == A_DRAW:
                _drop(tau[t, :count], keys[t], offset + start, density)
        merged = out[start : start + count]
        _weigh(tau, weights, merged)
        _elect(tau, weights, election, sign, used, merged)
        _add(base, added, scale, merged)


@_compiled
def merge_rows(source, numbers, keys, weights, election, added, scale, out):
    """As `merge`, of a draw by rank: `numbers` are (first position, density, epsilon, width)."""
    offset, density, epsilon, width = numbers
    models, total = len(source[0]), source[6]
    base, tau = np.empty(width, np.float32), np.empty((models, width), np.float32)
    ranks, used = np.empty(width, np.float32), np.empty(width, np.float32)
    sign = np.empty(width, np.float32)
    work, digits = np.empty((3, width), np.uint32), np.empty(1 << _DIGIT, np.uint32)
    for start in range(0, total, width):
        _load(source, start, base, tau, 0)
        for t in range(models):
            _rank(tau[t].view(np.int32), work, digits, ranks)
            _drop_by_rank(tau[t], ranks, keys[t], offset + start, density, epsilon)
        merged = out[start : start + width]
        _weigh(tau, weights, merged)
        _elect(tau, weights, election, sign, used, merged)
        _add(base, added, scale, merged)


@_compiled
def _band(line, low, high):
    """Zero what is outside of [low, high] in magnitude; NaN and infinity become NaN."""
    for i in range(len(line)):
        magnitude = abs(line[i])
        line[i] *= _ONE if (magnitude >= low) & (magnitude <= high) else _ZERO


@_compiled
def _uniform(key, position):
    """Number in [0, 1) at a position of a stream; see `_random.Stream`."""
    word = key + np.uint64(position + 1) * _GOLDEN
    word = (word ^ (word >> _S30)) * _MIX1
    word = (word ^ (word >> _S27)) * _MIX2
    word = word ^ (word >> _S31)
    return np.float32(np.int32(word >> _S40)) * _UNIT


@_compiled
def _drop(line, key, first, density):
    """Keep entries with probability `density`, divided by it."""
    divisor = density if density > _ZERO else _ONE
    for i in range(len(line)):
        kept = _uniform(key, first + i) < density
        line[i] = (line[i] if kept else line[i] * _ZERO) / divisor


@_compiled
def _drop_by_rank(line, ranks, key, first, density, epsilon):
    """As `_drop`, with a probability that grows with the rank."""
    for i in range(len(line)):
        centred = (ranks[i] + _HALF) / np.float32(len(line)) - _HALF
        keep = min(max(density + epsilon * centred, _ZERO), _ONE)
        kept = _uniform(key, first + i) < keep
        line[i] = line[i] * (_ONE if kept else _ZERO) / max(keep, _TINY)


@_compiled
def _weigh(tau, weights, summed):
    """Multiply task vectors with their weights, and sum them, one after the other."""
    for t in range(len(weights)):
        weight, line = weights[t], tau[t]
        for i in range(len(summed)):
            line[i] *= weight
            summed[i] = summed[i] + line[i] if t else line[i]


@_compiled
def _elect(weighted, weights, election, sign, used, merged):
    """Replace sums by those of what has their sign, if there is an election."""
    elect, mean, majority = election
    if not elect:
        return
    count, finite = len(merged), True
    for i in range(count):
        finite &= abs(merged[i]) <= _LARGEST
        sign[i] = _ONE if merged[i] > _ZERO else (-_ONE if merged[i] < _ZERO else majority)
        merged[i], used[i] = _ZERO, _ZERO
    for t in range(len(weights)):
        weight, line = weights[t], weighted[t]
        for i in range(count):
            agrees = line[i] * sign[i] > _ZERO
            merged[i] += line[i] if agrees else _ZERO
            used[i] += weight if agrees else _ZERO
        if not finite:  # what is not has to show
            for i in range(count):
                merged[i] += line[i] * _ZERO
    if mean:
        for i in range(count):
            merged[i] /= used[i] if used[i] != _ZERO else _ONE


@_compiled
def _add(base, added, scale, merged):
    """Replace what is merged by the base and a multiple of it, if that is asked for."""
    if added:
        for i in range(len(merged)):
            merged[i] = _fused(scale, merged[i], base[i])


@_compiled
def _rank(bits, work, counts, ranks):
    """Rank magnitudes in ascending order, equal ones by position (radix sort).

    Sorted by are only the bits that tell those of this row apart: differences of 16-bit numbers end
    in zeros, and their exponents have few values.
    """
    keys, order, spare = work[0], work[1], work[2]
    used, low, high = np.int32(0), _ABS, np.int32(0)
    for i in range(len(bits)):
        magnitude = bits[i] & _ABS
        used |= magnitude
        low = min(low, magnitude if magnitude != 0 else _ABS)
        high = max(high, magnitude)
    zeros = np.int32(0)
    while zeros < 31 and not (used >> zeros) & 1:
        zeros += np.int32(1)
    below = (low >> zeros) - 1  # so that the smallest but 0 becomes 1
    for i in range(len(bits)):
        magnitude = bits[i] & _ABS
        keys[i] = np.uint32((magnitude >> zeros) - below if magnitude != 0 else 0)
        order[i] = i
    wide = 1
    while high and ((high >> zeros) - below) >> wide:
        wide += 1
    digits = (wide + _DIGIT - 1) // _DIGIT
    digit = (wide + digits - 1) // digits
    for d in range(digits):
        shift = np.uint32(d * digit)
        _count_before(keys, shift, counts[: 1 << digit])
        _sort_by_digit(keys, order, shift, counts[: 1 << digit], spare, ranks)
        order, spare = spare, order


@_compiled
def _sort_by_digit(keys, order, shift, before, out, ranks):
    """Sort positions by one digit of their keys, equal ones as in `order`; keep their ranks."""
    mask = np.uint32(len(before) - 1)
    for j in range(len(keys)):
        i = order[j]
        digit = (keys[i] >> shift) & mask
        place = before[digit]
        before[digit] = place + np.uint32(1)
        out[place], ranks[i] = i, np.float32(place)


@_compiled
def _count_before(keys, shift, counts):
    """Count the keys whose digit is smaller, for every digit."""
    mask = np.uint32(len(counts) - 1)
    counts[:] = 0
    for i in range(len(keys)):
        counts[(keys[i] >> shift) & mask] += np.uint32(1)
    before = np.uint32(0)
    for digit in range(len(counts)):
        here = counts[digit]
        counts[digit] = before
        before += here

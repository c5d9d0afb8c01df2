"""The loops that `_kernels` compiles: plain Python over NumPy arrays, one entry at a time.

`tau` is (models, entries), float32; `bits` is the same memory as int32.
"""
# mypy: ignore-errors

import numpy as np

_ABS = np.int32(0x7FFFFFFF)
_ONE, _ZERO, _HALF = np.float32(1), np.float32(0), np.float32(0.5)
_UNIT, _TINY = np.float32(2.0**-24), np.float32(1e-12)
# Bits of a digit that is sorted by, at most.
_DIGIT = 11
# Entries that are worked on together, so that every inner loop is over one array.
_STRIP = 4096
_GROUP = 16
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1, _MIX2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S27, _S30, _S31, _S40 = np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(40)


def differences(models, shift, origin, origin_shift, first, out):
    """Subtract `origin` from every model, from entry `first` on.

    Their integers, shifted to the left, are the bits of float32 numbers.
    """
    wide, base = np.empty(_STRIP, np.uint32), np.empty(_STRIP, np.uint32)
    minuend, subtrahend = wide.view(np.float32), base.view(np.float32)
    for start in range(0, out.shape[1], _STRIP):
        count, begin = min(_STRIP, out.shape[1] - start), first + start
        ancestor = origin[begin : begin + count]
        for i in range(count):
            base[i] = np.uint32(ancestor[i]) << origin_shift
        for t, model in enumerate(models):
            words, strip = model[begin : begin + count], out[t, start : start + count]
            for i in range(count):
                wide[i] = np.uint32(words[i]) << shift
            for i in range(count):
                strip[i] = minuend[i] - subtrahend[i]


def count_upper(bits, counts):
    """Count magnitudes by the upper 16 of their 31 bits."""
    for t in range(bits.shape[0]):
        line, counted = bits[t], counts[t]
        for i in range(len(line)):
            counted[(line[i] & _ABS) >> 15] += 1


def count_lower(bits, bins, counts):
    """Count magnitudes in one bin per rank and model by their lower 15 bits."""
    for r in range(bins.shape[0]):
        for t in range(bits.shape[0]):
            wanted, line, counted = np.int32(bins[r, t]), bits[t], counts[r, t]
            # Few are in the bin: whole groups are passed over by one vectorised look.
            for start in range(0, len(line) - _GROUP + 1, _GROUP):
                found = False
                for i in range(start, start + _GROUP):
                    found |= (line[i] & _ABS) >> 15 == wanted
                if found:
                    count_group(line, start, start + _GROUP, wanted, counted)
            count_group(line, len(line) // _GROUP * _GROUP, len(line), wanted, counted)


def count_group(line, start, stop, wanted, counted):
    """Count those of entries start:stop that are in a bin."""
    for i in range(start, stop):
        magnitude = line[i] & _ABS
        if magnitude >> 15 == wanted:
            counted[magnitude & 0x7FFF] += 1


def band(tau, low, high):
    """Zero what is outside of [low, high] in magnitude; NaN and infinity become NaN."""
    for t in range(tau.shape[0]):
        least, most = low[t], high[t]
        for i in range(tau.shape[1]):
            magnitude = abs(tau[t, i])
            inside = (magnitude >= least) & (magnitude <= most)
            tau[t, i] *= _ONE if inside else _ZERO


def uniform(key, position):
    """Number in [0, 1) at a position of a stream; see `_random.Stream`."""
    word = key + np.uint64(position + 1) * _GOLDEN
    word = (word ^ (word >> _S30)) * _MIX1
    word = (word ^ (word >> _S27)) * _MIX2
    word = word ^ (word >> _S31)
    return np.float32(word >> _S40) * _UNIT


def drop(tau, keys, offset, density):
    """Keep entries with probability `density`, divided by it."""
    divisor = density if density > _ZERO else _ONE
    for t in range(tau.shape[0]):
        for i in range(tau.shape[1]):
            kept = uniform(keys[t], offset + i) < density
            tau[t, i] = (tau[t, i] if kept else tau[t, i] * _ZERO) / divisor


def drop_by_rank(tau, keys, offset, density, epsilon):
    """As `drop`, for (models, rows, n), by the rank of the magnitude in its row."""
    models, rows, width = tau.shape
    work, counts = np.empty((3, width), np.uint32), np.empty(1 << _DIGIT, np.uint32)
    ranks = np.empty(width, np.float32)
    for t in range(models):
        for row in range(rows):
            line, first = tau[t, row], offset + row * width
            rank_magnitudes(line.view(np.int32), work, counts, ranks)
            for i in range(width):
                centred = (ranks[i] + _HALF) / np.float32(width) - _HALF
                keep = min(max(density + epsilon * centred, _ZERO), _ONE)
                kept = uniform(keys[t], first + i) < keep
                line[i] = line[i] * (_ONE if kept else _ZERO) / max(keep, _TINY)


def rank_magnitudes(bits, work, counts, ranks):
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
        count_before(keys, shift, counts[: 1 << digit])
        sort_by_digit(keys, order, shift, counts[: 1 << digit], spare, ranks)
        order, spare = spare, order


def sort_by_digit(keys, order, shift, before, out, ranks):
    """Sort positions by one digit of their keys, equal ones as in `order`; keep their ranks."""
    mask = np.uint32(len(before) - 1)
    for j in range(len(keys)):
        i = order[j]
        digit = (keys[i] >> shift) & mask
        place = before[digit]
        before[digit] = place + np.uint32(1)
        out[place], ranks[i] = i, np.float32(place)


def count_before(keys, shift, counts):
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


def elected_sum(tau, low, weights, majority, mean, out):
    """Sum what has the sign of the weighted sum; `mean`: divide by the weights that were used.

    Entries below `low` in magnitude, one number per model, are zero.
    """
    models = tau.shape[0]
    weighted = np.empty((models, _STRIP), np.float32)
    elected, used = np.empty(_STRIP, np.float32), np.empty(_STRIP, np.float32)
    for start in range(0, tau.shape[1], _STRIP):
        count = min(_STRIP, tau.shape[1] - start)
        for t in range(models):
            weigh(tau[t, start : start + count], low[t], weights[t], weighted[t])
        sum_strip(weighted, count, elected)
        merged = out[start : start + count]
        for i in range(count):
            elected[i] = majority if elected[i] == _ZERO else elected[i]
            merged[i], used[i] = _ZERO, _ZERO
        for t in range(models):
            weight, line = weights[t], weighted[t]
            for i in range(count):
                # Signs are compared, not a product: that of tiny numbers may vanish.
                agrees = ((line[i] > _ZERO) & (elected[i] > _ZERO)) | (
                    (line[i] < _ZERO) & (elected[i] < _ZERO)
                )
                merged[i] += line[i] if agrees else line[i] * _ZERO
                used[i] += weight if agrees else _ZERO
        if mean:
            for i in range(count):
                merged[i] /= used[i] if used[i] != _ZERO else _ONE


def count_signs(tau, low, weights):
    """How many more entries of the weighted sum are positive than negative; see `elected_sum`."""
    models, found = tau.shape[0], 0
    weighted, total = np.empty((models, _STRIP), np.float32), np.empty(_STRIP, np.float32)
    for start in range(0, tau.shape[1], _STRIP):
        count = min(_STRIP, tau.shape[1] - start)
        for t in range(models):
            weigh(tau[t, start : start + count], low[t], weights[t], weighted[t])
        sum_strip(weighted, count, total)
        for i in range(count):
            found += np.int32(total[i] > _ZERO) - np.int32(total[i] < _ZERO)
    return found


def weigh(line, low, weight, out):
    """Multiply entries with their model's weight; those below `low` in magnitude are zero."""
    for i in range(len(line)):
        out[i] = weight * (line[i] * (_ONE if abs(line[i]) >= low else _ZERO))


def sum_strip(weighted, count, total):
    """Sum the models' entries up to a number of them; one model after the other."""
    for i in range(count):
        total[i] = weighted[0, i]
    for t in range(1, weighted.shape[0]):
        line = weighted[t]
        for i in range(count):
            total[i] += line[i]

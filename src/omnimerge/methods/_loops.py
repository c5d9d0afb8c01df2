"""The loops that `_kernels` compiles: plain Python over NumPy arrays, one entry at a time.

`tau` is (models, entries), float32; `bits` is the same memory as int32.
"""
# mypy: ignore-errors

import numpy as np

_ABS = np.int32(0x7FFFFFFF)
_ONE, _ZERO, _HALF = np.float32(1), np.float32(0), np.float32(0.5)
_UNIT, _TINY = np.float32(2.0**-24), np.float32(1e-12)
_LOW, _BYTE = np.uint64(0xFFFFFFFF), np.uint64(0xFF)
# Entries that are worked on together, so that every inner loop is over one array.
_STRIP = 4096
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1, _MIX2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S27, _S30, _S31, _S40 = np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(40)


def count_upper(bits, counts):
    """Count magnitudes by the upper 16 of their 31 bits."""
    for t in range(bits.shape[0]):
        for i in range(bits.shape[1]):
            counts[t, (bits[t, i] & _ABS) >> 15] += 1


def count_lower(bits, bins, counts):
    """Count magnitudes in one bin per rank and model by their lower 15 bits."""
    for r in range(bins.shape[0]):
        for t in range(bits.shape[0]):
            wanted = bins[r, t]
            for i in range(bits.shape[1]):
                magnitude = bits[t, i] & _ABS
                if magnitude >> 15 == wanted:
                    counts[r, t, magnitude & 0x7FFF] += 1


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
    packed, spare = np.empty(width, np.uint64), np.empty(width, np.uint64)
    counts = np.empty((4, 256), np.int64)
    for t in range(models):
        for row in range(rows):
            line = tau[t, row]
            sort_by_magnitude(line.view(np.int32), packed, spare, counts)
            for rank in range(width):
                i = np.int64(packed[rank] & _LOW)
                centred = (np.float32(rank) + _HALF) / np.float32(width) - _HALF
                keep = min(max(density + epsilon * centred, _ZERO), _ONE)
                kept = uniform(keys[t], offset + row * width + i) < keep
                line[i] = line[i] * (_ONE if kept else _ZERO) / max(keep, _TINY)


def sort_by_magnitude(bits, packed, spare, counts):
    """Fill `packed` with magnitude << 32 | position, in ascending order (radix sort, stable)."""
    counts[:] = 0
    for i in range(len(bits)):
        magnitude = np.uint64(bits[i] & _ABS)
        packed[i] = (magnitude << np.uint64(32)) | np.uint64(i)
        for digit in range(4):
            counts[digit, (magnitude >> np.uint64(8 * digit)) & _BYTE] += 1
    for digit in range(4):
        start = 0
        for b in range(256):
            start, counts[digit, b] = start + counts[digit, b], start
        shift = np.uint64(32 + 8 * digit)
        for i in range(len(bits)):
            value = packed[i]
            bucket = (value >> shift) & _BYTE
            spare[counts[digit, bucket]] = value
            counts[digit, bucket] += 1
        packed, spare = spare, packed  # four times: the result ends where it began


def elected_sum(tau, weights, majority, mean, out):
    """Sum what has the sign of the weighted sum; `mean`: divide by the weights that were used."""
    elected, used = np.empty(_STRIP, np.float32), np.empty(_STRIP, np.float32)
    for start in range(0, tau.shape[1], _STRIP):
        stop = min(start + _STRIP, tau.shape[1])
        sum_strip(tau, weights, start, stop, elected)
        merged = out[start:stop]
        for i in range(stop - start):
            elected[i] = majority if elected[i] == _ZERO else elected[i]
            merged[i], used[i] = _ZERO, _ZERO
        for t in range(tau.shape[0]):
            weight, line = weights[t], tau[t, start:stop]
            for i in range(stop - start):
                weighted = weight * line[i]
                # Signs are compared, not a product: that of tiny numbers may vanish.
                agrees = ((weighted > _ZERO) & (elected[i] > _ZERO)) | (
                    (weighted < _ZERO) & (elected[i] < _ZERO)
                )
                merged[i] += weighted if agrees else weighted * _ZERO
                used[i] += weight if agrees else _ZERO
        if mean:
            for i in range(stop - start):
                merged[i] /= used[i] if used[i] != _ZERO else _ONE


def count_signs(tau, weights):
    """How many more entries of the weighted sum are positive than negative."""
    found = 0
    total = np.empty(_STRIP, np.float32)
    for start in range(0, tau.shape[1], _STRIP):
        stop = min(start + _STRIP, tau.shape[1])
        sum_strip(tau, weights, start, stop, total)
        for i in range(stop - start):
            found += np.int32(total[i] > _ZERO) - np.int32(total[i] < _ZERO)
    return found


def sum_strip(tau, weights, start, stop, total):
    """Sum entries start:stop of the models with their weights; one model after the other."""
    for i in range(stop - start):
        total[i] = weights[0] * tau[0, start + i]
    for t in range(1, tau.shape[0]):
        weight, line = weights[t], tau[t, start:stop]
        for i in range(stop - start):
            total[i] += weight * line[i]

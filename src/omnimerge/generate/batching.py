"""Group prompts into batches of similar length, so that little is padded."""

from __future__ import annotations

from collections.abc import Sequence


def batches(sizes: Sequence[tuple[int, int, int]], batch_size: int) -> list[list[int]]:
    """Return the positions of the prompts, batch by batch.

    Prompts with different numbers of images never share a batch, since some processors refuse
    that. Longer ones come first, so that a batch that does not fit fails at once.

    Args:
        sizes: number of images, their pixels together, and text tokens, per prompt.
        batch_size: the most prompts in a batch, at least 1.

    Returns:
        Lists of positions in `sizes`; each position occurs once.
    """
    order = sorted(range(len(sizes)), key=lambda i: (*(-size for size in sizes[i]), i))
    found: list[list[int]] = []
    for position in order:
        fits = found and len(found[-1]) < batch_size
        if fits and sizes[found[-1][0]][0] == sizes[position][0]:
            found[-1].append(position)
        else:
            found.append([position])
    return found

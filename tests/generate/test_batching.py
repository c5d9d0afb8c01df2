"""Batches of similar length."""

from omnimerge.generate.batching import batches


def test_longest_first_and_image_counts_apart():
    sizes = [(0, 0, 5), (1, 100, 3), (0, 0, 9), (1, 400, 1), (1, 100, 8), (0, 0, 5)]
    # with an image, by pixels then text: 3, 4, 1; without: 2, then 0 and 5 in their order
    assert batches(sizes, 2) == [[3, 4], [1], [2, 0], [5]]
    assert batches(sizes, 99) == [[3, 4, 1], [2, 0, 5]]
    assert batches([], 4) == []

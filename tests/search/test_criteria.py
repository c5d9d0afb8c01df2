"""Criteria against tables of answers whose every number is worked out beside them."""

import itertools

import pytest

from omnimerge.errors import SearchError
from omnimerge.search import CRITERIA, parse_grid, select
from omnimerge.search.criteria import PRESETS, backward, get_criterion, line, pairwise, unanimity
from omnimerge.search.distances import get_distance

GRID = parse_grid("0:0.6:0.1")

# Answers to three prompts (columns) at the seven points of the published grid (rows).
#         differs from the row above:  p q r  count
ANSWERS = [
    ["red", "2", "a dog"],  # 0.0
    ["Red", "3", "a dog"],  # 0.1      . x .   1   ("Red" = "red": case does not count)
    ["blue", "3", "a cat"],  # 0.2     x . x   2
    ["blue", "3", "a dog"],  # 0.3     . . x   1
    ["BLUE", "3", "a dog"],  # 0.4     . . .   0
    ["blue", "4", "A Dog"],  # 0.5     . x .   1
    ["green", "5", ""],  # 0.6         x x x   3
]

# unanimity: prompts marked in their own row or in the row below (either neighbour)
#   0.1: q own; p, r below   -> {p, q, r} = 3
#   0.2: p, r own; r below   -> {p, r}    = 2
#   0.3: r own; none below   -> {r}       = 1
#   0.4: none own; q below   -> {q}       = 1
#   0.5: q own; p, q, r below-> {p, q, r} = 3
UNANIMITY = [None, 3, 2, 1, 1, 3, None]

# pairwise: own count + count of the row below: 1+2, 2+1, 1+0, 0+1, 1+3
PAIRWISE = [None, 3, 3, 1, 1, 4, None]

# backward: own count; the last point takes part, the first does not
BACKWARD = [None, 1, 2, 1, 0, 1, 3]


def test_unanimity():
    assert unanimity(ANSWERS) == UNANIMITY


def test_pairwise():
    assert pairwise(ANSWERS) == PAIRWISE


def test_backward():
    assert backward(ANSWERS) == BACKWARD


def test_one_prompt_that_flips_both_ways_counts_once_or_twice():
    flips = [["a"], ["b"], ["a"]]
    assert unanimity(flips) == [None, 1, None]
    assert pairwise(flips) == [None, 2, None]
    assert backward(flips) == [None, 1, 1]


def test_ties_go_to_the_smallest_coefficient_and_are_reported():
    chosen = select(GRID, unanimity(ANSWERS))
    assert (chosen.point, chosen.score, chosen.tie_set) == (0.3, 1.0, (0.3, 0.4))
    chosen = select(GRID, backward(ANSWERS))
    assert (chosen.point, chosen.score, chosen.tie_set) == (0.4, 0.0, (0.4,))


def test_the_last_point_can_win_under_backward_only():
    answers = [["a"], ["b"], ["c"], ["c"]]
    points = (0.0, 0.1, 0.2, 0.3)
    # backward: 1, 1, 0 -> 0.3.  unanimity: 0.1 differs from both, 0.2 from 0.1 only: 1, 1 -> 0.1
    assert select(points, backward(answers)).point == 0.3
    assert unanimity(answers) == [None, 1, 1, None]
    # pairwise: 1+1 = 2 and 1+0 = 1 -> 0.2
    assert pairwise(answers) == [None, 2, 1, None]
    assert select(points, pairwise(answers)).point == 0.2


def test_steps_of_five_hundredths_all_count():
    # The published script cuts "0.05" and "0.15" to three characters, and so loses them.
    points = parse_grid("0:0.2:0.05")
    answers = [["a", "x"], ["b", "x"], ["b", "y"], ["b", "y"], ["b", "y"]]
    # 0.05: p above, q below -> 2;  0.10: q above -> 1;  0.15: none -> 0
    assert unanimity(answers) == [None, 2, 1, 0, None]
    assert select(points, unanimity(answers)).point == 0.15


@pytest.mark.parametrize("name", CRITERIA)
def test_equal_answers_everywhere_tie_at_zero(name):
    answers = [["Yes", "no"], ["yes", "NO"], ["YES", "No"]]
    scores = CRITERIA[name](answers)
    assert {s for s in scores if s is not None} == {0.0}
    assert select((0.1, 0.2, 0.3), scores).point == 0.2


def test_only_case_is_ignored():
    # White space, punctuation and number formats count, as in the published scripts.
    assert backward([["1"], ["1.0"], ["1.0 "], ["1.0."]]) == [None, 1, 1, 1]


@pytest.mark.parametrize(("name", "least"), [("unanimity", 3), ("pairwise", 3), ("backward", 2)])
def test_too_few_points(name, least):
    assert CRITERIA[name]([["a"]] * least)
    with pytest.raises(SearchError, match=f"give a grid of at least {least} points"):
        CRITERIA[name]([["a"]] * (least - 1))


def test_points_with_different_or_no_answers_are_refused():
    with pytest.raises(SearchError, match=r"have \[1, 2\] answers"):
        unanimity([["a"], ["a", "b"], ["a"]])
    with pytest.raises(SearchError, match=r"have \[0\] answers"):
        backward([[], []])


def test_names_are_looked_up_with_a_hint():
    assert get_criterion("pairwise") is pairwise
    with pytest.raises(SearchError, match="did you mean 'unanimity'"):
        get_criterion("unanimty")


def test_nothing_to_choose_from():
    with pytest.raises(SearchError, match="no point of the grid can be chosen"):
        select((0.0, 0.1), (None, None))


def grid(*sizes):
    """Neighbours on a full grid of 2 axes, numbered row by row."""
    rows, columns = sizes
    found = []
    for row in range(rows):
        for column in range(columns):
            here = row * columns + column
            found.append(
                [
                    (
                        here - columns if row else None,
                        here + columns if row + 1 < rows else None,
                    ),
                    (here - 1 if column else None, here + 1 if column + 1 < columns else None),
                ]
            )
    return found


def test_a_line_is_the_default():
    assert line(3) == [[(None, 1)], [(0, 2)], [(1, None)]]
    for criterion in CRITERIA.values():
        assert criterion(ANSWERS, neighbours=line(7)) == criterion(ANSWERS)


def test_two_axes():
    #   a b a     the middle (b) differs from all four neighbours for the first prompt,
    #   a b c     and from none for the second
    #   a a a
    answers = [[first, "x"] for first in "abaabcaaa"]
    answers[1] = ["a", "x"]
    around = grid(3, 3)
    assert unanimity(answers, neighbours=around) == [None] * 4 + [1] + [None] * 4
    assert pairwise(answers, neighbours=around) == [None] * 4 + [4] + [None] * 4
    # backward needs a point above and one to the left:
    #   middle: a above, a left -> 2;  right of it: a above, b left -> 2
    #   below the middle: b above, a left -> 1;  last: c above, a left -> 1
    assert backward(answers, neighbours=around) == [None] * 4 + [2, 2, None, 1, 1]


def test_a_point_without_a_neighbour_on_one_axis_cannot_be_chosen():
    around = [[(None, 1), (0, 2)], [(0, None), (None, None)], [(None, None), (0, None)]]
    answers = [["a"], ["b"], ["c"]]
    assert unanimity(answers, neighbours=around) == [None] * 3
    assert backward(answers, neighbours=around) == [None] * 3


def test_spacing_divides_by_the_step_over_the_smallest_of_its_axis():
    # points 0, 0.2, 0.3, 0.4: steps of 2, 1, 1 smallest steps
    answers = [["a", "p"], ["b", "p"], ["c", "q"], ["c", "r"]]
    steps = [[(0.0, 0.2)], [(0.2, 0.1)], [(0.1, 0.1)], [(0.1, 0.0)]]
    # 0.2: first prompt 1/2 below and 1 above, second 0 and 1;  0.3: first 1 and 0, second 1 and 1
    assert unanimity(answers, spacing=steps) == [None, 1 + 1, 1 + 1, None]
    assert pairwise(answers, spacing=steps) == [None, 0.5 + 1 + 1, 1 + 1 + 1, None]
    assert backward(answers, spacing=steps) == [None, 0.5, 2, 1]
    even = [[(0.0, 0.1)], [(0.1, 0.1)], [(0.1, 0.1)], [(0.1, 0.0)]]
    assert pairwise(answers, spacing=even) == pairwise(answers)


def test_steps_of_different_axes_are_not_compared():
    around = grid(2, 2)
    steps = [[(10.0, 10.0), (0.1, 0.1)]] * 4
    answers = [["a"], ["b"], ["c"], ["d"]]
    assert backward(answers, neighbours=around, spacing=steps) == [None, None, None, 2]


def test_rounding_errors_of_steps_do_not_break_ties():
    points = [i / 10 for i in range(7)]  # 0.3 - 0.2 and 0.2 - 0.1 differ in the last bits
    before = [0.0, *(b - a for a, b in itertools.pairwise(points))]
    assert len(set(before[1:])) > 1
    steps = [[pair] for pair in zip(before, [*before[1:], 0.0], strict=True)]
    for criterion in CRITERIA.values():
        assert criterion(ANSWERS, spacing=steps) == criterion(ANSWERS)


def test_fractions_of_a_distance_are_added():
    class Half:
        name = "half"

        def between(self, a, b):
            return [0.1 if x != y else 0.0 for x, y in zip(a, b, strict=True)]

    answers = [["a"] * 3, ["b"] * 3, ["c"] * 3]
    assert unanimity(answers, distance=Half()) == [None, 0.3, None]  # not 0.30000000000000004
    assert pairwise(answers, distance=Half()) == [None, 0.6, None]


def test_every_pair_is_compared_once():
    asked = []

    class Watching:
        name = "watching"

        def between(self, a, b):
            asked.append((tuple(a), tuple(b)))
            return [0.0] * len(a)

    pairwise([["a"], ["b"], ["c"], ["d"]], distance=Watching())
    assert asked == [(("a",), ("b",)), (("b",), ("c",)), (("c",), ("d",))]


def test_wrong_neighbours_and_steps_are_refused():
    with pytest.raises(SearchError, match="3 points but neighbours of 2"):
        unanimity([["a"]] * 3, neighbours=line(2))
    with pytest.raises(SearchError, match="a step of 0"):
        unanimity([["a"]] * 3, spacing=[[(0.0, 0.0)]] * 3)


def test_points_of_several_axes_are_chosen_by_the_first_axis_first():
    points = [(0.1, 0.5), (0.1, 0.2), (0.2, 0.1)]
    chosen = select(points, [1.0, 1.0, 1.0])
    assert chosen.point == (0.1, 0.2)
    assert chosen.tie_set == ((0.1, 0.2), (0.1, 0.5), (0.2, 0.1))


def test_presets_are_the_published_settings():
    shared = {"grid": "0:0.6:0.1", "sample": 100, "distance": "exact"}
    assert PRESETS["adamms"] == {**shared, "criterion": "unanimity"}
    assert PRESETS["adamms-qwen"] == {**shared, "criterion": "backward"}
    for preset in PRESETS.values():
        assert get_criterion(preset["criterion"]) and get_distance(preset["distance"])
        assert parse_grid(preset["grid"]) == GRID

"""Criteria against tables of answers whose every number is worked out beside them."""

import pytest

from omnimerge.errors import SearchError
from omnimerge.search import CRITERIA, parse_grid, select
from omnimerge.search.criteria import backward, get_criterion, pairwise, unanimity

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

"""Spaces: axes, neighbours, spacing and what a point changes in a recipe."""

import re

import pytest

from omnimerge.errors import SearchError
from omnimerge.search.space import Axis, Space


def test_one_grid_is_one_axis():
    space = Space.of(["0:0.6:0.2"])
    assert space.axes == (Axis("alpha", (0.0, 0.2, 0.4, 0.6)),)
    assert space.points == ((0.0,), (0.2,), (0.4,), (0.6,))
    assert space.neighbours(space.points) == [[(None, 1)], [(0, 2)], [(1, 3)], [(2, None)]]
    assert space.settings((0.2,)) == ({"alpha": 0.2}, [])
    assert (space.label((0.2,)), space.file_name((0.2,))) == ("0.2", "alpha_0.20")
    assert space.evenly_spaced(space.points)


def test_the_product_of_two_axes():
    space = Space.of(["0:0.2:0.1", "density=0.5,1"])
    assert len(space.points) == 6
    assert space.values((0.1, 0.5)) == {"alpha": 0.1, "density": 0.5}
    around = space.neighbours(space.points)
    here = space.points.index((0.1, 0.5))
    assert [space.points[i] for i in around[here][0]] == [(0.0, 0.5), (0.2, 0.5)]
    assert around[here][1] == (None, space.points.index((0.1, 1.0)))
    assert space.file_name((0.1, 0.5)) == "alpha_0.10,density_0.50"
    assert space.label((0.1, 0.5)) == "alpha 0.1, density 0.5"


def test_coefficients_of_layer_ranges_and_slots():
    space = Space.of(["alpha@layers:0-13=0:0.4:0.2", "alpha@slot:mlp=0,0.5"])
    assert [axis.name for axis in space.axes] == ["alpha@layers:0-13", "alpha@slot:mlp"]
    parameters, overrides = space.settings((0.2, 0.5))
    assert parameters == {}
    assert overrides == [
        {"match": {"layers": "0-13"}, "parameters": {"alpha": 0.2}},
        {"match": {"slot": "mlp"}, "parameters": {"alpha": 0.5}},
    ]
    name = space.file_name((0.2, 0.5))
    assert re.fullmatch(r"alpha@layers_0-13-\w{8}_0.20,alpha@slot_mlp-\w{8}_0.50", name)


def test_names_of_files_tell_axes_apart_and_are_short():
    first, second = (Space.of([f"alpha@name:{name}=0,0.3"]) for name in ("q|k", "q?k"))
    assert first.file_name((0.3,)) != second.file_name((0.3,))
    assert first.file_name((0.3,)).startswith("alpha@name_q_k-")
    long = Space.of([f"alpha@name:{'x' * 300}=0,0.3", *(f"k{'y' * 90}{i}=0,1" for i in range(5))])
    names = {long.file_name(point) for point in long.points}
    assert len(names) == len(long.points) == 64 and max(map(len, names)) < 200
    korean = Space.of([f"alpha@name:{'가' * 200}=0,0.3"])
    assert len(korean.file_name((0.3,)).encode()) < 80


def test_only_what_is_searched_for_all_tensors_has_a_default():
    space = Space.of(["0.1,0.2", "density@layers:0=0.5,1"])
    assert space.defaults == {"alpha": 0.1}
    assert Space.simplex("0:0.6:0.2", 2).defaults == {"alpha": 0.0}


def test_shares_of_several_donors_lie_on_a_simplex():
    space = Space.simplex("0:0.6:0.2", 2)
    assert len(space.points) == 10 and (0.6, 0.2) not in space.points
    assert (0.4, 0.2) in space.points
    assert space.settings((0.4, 0.2)) == ({"alpha": 0.6, "weights": [0.4, 0.2]}, [])
    assert space.settings((0.0, 0.0)) == ({"alpha": 0.0, "weights": [1.0, 1.0]}, [])
    assert [axis.name for axis in space.axes] == ["alpha.1", "alpha.2"]
    interior = [
        point
        for point, around in zip(space.points, space.neighbours(space.points), strict=True)
        if all(None not in pair for pair in around)
    ]
    assert interior == [(0.2, 0.2)]


def test_refinement_adds_the_points_half_way():
    space = Space.of(["0:0.6:0.2"])
    between = space.between(space.points, (0.4,))
    assert between == [(0.3,), (0.5,)]
    finer = space.with_points(between)
    assert [p[0] for p in finer.points] == [0.0, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert finer.spacing(finer.points)[2] == [(pytest.approx(0.1), pytest.approx(0.1))]
    assert finer.spacing(finer.points)[1] == [(pytest.approx(0.2), pytest.approx(0.1))]
    assert not finer.evenly_spaced(finer.points)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (["0:0.6:0.2", "alpha=0,1"], "an axis is given twice: alpha, alpha"),
        (["alpha@layer:3=0,1"], "with KEY one of layers, slot, name, component"),
        (["alpha@layers=0,1"], "write alpha@KEY:VALUE=GRID"),
        (["2x=0,1"], "'2x' is no keyword"),
        (["0:1:0.001", "density=0:1:0.1"], "is out of range|more than"),
    ],
)
def test_mistakes_are_named(axes, message):
    with pytest.raises(SearchError, match=message):
        Space.of(axes)


def test_shares_start_at_zero():
    with pytest.raises(SearchError, match="do not start at 0"):
        Space.simplex("0.1:0.5:0.1", 2)

"""Planning a checkpoint of ten thousand tensors: its time grows as their number does."""

import cProfile
import pstats
import time

import published_headers
import pytest

import omnimerge

FEW, MANY = 6, 25  # layers, of 393 tensors each


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """A function: number of layers -> three checkpoints of a mixture of 128 experts a layer."""
    root = tmp_path_factory.mktemp("experts")

    def get(layers):
        folders = [root / f"{name}-{layers}" for name in ("base", "one", "two")]
        for folder in folders:
            if not folder.exists():
                published_headers.save(folder, *published_headers.internvl3_5_30b(layers))
        return [str(folder) for folder in folders]

    return get


def planned(folders):
    base, *models = folders
    return omnimerge.plan({"method": "ties", "base": base, "models": models})


def test_every_expert_of_a_mixture_has_its_job(experts):
    plan = planned(experts(MANY))
    # per layer 128 experts of three matrices, four of the attention, the router and four norms
    assert len(plan.merged) == MANY * (128 * 3 + 4 + 1 + 4) + 3 + 24 * 14 + 4 + 6
    assert len(plan.jobs) == len(plan.merged) == 10_174


def test_planning_is_linear_in_the_tensors(experts):
    few, many = (len(planned(experts(layers)).jobs) for layers in (FEW, MANY))
    calls = []
    for layers in (FEW, MANY):
        folders, profile = experts(layers), cProfile.Profile()
        profile.runcall(planned, folders)
        calls.append(pstats.Stats(profile).total_calls)
    assert calls[1] / calls[0] < 1.1 * many / few, calls
    assert calls[1] < 900 * many, calls  # seconds depend on the machine: benchmarks/planning.py

    def seconds(layers):
        folders, found = experts(layers), []
        for _ in range(2):
            start = time.process_time()
            planned(folders)
            found.append(time.process_time() - start)
        return min(found)

    short, long = seconds(FEW), seconds(MANY)
    assert long / short < 2 * many / few, (short, long)  # twice as much for a machine that is busy
    print(f"{few:,} tensors {short:.2f} s, {many:,} tensors {long:.2f} s; calls {calls}")

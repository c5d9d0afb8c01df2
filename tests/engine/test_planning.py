"""Planning a checkpoint of ten thousand tensors: its time grows as their number does."""

import cProfile
import pstats

import published_headers
import pytest

import omnimerge

FEW, MORE, MANY = 3, 12, 25  # layers, of 393 tensors each


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
    """Counted in calls: seconds depend on the machine, and are in benchmarks/planning.py."""
    jobs, calls = [], []
    for layers in (FEW, MORE):
        folders, profile = experts(layers), cProfile.Profile()
        jobs.append(len(profile.runcall(planned, folders).jobs))
        calls.append(pstats.Stats(profile).total_calls)
    assert calls[1] / calls[0] < 1.1 * jobs[1] / jobs[0], calls
    assert calls[1] < 900 * jobs[1], calls

"""Several models at once: the same answers as one, also when a model is lost."""

import json
import os
import threading
import time

import listening
import pytest

from omnimerge.errors import RecipeError
from omnimerge.search import read_result, search
from omnimerge.search import run as run_module

os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # the loopback address only
ray = pytest.importorskip("ray", reason="needs omnimerge[ray]")

OPTIONS = {"grid": "0:0.6:0.2", "sample": 6, "max_new_tokens": 4, "batch_size": 4}


@pytest.fixture(scope="module")
def cluster():
    # Not one that is running on this machine for somebody else.
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def recipe(pair):
    target, donor = pair
    return {"method": "adamms", "target": str(target), "models": [str(donor)]}


def answers(folder):
    return {
        file.name: [json.loads(line)["response"] for line in file.read_text().splitlines()]
        for file in sorted((folder / "responses").glob("*.jsonl"))
    }


def test_the_answers_are_those_of_one_model(cluster, recipe, prompts, tmp_path):
    local = search(recipe, prompts, tmp_path / "local", **OPTIONS)
    several = search(recipe, prompts, tmp_path / "ray", executor="ray", **OPTIONS)
    assert answers(tmp_path / "ray") == answers(tmp_path / "local")
    assert several.points == local.points and several.selected == local.selected
    assert several.diagnostics == local.diagnostics
    assert several.cost["samples_answered"] == local.cost["samples_answered"]
    assert read_result(tmp_path / "ray") == several


def test_nothing_listens_beyond_this_machine(cluster):
    """Every socket that a Ray process listens on is bound to the loopback address."""
    seen, beyond = listening.sockets_of("ray")
    assert seen >= 3 and beyond == []


def test_a_lost_model_is_replaced_and_its_point_done_again(
    cluster, recipe, prompts, tmp_path, monkeypatch
):
    from omnimerge.search.ray import RayExecutor

    killed = []

    class Killing(RayExecutor):
        def __init__(self, settings):
            super().__init__(settings, replicas=2)
            threading.Thread(target=self._kill_one, daemon=True).start()

        def _kill_one(self):
            while not self._actors:
                time.sleep(0.01)
            ray.kill(self._actors[0])
            killed.append(self._actors[0])

    monkeypatch.setattr("omnimerge.search.ray.RayExecutor", Killing)
    search(recipe, prompts, tmp_path / "ray", executor="ray", checks=False, **OPTIONS)
    monkeypatch.undo()
    search(recipe, prompts, tmp_path / "local", checks=False, **OPTIONS)
    assert killed
    assert answers(tmp_path / "ray") == answers(tmp_path / "local")


def test_an_error_of_a_model_is_the_same_error(cluster, recipe, prompts, tmp_path):
    with pytest.raises(RecipeError, match=r"alpha: 1\.2 is not in"):
        search(
            recipe, prompts, tmp_path / "out", executor="ray", **{**OPTIONS, "grid": "0:1.2:0.4"}
        )


def test_the_executor_is_named_in_the_module():
    assert run_module.EXECUTORS == ("local", "ray")

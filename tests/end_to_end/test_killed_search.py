"""kill -9 while a search answers, then the same command: nothing is asked twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from omnimerge.bench import zoo
from omnimerge.bench.zoo import demo, scenes

COMMAND = [sys.executable, "-m", "omnimerge", "search", "recipe.yaml", "--prompts"]
OPTIONS = ["--max-new-tokens", "8", "--batch-size", "4", "--sample", "120", "--json"]


@pytest.fixture
def work(tmp_path):
    scenes.write_prompts(tmp_path / "p", count=120, seed=3, labels=False)
    target, donor = zoo.path(demo.TARGET), zoo.path(demo.DONOR)
    (tmp_path / "recipe.yaml").write_text(f"method: adamms\ntarget: {target}\nmodels: [{donor}]\n")
    return tmp_path


def start(work, out):
    command = [*COMMAND, "p/prompts.jsonl", "-o", out, *OPTIONS]
    return subprocess.Popen(
        command, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def lines(folder):
    """Answers on disk so far: file -> its lines."""
    if not folder.is_dir():
        return {}
    found = {}
    for file in folder.iterdir():
        try:
            found[file.name] = [row for row in file.read_text().splitlines() if row]
        except FileNotFoundError:  # renamed meanwhile
            continue
    return found


def test_kill_9_and_the_same_command(work):
    killed = start(work, "out")
    responses = work / "out" / "responses"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:  # in the middle of some point
        names = list(lines(responses))
        if any(n.endswith(".begun") for n in names) and any(n[0] != "." for n in names):
            break
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.005)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    before = lines(responses)
    done = {name: (responses / name).stat().st_mtime_ns for name in before if name[0] != "."}
    assert done and not (work / "out" / "search.json").exists()

    second = start(work, "out")
    said, errors = second.communicate(timeout=300)
    assert second.returncode == 0, errors
    resumed = json.loads(said)
    for name, time_ns in done.items():  # finished points were not touched
        assert (responses / name).stat().st_mtime_ns == time_ns
    kept = len(
        {
            (name.strip(".").partition(".jsonl")[0], json.loads(row)["id"])
            for name, rows in before.items()
            for row in rows
            if row.endswith("}")  # the last one may be cut off
        }
    )
    asked = resumed["cost"]["samples_answered"]
    assert asked == 7 * 120 + 2 * 120 - kept  # all points, the second look, the donor

    fresh = start(work, "fresh")
    said, errors = fresh.communicate(timeout=300)
    assert fresh.returncode == 0, errors
    expected = json.loads(said)
    assert resumed["points"] == expected["points"]
    assert resumed["selected"] == expected["selected"]
    assert lines(responses) == lines(work / "fresh" / "responses")


def test_two_searches_into_one_folder(work):
    first = start(work, "out")
    deadline = time.monotonic() + 120
    while not lines(work / "out" / "responses") and time.monotonic() < deadline:
        time.sleep(0.02)
    second = start(work, "out")
    _, errors = second.communicate(timeout=120)
    assert second.returncode == 1
    assert errors.count("\n") == 1 and "another search is writing into it" in errors
    said, errors = first.communicate(timeout=300)
    assert first.returncode == 0, errors
    assert json.loads(said)["selected"]

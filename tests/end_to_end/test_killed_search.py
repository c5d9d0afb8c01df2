"""kill -9 while a search answers, then the same command: nothing is asked twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from omnimerge.bench import zoo
from omnimerge.bench.zoo import demo, scenes
from omnimerge.cli import main

COUNT = 40
COMMAND = ["search", "recipe.yaml", "--prompts", "p/prompts.jsonl"]
OPTIONS = ["--max-new-tokens", "8", "--batch-size", "4", "--sample", str(COUNT), "--json"]


@pytest.fixture
def work(tmp_path, monkeypatch):
    scenes.write_prompts(tmp_path / "p", count=COUNT, seed=3, labels=False)
    target, donor = zoo.path(demo.TARGET), zoo.path(demo.DONOR)
    (tmp_path / "recipe.yaml").write_text(f"method: adamms\ntarget: {target}\nmodels: [{donor}]\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(out):
    """The command in a process of its own, with as many threads as the tests have."""
    return subprocess.Popen(
        [sys.executable, "-m", "omnimerge", *COMMAND, "-o", out, *OPTIONS],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def here(out):
    """The command in this process, which has imported already what it takes."""
    return CliRunner().invoke(main, [*COMMAND, "-o", out, *OPTIONS])


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
    fresh = here("fresh")
    assert fresh.exit_code == 0, fresh.stderr
    expected = json.loads(fresh.stdout)

    killed = start("out")
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

    second = start("out")
    deadline = time.monotonic() + 120
    while lines(responses) == before and time.monotonic() < deadline:
        assert second.poll() is None, second.communicate()
        time.sleep(0.005)
    refused = here("out")
    assert second.poll() is None  # else there was nobody to refuse it for
    assert refused.exit_code == 1
    assert refused.stderr.count("\n") == 1 and "another search is writing into it" in refused.stderr

    said, errors = second.communicate(timeout=300)
    assert second.returncode == 0, errors
    resumed = json.loads(said)
    assert resumed["selected"]
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
    assert asked == 7 * COUNT + 2 * COUNT - kept  # all points, the second look, the donor

    assert resumed["points"] == expected["points"]
    assert resumed["selected"] == expected["selected"]
    assert lines(responses) == lines(work / "fresh" / "responses")

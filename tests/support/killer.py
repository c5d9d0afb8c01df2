"""Kill merges at random moments, resume them, and compare; run as a script.

    python killer.py RECIPES.json FOLDER CASES SEED

Every case is a merge in a forked child that dies by SIGKILL, either after a random time or at a
random one of its calls that change the file system; up to two resumed runs may be killed as well,
and between them runs of `clean`. The last one may finish. Prints JSON: how many cases, kills and
resumed bytes, and what came out different.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch

import omnimerge
from omnimerge.checkpoint import journal, staging
from omnimerge.engine import slices

_CALLS = ("pwrite", "fsync", "rename", "replace", "unlink", "mkdir", "posix_fallocate", "rmdir")
_CLEANING, _BEGINNING = 6, 20  # calls for about half a folder; for making its files


def contents(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def merging(recipe, out: Path, *, resume: bool, overwrite: bool) -> int:
    """Merge; return the bytes that were there already."""
    notes = []
    omnimerge.merge(
        recipe, out, resume=resume, overwrite=overwrite, force=["ancestor"],
        on_progress=lambda done, total: notes.append(done),
    )  # fmt: skip
    return notes[0]


def cleaning(out: Path) -> int:
    for each in staging.leftovers(out):
        staging.clean(each)
    return 0


def child(out: Path, act, *, dies_at: int | None = None) -> int:
    """Fork a process that does something about an output; return its number."""
    pid = os.fork()
    if pid:
        return pid
    seen = 0

    def counted(name):
        real = getattr(os, name)

        def call(*arguments, **options):
            nonlocal seen
            seen += 1
            if seen == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        return call

    try:
        if dies_at is not None:
            for name in _CALLS:
                setattr(os, name, counted(name))
        (out.parent / "progress").write_text(f"{act()} {seen}")
        os._exit(0)
    except BaseException as error:  # noqa: BLE001 a forked child must not come back
        (out.parent / "error").write_text(repr(error))
        os._exit(1)


def wait(pid: int, seconds: float | None = None) -> int:
    """Wait for a child, or kill it when the time is over; return its status."""
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)  # until it is waited for, its number stays its own
    return os.waitpid(pid, 0)[1]


def problem(out: Path, status: int, expected) -> str:
    """What is wrong after the last run, which ended with this status."""
    error = out.parent / "error"
    if status:
        return f"resuming failed: {error.read_text() if error.exists() else status}"
    if contents(out) != expected:
        return "other bytes"
    left = [p.name for p in out.parent.iterdir() if p.name.startswith(".")]
    return f"{left} was left" if left else ""


def case(number: int, seed: int, recipes, folder: Path, references) -> dict:
    draw = random.Random(f"{seed}:{number}")
    name = draw.choice(sorted(recipes))
    expected, seconds, calls = references[name]
    work = folder / f"case{number}"
    work.mkdir()
    out = work / "out"
    overwrite = draw.random() < 0.3
    if overwrite:
        shutil.copytree(folder / "earlier", out)
    killed, cleans, resumed, wanted = 0, 0, 0, draw.randint(1, 3)
    early = False
    merge = partial(merging, recipes[name], out, overwrite=overwrite)
    while killed < wanted:
        by_time = not early and draw.random() < 0.5
        dies_at = None if by_time else draw.randint(1, _BEGINNING if early else calls)
        pid = child(out, partial(merge, resume=killed > 0), dies_at=dies_at)
        status = wait(pid, draw.uniform(0, seconds) if by_time else None)
        if not os.WIFSIGNALED(status):
            if killed or status:
                break
            shutil.rmtree(out)  # it was faster than the kill: again
            if overwrite:
                shutil.copytree(folder / "earlier", out)
            continue
        killed += 1
        if out.exists() and contents(out) not in (expected, references["earlier"]):
            why = f"case {number}, {name}: a partial output has the final name"
            return {"killed": killed, "cleans": cleans, "resumed": 0, "why": why}
        early = False
        if draw.random() < 0.3:
            status = wait(child(out, partial(cleaning, out), dies_at=draw.randint(1, _CLEANING)))
            early = os.WIFSIGNALED(status)  # the next run dies while it makes the files anew
            cleans += early
            wanted = max(wanted, killed + early)
    why = problem(out, wait(child(out, partial(merge, resume=True))), expected)
    if not why:
        resumed = int((work / "progress").read_text().split()[0])
    shutil.rmtree(work)
    why = why and f"case {number}, {name}: {why}"
    return {"killed": killed, "cleans": cleans, "resumed": resumed, "why": why}


def reference(name: str, recipe, folder: Path):
    """The uninterrupted output, the seconds it takes, and the number of its calls."""
    out = folder / f"reference-{name}" / "out"
    out.parent.mkdir()
    start = time.perf_counter()
    merge = partial(merging, recipe, resume=False, overwrite=False)
    if wait(child(out, partial(merge, out))):
        raise SystemExit((out.parent / "error").read_text())
    seconds = time.perf_counter() - start
    again = folder / f"calls-{name}" / "out"
    again.parent.mkdir()
    wait(child(again, partial(merge, again), dies_at=1 << 30))
    return contents(out), seconds, int((again.parent / "progress").read_text().split()[1])


def main() -> None:
    recipes = json.loads(Path(sys.argv[1]).read_text())
    folder, cases, seed = Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    journal.INTERVAL = 0.002
    slices.CHUNK_ELEMENTS = 1000
    references = {name: reference(name, recipe, folder) for name, recipe in recipes.items()}
    first = sorted(recipes)[0]
    shutil.copytree(folder / f"reference-{first}" / "out", folder / "earlier")
    (folder / "earlier" / "mark").write_text("an earlier output")
    manifest = folder / "earlier" / "merge_manifest.json"
    manifest.write_text(manifest.read_text().replace('"key": "', '"key": "other'))
    references["earlier"] = contents(folder / "earlier")
    found = [case(i, seed, recipes, folder, references) for i in range(cases)]
    print(
        json.dumps(
            {
                "cases": cases,
                "killed": sum(each["killed"] for each in found),
                "killed_cleans": sum(each["cleans"] for each in found),
                "resumed_cases": sum(each["resumed"] > 0 for each in found),
                "resumed_bytes": sum(each["resumed"] for each in found),
                "different": [each["why"] for each in found if each["why"]],
            }
        )
    )


if __name__ == "__main__":
    main()

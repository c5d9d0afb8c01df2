"""Builds that are killed leave no trainers behind, and a folder has one writer at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from omnimerge.bench.line import BenchError
from omnimerge.bench.processes import alone_in, trainers

PARENT = """
import os, sys, time
from omnimerge.bench.processes import trainers

if __name__ == "__main__":
    with trainers() as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 600).result()
"""


def alive(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text(encoding="ascii")
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_trainers_end_with_their_parent(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        worker = int(parent.stdout.readline())
        assert worker != parent.pid and alive(worker)
        os.kill(parent.pid, signal.SIGKILL)
    until = time.monotonic() + 20
    while alive(worker) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(worker)


def test_an_interruption_does_not_wait_for_trainers():
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt), trainers() as pool:
        worker = pool.submit(os.getpid).result()
        pool.submit(time.sleep, 600)
        raise KeyboardInterrupt
    while alive(worker) and time.monotonic() < begun + 60:
        time.sleep(0.05)
    assert time.monotonic() < begun + 60


def test_a_folder_has_one_writer(tmp_path):
    with (
        alone_in(tmp_path),
        pytest.raises(BenchError, match="another build or run is writing into it; wait"),
        alone_in(tmp_path),
    ):
        pass
    with alone_in(tmp_path):  # let go of
        pass

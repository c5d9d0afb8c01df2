"""What goes wrong while a merge runs: a clear line, nothing lost, and the way on works."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from soaking import results, short_and_long

SCRIPT = Path(__file__).parents[1] / "support" / "faults.py"


@pytest.mark.parametrize(("cases", "soak"), short_and_long(30, "OMNIMERGE_FAULTS"))
def test_merges_with_faults(tmp_path, cases, soak):
    kept = results("faults.json") if soak else tmp_path / "found.json"
    kept.unlink(missing_ok=True)
    command = [sys.executable, SCRIPT, "--cases", str(cases), "--seed", "7", "--json", kept]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=alone)
    assert kept.is_file(), done.stderr
    found = json.loads(kept.read_text())
    assert found["findings"] == [], done.stderr
    assert done.returncode == 0 and found["cases"] == cases
    # Only where a tmpfs may be mounted; the limits of a process stand for a full disk elsewhere.
    assert set(found["skipped"]) <= {"small disk", "read-only"}
    kinds = {"call fails", "odd file system", "limit", "input changes", "signal", "links"}
    assert kinds | {"no permission", "second process"} <= set(found["kinds"])
    for kind in ("input changes", "no permission"):
        assert all(end.startswith("exit 1") for end in found["kinds"][kind]["ends"])
    for kind in ("odd file system", "second process"):
        assert all(end.startswith("exit 0") for end in found["kinds"][kind]["ends"])
    # Else nothing was there that `--resume` could have written again.
    assert sum(each["kept"] for each in found["kinds"].values()) > 0

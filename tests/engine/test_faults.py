"""What goes wrong while a merge runs: a clear line, nothing lost, and the way on works."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "support" / "faults.py"
CASES = int(os.environ.get("OMNIMERGE_FAULTS", "30"))


def test_merges_with_faults(tmp_path):
    command = [sys.executable, SCRIPT, "--cases", str(CASES), "--json", tmp_path / "found.json"]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=alone)
    assert (tmp_path / "found.json").is_file(), done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["findings"] == [], done.stderr
    assert done.returncode == 0 and found["cases"] == CASES
    # Only where a tmpfs may be mounted; the limits of a process stand for a full disk elsewhere.
    assert set(found["skipped"]) <= {"small disk", "read-only"}
    kinds = {"call fails", "odd file system", "limit", "input changes", "signal", "links"}
    assert kinds | {"no permission", "second process"} <= set(found["kinds"])
    for kind in ("input changes", "no permission"):
        assert all(end.startswith("exit 1") for end in found["kinds"][kind]["ends"])
    for kind in ("odd file system", "second process"):
        assert all(end.startswith("exit 0") for end in found["kinds"][kind]["ends"])

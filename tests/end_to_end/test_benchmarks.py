"""benchmarks/methods.py runs, and its methods agree with the published loops."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "methods.py"


def test_methods_agree_with_the_published_loops(tmp_path):
    out = tmp_path / "methods.json"
    command = [sys.executable, str(SCRIPT), "--small", "--runs", "1", "--json", str(out)]
    command += ["--adam", "--yardstick-steps", "100"]
    # One thread: tests run side by side, and threads that wait for each other take long then.
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=alone)
    assert done.returncode == 0, done.stderr
    saved = json.loads(out.read_text())
    assert {"cores", "threads", "torch", "runs"} <= set(saved["machine"])
    rows = saved["rows"]
    assert [row["case"] for row in rows if row["error"] > 1e-4] == []
    assert {row["case"].removesuffix(" of adapters") for row in rows} == {
        "optmerge lora", "optmerge full", "optmerge full, no noise", "optmerge",
        "wudi", "wudi, no noise", "swudi", "aswudi", "tsv", "iso_c", "iso_cts",
        "knots", "robustmerge",
    }  # fmt: skip
    for row in rows:
        assert {"case", "shape", "experts", "ours_s", "error", "aim", "met"} <= set(row)
        assert ("checked_at" in row) == row["case"].endswith("of adapters") == ("ratio" not in row)
        looped = row["case"].startswith(("optmerge ", "wudi")) and "ratio" in row
        assert row.get("extrapolated_from_steps") == (100 if looped else None)
    assert "extrapolated from 100 steps" in done.stdout

"""Time of planning a mixture of experts, by its number of tensors; real layout, files of holes.

    python benchmarks/planning.py --json benchmarks/results/planning.json

The checkpoints are InternVL3.5-30B-A3B with fewer or all of its 48 layers: names and shapes are
the published ones, the data are holes, so that 61 GB a model take a few MB. Planned is `ties` of
two models on a base: three checkpoints are opened and aligned. `plan` is the call in a process that
has imported everything, `command` is `omnimerge plan` from start to end; a run is the fastest of
several.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAYERS = (6, 12, 25, 48)
_CALL = """
import json, sys, time
import omnimerge
recipe, runs = sys.argv[1], int(sys.argv[2])
omnimerge.plan(recipe)
found = []
for _ in range(runs):
    start = time.process_time()
    plan = omnimerge.plan(recipe)
    found.append(time.process_time() - start)
print(json.dumps({"tensors": len(plan.jobs), "plan_cpu_s": min(found)}))
"""


def make(folder: Path, layers: int) -> Path:
    """Write the headers of three checkpoints and a recipe; return the recipe."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    import published_headers

    folders = [folder / name for name in ("base", "one", "two")]
    for each in folders:
        published_headers.save(each, *published_headers.internvl3_5_30b(layers))
    base, *models = map(str, folders)
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps({"method": "ties", "base": base, "models": models}))
    return recipe


def row(layers: int, runs: int) -> dict[str, float]:
    """Plan checkpoints of so many layers."""
    with tempfile.TemporaryDirectory() as scratch:
        recipe = str(make(Path(scratch), layers))
        call = [sys.executable, "-c", _CALL, recipe, str(runs)]
        found = json.loads(subprocess.run(call, check=True, capture_output=True).stdout)
        command = [sys.executable, "-m", "omnimerge", "plan", recipe]
        walls, cpus = [], []
        for _ in range(runs):
            before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            walls.append(time.perf_counter() - start)
            cpus.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    us = 1e6 * found["plan_cpu_s"] / (3 * found["tensors"])
    return {
        "layers": layers, **found, "command_s": min(walls), "command_cpu_s": min(cpus),
        "plan_us_per_tensor_of_a_checkpoint": us,
    }  # fmt: skip


def main() -> None:
    """Measure every size, print and save the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=LAYERS)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also save the table here")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    machine = {
        "cores": os.cpu_count(), "processor": platform.machine(),
        "python": platform.python_version(), "runs": options.runs,
        "load": round(os.getloadavg()[0], 1),
    }  # fmt: skip
    print(machine)
    print(f"{'tensors':>8}{'plan cpu s':>12}{'us/tensor':>11}{'command s':>11}{'its cpu s':>11}")
    rows = []
    for layers in options.layers:
        rows.append(row(layers, options.runs))
        tensors, plan, command, cpu, us = list(rows[-1].values())[1:]
        print(f"{tensors:8,}{plan:12.2f}{us:11.0f}{command:11.2f}{cpu:11.2f}", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

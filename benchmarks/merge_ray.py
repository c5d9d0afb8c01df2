"""Time of `merge --executor ray` by the number of worker processes, beside the local executor.

    python benchmarks/merge_ray.py                     # 1 GB a model, about 5 GB in scratch
    python benchmarks/merge_ray.py --workers 1 2 4 --json benchmarks/results/merge_ray.json

The checkpoints are those of merge.py. Every configuration is a process of its own with a Ray
cluster of its own on 127.0.0.1. Its first merge is `first_s`: the workers start, load torch and
compiled loops, and open the plan. `wall_s` is the median of the later ones. `driver_cpu_s` is what
the driver itself computes meanwhile, `task_ms` what a task that does nothing costs, of many.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import merge_inputs
from merge_inputs import Size

METHODS = {
    "linear": {"method": "linear", "parameters": {"weights": [0.4, 0.3, 0.3]}},
    "dare_ties": {"method": "dare_ties", "base": True},
    "ties, whole model": {
        "method": "ties", "base": True, "parameters": {"threshold_scope": "model"},
    },
}  # fmt: skip


def nothing(_: object) -> None:
    """A task without work."""


def measure(name: str, executor: str, workers: int, folder: Path, runs: int) -> dict:
    """Merge several times in this process; return what it took."""
    import omnimerge

    base, *models = (str(folder / each) for each in merge_inputs.names(3))
    recipe = {**METHODS[name], "models": models, "max_shard_size": "200MB"}
    if recipe.get("base"):
        recipe["base"] = base
    more: dict[str, float] = {}
    if executor == "ray":
        more["start_s"], more["task_ms"] = _start_ray(workers)
    out = folder / "out-ray"
    walls, cpus = [], []
    for _ in range(runs + 1):
        shutil.rmtree(out, ignore_errors=True)
        before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        omnimerge.merge(recipe, out, executor=executor, force=["ancestor"])
        walls.append(time.perf_counter() - start)
        after = resource.getrusage(resource.RUSAGE_SELF)
        cpus.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    digest = hashlib.sha256((out / "merge_manifest.json").read_bytes()).hexdigest()
    shutil.rmtree(out)
    return {
        "case": name, "executor": executor, "workers": workers, **more, "first_s": walls[0],
        "wall_s": statistics.median(walls[1:]), "driver_cpu_s": statistics.median(cpus[1:]),
        "manifest": digest,
    }  # fmt: skip


def _start_ray(workers: int) -> tuple[float, float]:
    os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    start = time.perf_counter()
    import ray

    from omnimerge.engine.ray import RayExecutor

    ray.init(
        "local",
        num_cpus=workers,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
    )
    started = time.perf_counter() - start
    executor, count = RayExecutor(), 300
    list(executor.results([executor.submit(nothing, 10**6, each) for each in range(workers)]))
    start = time.perf_counter()
    list(executor.results([executor.submit(nothing, 10**6, each) for each in range(count)]))
    return started, 1000 * (time.perf_counter() - start) / count


def main() -> None:
    """Make the checkpoints, run every configuration, print and save the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=float, default=1.05, help="GB a model")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--scratch", type=Path, default=Path(__file__).parent / "scratch")
    parser.add_argument("--json", type=Path, help="also save the table here")
    parser.add_argument("--one", nargs=3, metavar=("CASE", "EXECUTOR", "WORKERS"), help="internal")
    options = parser.parse_args()
    size = Size(f"{options.size:g}", 1024)
    folder = options.scratch / size.folder
    if options.one:
        name, executor, workers = options.one
        print(json.dumps(measure(name, executor, int(workers), folder, options.runs)))
        return
    merge_inputs.make_checkpoints(folder, size, 3)
    rows = []
    for name in METHODS:
        for executor, workers in [("local", 0), *(("ray", n) for n in options.workers)]:
            command = [sys.executable, *sys.argv, "--one", name, executor, str(workers)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    _report(rows, options)


def _report(rows: list[dict], options: argparse.Namespace) -> None:
    machine = {
        "cores": os.cpu_count(), "processor": platform.machine(),
        "python": platform.python_version(), "load": os.getloadavg()[0],
        "size_gb": options.size, "runs": options.runs,
    }  # fmt: skip
    print(machine)
    print(f"{'case':20}{'executor':>9}{'workers':>9}{'first s':>9}{'wall s':>9}{'x one':>8}"
          f"{'driver s':>10}{'task ms':>9}{'bytes':>7}")  # fmt: skip
    one: dict[str, float] = {}
    local = {row["case"]: row["manifest"] for row in rows if row["executor"] == "local"}
    for row in rows:
        row["same_bytes"] = row.pop("manifest") == local[row["case"]]
        if row["executor"] == "ray":
            row["times_one_worker"] = one.setdefault(row["case"], row["wall_s"]) / row["wall_s"]
        times = f"{row['times_one_worker']:8.2f}" if "times_one_worker" in row else f"{'':>8}"
        task = f"{row['task_ms']:9.1f}" if "task_ms" in row else f"{'':>9}"
        print(
            f"{row['case']:20}{row['executor']:>9}{row['workers']:9}{row['first_s']:9.2f}"
            f"{row['wall_s']:9.2f}{times}{row['driver_cpu_s']:10.2f}{task}"
            f"{'same' if row['same_bytes'] else 'OTHER':>7}"
        )
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

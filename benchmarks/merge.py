"""Time and memory of `omnimerge merge` beside the floor and mergekit.

    python benchmarks/merge.py --quick          # a minute or two: 0.01 GB a model, every family
    python benchmarks/merge.py                  # 1 GB a model, three of them, 5 GB of disk
    python benchmarks/merge.py --models 1 2 4 8 --families linear --json FILE
    python benchmarks/merge.py --size 7B --only linear ties --runs 1 --json FILE
    python benchmarks/merge.py --mergekit-env /tmp/mergekit --json FILE
    python benchmarks/merge.py --device cuda    # each case on the CPU and there

The checkpoints are synthetic, in bfloat16: a base and models of base plus noise, in the Qwen2
layout. `--size 7B` is Qwen2-7B as published, 15 GB a model, in files of holes that take no room;
its output is 15 GB of zeros, removed after every run. Every run is a process of its own, start-up
included. The floor reads the inputs and writes and syncs an output; it, omnimerge and mergekit take
turns, so that a change of the machine's speed meets all of them, and ratios are medians over turns.

Peak memory is that of the process and its children together, also above an interpreter with torch
loaded. mergekit runs in an environment of its own; where it cannot be installed, that is said.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import merge_inputs
from merge_inputs import AIMS, FAMILIES, Size

TORCH = "torch loaded"
PEER = "mergekit==0.1.5"
THERE = " there"  # on the device that was asked for
_EVERY = 0.05  # seconds between two looks at the memory of a tree of processes

Figures = dict[str, float]


def measure(command: list[str]) -> Figures:
    """Run a command; return wall seconds, CPU seconds and peak resident MB with its children."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak, ended = [0.0], threading.Event()

    def watch() -> None:
        while not ended.wait(_EVERY):
            peak[0] = max(peak[0], _tree_mb(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    stderr = process.stderr.read().decode() if process.stderr else ""
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    ended.set()
    watcher.join()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{command} failed:\n{stderr[-3000:]}")
    mb = max(peak[0], usage.ru_maxrss / (1024 if sys.platform != "darwin" else 1024**2))
    return {"wall_s": wall, "cpu_s": usage.ru_utime + usage.ru_stime, "peak_mb": mb}


def _tree_mb(pid: int) -> float:
    """Resident MB of a process and all below it; 0 where the system does not tell."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        tasks = Path(f"/proc/{pid}/task").iterdir()
        children = [c for task in tasks for c in (task / "children").read_text().split()]
    except OSError:
        return 0
    own = next((line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")), 0)
    return int(own) / 1024 + sum(_tree_mb(int(child)) for child in children)


def mergekit_at(given: Path | None, folder: Path | None) -> Path | None:
    """The `mergekit-yaml` to run, installed into `folder` if it is not there; None without one."""
    if given or not folder:
        return given
    found = folder / "bin" / "mergekit-yaml"
    if not found.exists():
        torch = version("torch")  # the same, so that no other build of it is fetched
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        try:
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            subprocess.run([*pip, f"torch=={torch}"], check=True)
            subprocess.run([*pip, PEER, f"torch=={torch}"], check=True)
        except subprocess.CalledProcessError as error:
            print(f"mergekit cannot be installed, and is left out: {error}")
            return None
    return found


@dataclass
class Run:
    """Cases over one size and one number of models, in turns."""

    size: Size
    models: int
    cases: list[str]
    folder: Path
    mergekit: Path | None
    device: str | None = None
    found: dict[str, list[Figures]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def commands(self) -> dict[str, list[str]]:
        """Every command of a turn, by its label."""
        out, listed = self.folder / "out", {TORCH: [sys.executable, "-c", "import torch"]}
        for case in self.cases:
            inputs = merge_inputs.inputs_of(case, self.folder, self.models)
            listed[self.floor(case)] = merge_inputs.floor_command(inputs, out)
            listed[case] = merge_inputs.our_command(case, self.folder, self.models, out, self.size)
            if self.device:
                listed[f"{case}{THERE}"] = [*listed[case], "--device", self.device]
            if self.mergekit:
                peer = merge_inputs.peer_command(case, self.folder, self.models, out, self.mergekit)
                listed |= {f"mergekit {case}": peer} if peer else {}
        return listed

    def floor(self, case: str) -> str:
        """The label of the floor that a case is held against."""
        return f"floor, {len(merge_inputs.inputs_of(case, self.folder, self.models))} inputs"

    def run(self, turns: int, warm: bool, peer_turns: int) -> None:
        """Run all commands in turns; the first may be for the page cache, the peer in the last."""
        commands = self.commands()
        for turn in range(turns + warm):
            for label, command in commands.items():
                self._remove_output()
                early = turn < turns + warm - min(turns, peer_turns)
                if label in self.failed or (early and label.startswith("mergekit")):
                    continue
                try:
                    figures = measure(command)
                except RuntimeError as error:
                    if not label.startswith("mergekit"):
                        raise SystemExit(str(error)) from error
                    self.failed[label] = str(error).splitlines()[-1]
                    continue
                if turn >= warm:
                    self.found.setdefault(label, []).append(figures)
        self._remove_output()

    def _remove_output(self) -> None:
        out = self.folder / "out"
        out.unlink() if out.is_file() else shutil.rmtree(out, ignore_errors=True)

    def median(self, label: str, figure: str) -> float:
        """The median of a figure over the turns."""
        return statistics.median(each[figure] for each in self.found[label])

    def ratio(self, label: str, other: str, figure: str = "wall_s") -> float:
        """The median, over the turns of both, of how many times as much one takes as another."""
        both = -min(len(self.found[label]), len(self.found[other]))
        pairs = zip(self.found[label][both:], self.found[other][both:], strict=True)
        return statistics.median(a[figure] / b[figure] for a, b in pairs)

    def rows(self) -> list[dict[str, Any]]:
        """One row per label, with the ratios of the cases."""
        rows = []
        for label in self.found:
            row: dict[str, Any] = {"case": label}
            row |= {f: self.median(label, f) for f in ("wall_s", "cpu_s", "peak_mb")}
            row["above_torch_mb"] = row["peak_mb"] - self.median(TORCH, "peak_mb")
            if (case := label.removesuffix(THERE)) in self.cases:
                row["times_floor"] = self.ratio(label, self.floor(case))
                family = next(name for name, held in FAMILIES.items() if case in held)
                if family in AIMS:
                    row |= {"aim": AIMS[family], "met": row["times_floor"] <= AIMS[family]}
                if (peer := f"mergekit {label}") in self.found:
                    row["mergekit_times"] = self.ratio(peer, label)
                    row["mergekit_memory_times"] = self.ratio(peer, label, "peak_mb")
            rows.append(row)
        return rows


def show(run: Run, rows: list[dict[str, Any]]) -> None:
    """Print the table of a run."""
    print(f"\n{run.size.label} GB a model, {run.models} models, width {run.size.hidden}")
    print(
        f"{'case':24}{'wall s':>9}{'cpu s':>9}{'peak MB':>9}{'over torch':>12}{'x floor':>9}"
        f"{'aim':>6}{'mergekit x':>12}{'its MB x':>10}"
    )
    for row in rows:
        last = [
            f"{row[key]:{width}.2f}" if key in row else " " * width
            for key, width in (
                ("times_floor", 9), ("aim", 6), ("mergekit_times", 12),
                ("mergekit_memory_times", 10),
            )
        ]  # fmt: skip
        print(
            f"{row['case']:24}{row['wall_s']:9.2f}{row['cpu_s']:9.2f}{row['peak_mb']:9.0f}"
            f"{row['above_torch_mb']:12.0f}{''.join(last)}"
        )
    for label, why in run.failed.items():
        print(f"{label}: {why}")
    sys.stdout.flush()


def save(file: Path, run: Run, rows: list[dict[str, Any]], turns: int) -> None:
    """Add a run to the results, in the place of an earlier one of the same size and number."""
    key = {"size": run.size.label, "hidden": run.size.hidden, "models": run.models}
    entry = {
        **key, "turns": turns, "cores": os.cpu_count(), "processor": platform.machine(),
        "python": platform.python_version(), "load": round(os.getloadavg()[0], 1),
        "device": run.device or "cpu", "mergekit": PEER if run.mergekit else "not run",
        "failed": run.failed, "rows": rows,
    }  # fmt: skip
    before = json.loads(file.read_text()).get("runs", []) if file.is_file() else []
    kept = [each for each in before if {name: each[name] for name in key} != key]
    file.write_text(json.dumps({"runs": [*kept, entry]}, indent=1) + "\n")


def main() -> None:
    """Make the checkpoints, run everything in turns, print and save the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="1.05", help="GB a model, or 7B for files of holes")
    parser.add_argument("--hidden", type=int, default=1024, help="width of the layers")
    parser.add_argument("--models", type=int, nargs="+", default=[3], help="how many are merged")
    parser.add_argument("--families", nargs="+", default=["linear", "sparse"], choices=FAMILIES)
    parser.add_argument("--only", nargs="+", help="these cases instead of whole families")
    parser.add_argument("--runs", type=int, default=3, help="turns, after one that warms the cache")
    parser.add_argument("--cold", action="store_true", help="without the turn that warms it")
    parser.add_argument("--quick", action="store_true", help="every family, small, one turn")
    parser.add_argument("--scratch", type=Path, default=Path(__file__).parent / "scratch")
    parser.add_argument("--json", type=Path, help="also save the tables here, beside earlier ones")
    parser.add_argument("--device", help="also every case with `merge --device` of this")
    parser.add_argument("--mergekit", type=Path, help="a mergekit-yaml to run beside")
    parser.add_argument("--mergekit-env", type=Path, help="install mergekit there, if need be")
    parser.add_argument("--peer-runs", type=int, default=1, help="turns of them with mergekit")
    parser.add_argument("--make-only", action="store_true", help="only write the checkpoints")
    options = parser.parse_args()
    if options.quick:
        options.size, options.hidden, options.runs = "0.01", 128, 1
        options.families = list(FAMILIES)
    size = Size(options.size, 3584 if options.size == "7B" else options.hidden)
    folder = options.scratch / size.folder
    if options.make_only:
        merge_inputs.make_checkpoints(folder, size, max(options.models))
        return
    # In a process of its own: a child's peak memory would start at that of a parent with torch.
    subprocess.run([sys.executable, *sys.argv, "--make-only"], check=True)
    mergekit = mergekit_at(options.mergekit, options.mergekit_env)
    cases = options.only or [case for family in options.families for case in FAMILIES[family]]
    for models in options.models:
        run = Run(size, models, cases, folder, mergekit, options.device)
        run.run(options.runs, not options.cold, options.peer_runs)
        rows = run.rows()
        show(run, rows)
        if options.json:
            save(options.json, run, rows, options.runs)


if __name__ == "__main__":
    main()

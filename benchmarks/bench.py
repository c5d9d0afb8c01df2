"""The miniature benchmark as docs/bench-results.md shows it: three lines, three seeds, findings.

python benchmarks/bench.py FOLDER            # build, run, measure; goes on where it stopped
python benchmarks/bench.py FOLDER --save     # then replace benchmarks/results/bench by it

Every step is an omnimerge command that is printed before it runs, in FOLDER. At the end the
averages are compared with those in benchmarks/results/bench.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from omnimerge.bench.tables import AVERAGE, Table, make_tables, read_results

COMMITTED = Path(__file__).parent / "results" / "bench"
PAGE = Path(__file__).parents[1] / "docs" / "bench-page.html"

EXPERIMENTS = {
    "internvl": ("norm-growth", "ablation", "rank-ratio", "distributions", "overtraining"),
    "qwen2vl": ("norm-growth", "ablation", "rank-ratio", "distributions"),
    "modality": (),
}
"""Those of the paper's findings that each line can show; all on its first seed."""


def omnimerge(folder: Path, *arguments: str) -> None:
    """Run a command in a folder, so that paths in its records are short."""
    print("$ omnimerge", *arguments, flush=True)
    program = Path(sys.executable).with_name("omnimerge")
    subprocess.run([program, *arguments], cwd=folder, check=True, env=os.environ)


def make(folder: Path, line: str, seeds: int) -> None:
    """Build and run a line, and look at its first seed."""
    omnimerge(folder, "bench", "build", "--line", line, "--seeds", str(seeds), "-o", line)
    omnimerge(folder, "bench", "run", line)
    first = f"{line}/seed-0"
    if EXPERIMENTS[line] and not (folder / first / "analysis.json").is_file():
        omnimerge(folder, "bench", "analyze", first)
    for name in EXPERIMENTS[line]:
        if not (folder / first / "results" / f"experiment-{name}.json").is_file():
            omnimerge(folder, "bench", "experiment", name, first)


def save(folder: Path, line: str) -> None:
    """Copy results and experiments of a line to those that are committed."""
    to = COMMITTED / line
    shutil.rmtree(to, ignore_errors=True)
    (to / "experiments").mkdir(parents=True)
    for file in sorted(folder.glob(f"{line}/seed-*/results.json")):
        shutil.copyfile(file, to / f"{file.parent.name}.json")
    for file in sorted(folder.glob(f"{line}/seed-0/results/experiment-*.json")):
        shutil.copyfile(file, to / "experiments" / file.name.removeprefix("experiment-"))


def compare(line: str, folder: Path) -> None:
    """Print whose average differs from the committed one by more than its deviation."""
    if not (COMMITTED / line).is_dir():
        print(f"{line}: nothing committed to compare with")
        return
    (old,), (new,) = (make_tables(read_results(place)) for place in (COMMITTED / line, folder))
    apart = [f"{name}: {now} for {was}" for name, was, now in _differences(old, new)]
    print(f"{line}: {len(old.lines)} rows, {len(apart)} beyond the deviation", *apart, sep="\n  ")


def _differences(old: Table, new: Table) -> list[tuple[str, str, str]]:
    found = []
    rows = {(row.kind, row.name): row for row in new.lines if row.cells}
    for row in old.lines:
        now = rows.get((row.kind, row.name))
        if not row.cells or now is None:
            continue
        was, cell = row.cells[AVERAGE], now.cells[AVERAGE]
        if abs(cell.mean - was.mean) > max(was.deviation or 0.0, 1e-9):
            found.append((f"{row.kind} {row.name}", was.text(), cell.text()))
    return found


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="for checkpoints and results; about 200 MB")
    parser.add_argument("--line", action="append", choices=list(EXPERIMENTS), help="all by default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="replace what is committed")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    lines = asked.line or list(EXPERIMENTS)
    for line in lines:
        make(asked.folder, line, asked.seeds)
    omnimerge(asked.folder, "bench", "report", *lines, "-o", "report.html")
    for line in lines:
        compare(line, asked.folder / line)
        if asked.save:
            save(asked.folder, line)
    if asked.save and not asked.line:
        shutil.copyfile(asked.folder / "report.html", PAGE)


if __name__ == "__main__":
    main()

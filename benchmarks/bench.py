"""The miniature benchmark as docs/bench-results.md shows it: three lines, three seeds, findings.

python benchmarks/bench.py FOLDER            # build, run, measure; goes on where it stopped
python benchmarks/bench.py FOLDER --save     # then replace benchmarks/results/bench by it

Every step is an omnimerge command that is printed before it runs, in FOLDER. At the end the
tables are compared with those in benchmarks/results/bench, the same seeds with each other; the exit
code is 1 if a cell is further away than the deviation over all seeds.
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

EXPERIMENTS = {
    "internvl": ("norm-growth", "ablation", "rank-ratio", "distributions", "overtraining"),
    "qwen2vl": ("norm-growth", "ablation", "rank-ratio", "distributions"),
    "modality": ("norm-growth", "distributions"),
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
    """Copy what a line's commands wrote, no weights and no rows, to what is committed."""
    to = COMMITTED / line
    shutil.rmtree(to, ignore_errors=True)
    for place in sorted(folder.glob(f"{line}/seed-*")):
        (to / place.name / "results").mkdir(parents=True)
        names = ("build.json", "results.json", "analysis.json")
        found = [place / name for name in names] + list(place.glob("results/experiment-*.json"))
        for file in found:
            if file.is_file():
                shutil.copyfile(file, to / place.name / file.relative_to(place))


def compare(line: str, folder: Path) -> int:
    """Print what differs from the committed table by more than its deviation; count it."""
    if not (COMMITTED / line).is_dir():
        print(f"{line}: nothing committed to compare with")
        return 0
    committed, made = read_results(COMMITTED / line), read_results(folder)
    seeds = {each.seed for each in made}
    (all_seeds,), (old,), (new,) = (
        make_tables(each)
        for each in (committed, [each for each in committed if each.seed in seeds], made)
    )
    apart = differences(old, new, all_seeds)
    print(f"{line}: {len(apart)} cells beyond the deviation, or missing", *apart, sep="\n  ")
    return len(apart)


def differences(old: Table, new: Table, spread: Table) -> list[str]:
    """List cells that are further apart than the deviation in `spread`, and rows of one side."""
    was, now, wide = (
        {(r.kind, r.name): r for r in table.lines if r.cells} for table in (old, new, spread)
    )
    found = [f"{kind} {name}: not in both" for kind, name in was.keys() ^ now.keys()]
    for key in was.keys() & now.keys():
        for column in (*old.columns, AVERAGE):
            before, after = was[key].cells[column], now[key].cells[column]
            deviation = wide[key].cells[column].deviation or 0.0
            if abs(after.mean - before.mean) > max(deviation, 1e-9):
                found.append(f"{' '.join(key)}, {column}: {after.text()} for {before.text()}")
    return sorted(found)


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
    apart = sum(compare(line, asked.folder / line) for line in lines)
    if not asked.save:
        raise SystemExit(1 if apart else 0)
    for line in lines:
        save(asked.folder, line)
    print("now `make docs` writes the pages that show them")


if __name__ == "__main__":
    main()

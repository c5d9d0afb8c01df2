"""Fuzz every reader for a given time, and write down how many cases ran and what was found.

    python tests/fuzz/soak.py --minutes 60
    python tests/fuzz/soak.py --minutes 5 --only pickle recipe   # keeps the others' results
    python tests/fuzz/soak.py --minutes 30 --add                 # adds to what ran before

The time is shared equally by the targets of `tests/support/hostile.py`. Each runs in a process of
its own, half of the time with hypothesis, half with atheris, which needs `pip install atheris`;
without it hypothesis has all of it. Findings are kept with the file that shows them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "fuzz.json"
_INSTRUMENTED = (
    "omnimerge.checkpoint",
    "omnimerge.arch",
    "omnimerge.engine",
    "omnimerge.generate.prompts",
    "omnimerge.generate.sources",
    "omnimerge.search.logs",
    "yaml",
)
_MEMORY = 8 << 30  # of address space: what claims more gets a MemoryError, which is a finding

sys.path.insert(0, str(ROOT / "tests" / "support"))


class Record:
    """What happened so far to one target; kept in a file, for a process that dies."""

    def __init__(self, name: str, folder: Path, seconds: float) -> None:
        self.name, self.folder, self.until = name, folder, time.monotonic() + seconds
        self.began = time.monotonic()
        self.cases, self.slowest = 0, 0.0
        self.ends: Counter[str] = Counter()
        self.findings: dict[str, dict[str, Any]] = {}
        self.saved = 0.0
        shutil.rmtree(folder / "scratch", ignore_errors=True)
        (folder / "scratch").mkdir(parents=True)

    @property
    def over(self) -> bool:
        return time.monotonic() >= self.until

    def case(self, data: bytes) -> None:
        """Run one case."""
        import hostile

        self.cases += 1
        (self.folder / "last").write_bytes(data)
        try:
            end, seconds = hostile.timed(self.name, self.folder / "scratch", data)
            self.ends[end] += 1
            self.slowest = max(self.slowest, seconds)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is a finding
            self._found(error, data)
        if time.monotonic() - self.saved > 2:
            self.save()

    def save(self) -> None:
        """Write the record."""
        self.saved = time.monotonic()
        found = {
            "seconds": round(time.monotonic() - self.began, 1),
            "cases": self.cases,
            "ends": dict(self.ends.most_common()),
            "slowest_seconds": round(self.slowest, 3),
            "findings": list(self.findings.values()),
        }
        (self.folder / "record.json").write_text(json.dumps(found, indent=1))

    def _found(self, error: BaseException, data: bytes) -> None:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f for f in frames if "omnimerge" in f.filename and "/tests/" not in f.filename]
        where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "the promise"
        what = f"{type(error).__name__} in {where}"
        known = self.findings.setdefault(
            what, {"what": what, "message": str(error)[:200], "cases": 0, "file": ""}
        )
        if not known["cases"]:
            file = self.folder / f"finding-{len(self.findings)}"
            file.write_bytes(data)
            known["file"] = file.name
        known["cases"] += 1
        self.ends["finding"] += 1


def with_hypothesis(name: str, folder: Path, seconds: float) -> None:
    """Run cases that hypothesis chooses."""
    import hostile
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    from omnimerge.compose.registration import ensure

    ensure()  # importing transformers takes seconds, and is no hang of the first case
    record = Record(name, folder, seconds)

    @st.composite
    def files(draw: Any) -> bytes:
        return hostile.TARGETS[record.name].build(hostile.Drawn(draw))

    @settings(
        max_examples=2000, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(files())
    def run(data: bytes) -> None:
        if not record.over:
            record.case(data)

    while not record.over:
        run()
    record.save()


def with_atheris(name: str, folder: Path, seconds: float) -> None:
    """Run cases that atheris evolves, so that they reach more of the code."""
    import atheris
    import hypothesis  # noqa: F401 - what is imported first is not instrumented

    import omnimerge.methods  # noqa: F401 - numba compiles it

    with atheris.instrument_imports(include=list(_INSTRUMENTED), enable_loader_override=False):
        import hostile

        from omnimerge.compose.registration import ensure

        ensure()
    record = Record(name, folder, seconds)

    def one(data: bytes) -> None:
        if record.over:
            record.save()
            os._exit(0)
        record.case(
            hostile.TARGETS[record.name].build(hostile.Fed(atheris.FuzzedDataProvider(data)))
        )

    corpus = record.folder / "corpus"
    corpus.mkdir(exist_ok=True)
    for seed in range(50):
        (corpus / f"seed-{seed}").write_bytes(hostile.Pick(seed).raw(400))
    limits = ["-max_len=1024", "-rss_limit_mb=6000", f"-timeout={int(10 * hostile.SECONDS)}"]
    atheris.Setup([sys.argv[0], *limits, "-verbosity=0", str(corpus)], one)
    atheris.Fuzz()


def run_one(name: str, engine: str, folder: Path, seconds: float) -> None:
    """What a process of its own does."""
    import torch

    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.chdir(folder)
    if engine == "atheris":  # which limits the memory itself, and ends the process
        with_atheris(name, folder, seconds)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    with_hypothesis(name, folder, seconds)


def run_all(
    names: list[str], seconds: float, scratch: Path, out: Path, found: dict[str, Any]
) -> None:
    """Run targets, one process at a time, and write the results after each beside those found."""
    engines = ["hypothesis", *(["atheris"] if find_spec("atheris") else [])]
    for name in names:
        for engine in engines:
            share = seconds / len(names) / len(engines)
            folder = scratch / f"{name}-{engine}"
            folder.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, __file__, "--one", name, "--engine", engine]
            command += ["--folder", str(folder), "--minutes", str(share / 60)]
            with (folder / "output").open("wb") as output:
                try:
                    done = subprocess.run(
                        command, stdout=output, stderr=output, check=False, timeout=share + 300
                    ).returncode
                except subprocess.TimeoutExpired:
                    done = "no end"
            entry = _read(folder)
            if done != 0:
                entry.setdefault("findings", []).append(
                    {"what": f"the process ended with {done}", "file": "last"}
                )
            before = found.setdefault(name, {}).get(engine)
            found[name][engine] = _sum(before, entry) if before else entry
            out.with_suffix(".new").write_text(json.dumps(describe(found), indent=1) + "\n")
            out.with_suffix(".new").replace(out)
            print(f"{name:16}{engine:12}{entry.get('cases', 0):9} cases", end="", flush=True)
            print(f"  {[each['what'] for each in entry.get('findings', [])] or 'nothing found'}")


def _sum(one: dict[str, Any], two: dict[str, Any]) -> dict[str, Any]:
    """The results of two runs as those of one."""
    return {
        "seconds": round(one.get("seconds", 0) + two.get("seconds", 0), 1),
        "cases": one.get("cases", 0) + two.get("cases", 0),
        "ends": dict((Counter(one.get("ends")) + Counter(two.get("ends"))).most_common()),
        "slowest_seconds": max(each.get("slowest_seconds", 0) for each in (one, two)),
        "findings": [*one.get("findings", []), *two.get("findings", [])],
    }


def _before(out: Path, names: list[str], add: bool) -> dict[str, Any]:
    """What earlier runs found, as far as this one does not replace it."""
    found = json.loads(out.read_text())["targets"] if out.is_file() else {}
    return found if add else {name: each for name, each in found.items() if name not in names}


def _read(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "record.json").read_text())
    except (OSError, ValueError):
        return {}


def describe(found: dict[str, Any]) -> dict[str, Any]:
    """The results with their totals."""
    every = [entry for engines in found.values() for entry in engines.values()]
    packages = {}
    for package in ("torch", "hypothesis", "atheris"):
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "packages": packages,
        "seconds": round(sum(entry.get("seconds", 0) for entry in every), 1),
        "cases": sum(entry.get("cases", 0) for entry in every),
        "findings": sum(len(entry.get("findings", [])) for entry in every),
        "targets": {name: found[name] for name in sorted(found)},
    }


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--only", nargs="*", help="targets")
    parser.add_argument("--add", action="store_true", help="add to the results of earlier runs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--scratch", type=Path, help="where findings are kept")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        run_one(given.one, given.engine, given.folder, given.minutes * 60)
        return
    import hostile

    names = given.only or list(hostile.TARGETS)
    scratch = given.scratch or Path(tempfile.mkdtemp(prefix="omnimerge-fuzz-"))
    before = _before(given.out, names, given.add)
    run_all(names, given.minutes * 60, scratch, given.out, before)
    print(f"{given.out}; what shows the findings: {scratch}")


if __name__ == "__main__":
    main()

"""Merge while something goes wrong, at random moments, and check what is left; run as a script.

    python tests/support/faults.py --cases 2000 --seed 7 --json benchmarks/results/faults.json
    python tests/support/faults.py --only "small disk" --cases 50

A case is the command `omnimerge merge` in a forked child that has one of the faults of
`fault_kinds`. Whatever happens, it has to end by itself with a right exit code and, unless that is
0, with one line and no traceback; the output is complete and correct or not there (or still the
earlier one); the inputs are as before; `--resume` then gives the same bytes as an undisturbed
merge, and writes nothing again that the journal promises, which is all that was written before a
Ctrl-C or a SIGTERM; or `clean` removes what is left. Prints JSON: how many cases of each kind ended
how, how many bytes were kept and written again, and what was found.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import os
import platform
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import fault_kinds
import tiny_models
import torch
from fault_kinds import Fault, Scene

from omnimerge.checkpoint import journal
from omnimerge.checkpoint.ranges import Ranges
from omnimerge.checkpoint.shard import ShardFile
from omnimerge.checkpoint.staging import JOURNAL_NAME, is_finished
from omnimerge.cli import main as command
from omnimerge.engine import slices

SECONDS = 120  # after which a case hangs
SECOND = "second process"
SAY = bool(os.environ.get("OMNIMERGE_FAULTS_SAY"))  # what every case said
_ENDS = ("Error: ", "Interrupted.", "Terminated.")


def contents(folder: Path) -> dict[str, str]:
    """The files of a folder, by their digests."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


class Child:
    """The command in a forked child, with a pipe for what it says."""

    def __init__(self, arguments: list[str], inside: Callable[[], None]) -> None:
        self._reading, writing = os.pipe()
        self._pid = os.fork()
        if self._pid:
            os.close(writing)
            return
        code = 70
        try:
            os.dup2(writing, 1)
            os.dup2(writing, 2)
            inside()
            command(arguments, prog_name="omnimerge")
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 70
        except BaseException:  # noqa: BLE001 a forked child must not come back
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def wait(self) -> tuple[int | str, str]:
        """Wait for its end; return its exit code, or `hangs`, and what it said."""
        said, until = b"", time.monotonic() + SECONDS
        while select.select([self._reading], [], [], max(0, until - time.monotonic()))[0]:
            if not (more := os.read(self._reading, 1 << 16)):
                break
            said += more
        else:
            os.kill(self._pid, signal.SIGKILL)
        os.close(self._reading)
        status = os.waitpid(self._pid, 0)[1]
        killed = os.WIFSIGNALED(status)
        code = f"killed by {os.WTERMSIG(status)}" if killed else os.WEXITSTATUS(status)
        return "hangs" if time.monotonic() > until else code, said.decode(errors="replace")


class Writes:
    """What a child writes of tensors, in memory that it shares: no file that a fault could hit."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 1 << 20)

    def record(self) -> None:
        """Write it down from now on; in the child."""
        real = ShardFile.write

        def write(shard: ShardFile, data: memoryview, position: int) -> None:
            real(shard, data, position)
            if position:  # else it is the header
                line = f"{shard.path.name} {position} {position + data.nbytes}\n"
                self._memory.write(line.encode())

        ShardFile.write = write

    def found(self) -> list[tuple[str, int, int]]:
        """File, first byte and one past the last of every write that came to its end."""
        lines = self._memory[:].rstrip(b"\0").decode().splitlines()
        entries = [line.split() for line in lines]
        return [(name, int(start), int(stop)) for name, start, stop in entries]


def promised(out: Path) -> dict[str, Ranges]:
    """File -> what of it the hidden folder of an output promises to be there."""
    hidden = out.with_name(f".{out.name}.omnimerge")
    files = sorted(hidden.glob("model*.safetensors"))
    _, ranges = journal.read_journal(hidden / JOURNAL_NAME)
    if files and is_finished(hidden):
        ranges = [[[0, file.stat().st_size]] for file in files]
    found = {file.name: Ranges() for file in files}
    for file, each in zip(files, ranges, strict=False):
        for start, stop in each:
            found[file.name].add(start, stop)
    return found


class World:
    """The checkpoints and recipes of all cases, and what they give undisturbed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.inputs = folder, folder / "inputs"
        for name in ("base", "one", "two"):
            tiny_models.save(tiny_models.build("qwen2_vl", own=name), self.inputs / name)
        tiny_models.save(tiny_models.build("llava_onevision"), self.inputs / "donor")
        base, one, two, donor = (str(self.inputs / n) for n in ("base", "one", "two", "donor"))
        small = {"max_shard_size": "60KB"}
        experts = {"base": base, "models": [one, two], **small}
        recipes = {
            "adamms": {"target": base, "models": [donor], "parameters": {"alpha": 0.3}, **small},
            "ties": {**experts, "parameters": {"threshold_scope": "model"}},
            "dare_linear": experts,
            "tsv": experts,
        }
        shutil.copytree(self.inputs, folder / "pristine")
        self._digests = contents(self.inputs)
        self.recipes: dict[str, Path] = {}
        self.known: dict[str, tuple[dict[str, str], Counter[str], float]] = {}
        for name, recipe in recipes.items():
            self.recipes[name] = folder / f"{name}.yaml"
            self.recipes[name].write_text(json.dumps({"method": name, **recipe}))
            out = folder / "references" / name
            if name == "adamms":  # what is imported late and compiled once is there from now on
                command([*self.merge(name), "-o", str(out)], standalone_mode=False)
                shutil.rmtree(out)
            self.known[name] = self._reference(name, out)
        self.earlier = folder / "earlier"
        shutil.copytree(folder / "references" / "adamms", self.earlier)
        (self.earlier / "mark").write_text("an earlier output")
        manifest = self.earlier / "merge_manifest.json"
        manifest.write_text(manifest.read_text().replace('"key": "', '"key": "other'))
        for path in (folder, *folder.rglob("*")):  # for those who are not root
            path.chmod(0o755 if path.is_dir() else 0o644)
        self._stamps = {p: p.stat().st_mtime_ns for p in sorted(self.inputs.rglob("*"))}

    def merge(self, name: str) -> list[str]:
        """The command without its output."""
        return ["merge", str(self.recipes[name]), "--force", "ancestor"]

    def touched(self) -> bool:
        """Whether an input has other bytes."""
        return contents(self.inputs) != self._digests

    def restore(self) -> None:
        """Give the inputs their bytes and times back."""
        for path, stamp in self._stamps.items():
            same = path.exists() and path.stat().st_mtime_ns == stamp
            if path.is_file() or not path.exists():
                other = self.folder / "pristine" / path.relative_to(self.inputs)
                if not same or path.stat().st_size != other.stat().st_size:
                    path.unlink(missing_ok=True)
                    path.write_bytes(other.read_bytes())
        for path, stamp in self._stamps.items():
            os.utime(path, ns=(stamp, stamp))

    def _reference(self, name: str, out: Path) -> tuple[dict[str, str], Counter[str], float]:
        def counting() -> None:
            counts = fault_kinds.count_calls(self.folder)
            real = os._exit

            def end(code: int) -> None:
                note.write_text(json.dumps(counts))
                real(code)

            os._exit = end

        note = self.folder / "counts.json"
        start = time.perf_counter()
        code, said = Child([*self.merge(name), "-o", str(out)], counting).wait()
        if code:
            raise SystemExit(f"{name} undisturbed: {said}")
        seconds = time.perf_counter() - start
        return contents(out), Counter(json.loads(note.read_text())), seconds


def scene_of(world: World, draw: random.Random, work: Path) -> tuple[str, Scene]:
    """Draw a recipe, and whether an earlier output is replaced."""
    name = draw.choice(sorted(world.recipes))
    _, counts, seconds = world.known[name]
    used = ("base", "donor") if name == "adamms" else ("base", "one", "two")
    weights = [f for each in used for f in sorted((world.inputs / each).glob("*.safetensors"))]
    size = sum(f.stat().st_size for f in (world.folder / "references" / name).iterdir())
    out, overwrite = work / "out", draw.random() < 0.3
    work.mkdir()
    if overwrite:
        shutil.copytree(world.earlier, out)
    return name, Scene(
        work, out, world.inputs, weights, counts, size, seconds, overwrite, world.folder
    )


def case(number: int, seed: int, kind: str, world: World) -> dict[str, Any]:
    """Run one case; return how it ended, and what was wrong."""
    draw = random.Random(f"{seed}:{number}")
    work = world.folder / f"case{number}"
    name, scene = scene_of(world, draw, work)
    writes = Writes()
    if kind == SECOND:
        fault, (code, said) = two_processes(draw, scene, world, name)
    else:
        fault = fault_kinds.KINDS[kind](draw, scene)
        fault.prepare()
        begin = fault.inside

        def inside() -> None:
            writes.record()
            begin()

        code, said = Child(_merge(world, name, scene, fault), inside).wait()
    out = fault.out or scene.out
    problems = list(_problems(world, name, scene, fault, code, said))
    fault.repair()
    if kind != "input changes" and world.touched():
        problems.append("an input has other bytes")
    world.restore()
    then = "resumed" if draw.random() < 0.7 else "cleaned"
    kept = promised(out)
    if kind == "signal" and code != 0 and not _is_whole(world, name, out):
        lost = [f"{w[0]} {w[1:]}" for w in writes.found() if not _covers(kept, *w)]
        problems += [f"written, and not kept: {lost[0]} of {len(lost)}"] if lost else []
    again = Writes()
    problems += _afterwards(world, name, scene, out, then, again)
    if twice := [w for w in again.found() if _touches(kept, *w)]:
        problems.append(f"kept, and written again: {twice[0]} of {len(twice)}")
    if any(not each.is_file() for each in fault.precious):
        problems.append("it touched what is none of its own")
    subprocess.run(["umount", work / "disk"], check=False, capture_output=True)
    shutil.rmtree(work)
    what = f"case {number}, {name}{', overwrite' * scene.overwrite}: {fault.what}; {then}"
    if SAY:
        print(f"{what} | {code} | {said.strip()}", flush=True)
    return {
        "code": code, "then": then, "problems": [f"{what}: {each}" for each in problems],
        "kept": sum(each.total for each in kept.values()) if then == "resumed" else 0,
        "again": sum(stop - start for _, start, stop in again.found()),
    }  # fmt: skip


def _is_whole(world: World, name: str, out: Path) -> bool:
    return out.exists() and contents(out) == world.known[name][0]


def _covers(kept: dict[str, Ranges], name: str, start: int, stop: int) -> bool:
    return name in kept and kept[name].covers(start, stop)


def _touches(kept: dict[str, Ranges], name: str, start: int, stop: int) -> bool:
    return any(first < stop and start < last for first, last in kept.get(name, ()))


def _merge(world: World, name: str, scene: Scene, fault: Fault, *more: str) -> list[str]:
    where = ["-o", str(fault.out or scene.out), *more]
    return [*world.merge(name), *where, *(["--overwrite"] if scene.overwrite else [])]


def _problems(world: World, name: str, scene: Scene, fault: Fault, code: int | str, said: str):
    """What is wrong right after the case."""
    out = fault.out or scene.out
    if code not in fault.codes:
        yield f"exit code {code}: {said.strip()[-3000:]}"
        return
    if code == 0:
        if contents(out) != world.known[name][0]:
            yield "it ended well, with other bytes"
        return
    if len(said.splitlines()) != 1 or not said.startswith(_ENDS):
        yield f"not one clear line: {said.strip()[-3000:]}"
    if fault.kind != "links" and (wrong := _wrong_output(world, name, scene, out, said)):
        yield wrong


def _wrong_output(world: World, name: str, scene: Scene, out: Path, said: str) -> str:
    """What is wrong with the output of a merge that failed; nothing if it may be so."""
    if not out.exists():
        lost = scene.overwrite and not _old(out).exists()
        return "it failed, and the earlier output is gone" if lost else ""
    found = contents(out)
    if found == world.known[name][0]:  # it failed after that
        said_so = said.startswith("Error") or "is complete" in said
        return "" if said_so else f"the output is there: {said.strip()}"
    if not scene.overwrite:
        return "it failed, and there is an output"
    return "" if found == contents(world.earlier) else "the earlier output is another"


def _old(out: Path) -> Path:
    return out.with_name(f".{out.name}.omnimerge-old")


def _afterwards(
    world: World, name: str, scene: Scene, out: Path, then: str, writes: Writes
) -> list[str]:
    """Go on with it or clean up, without the fault."""
    more = ["--overwrite"] if scene.overwrite else []
    if then == "resumed":
        arguments = [*world.merge(name), "-o", str(out), "--resume", *more]
        code, said = Child(arguments, writes.record).wait()
        if code:
            return [f"--resume gives {code}: {said.strip()[-3000:]}"]
        if contents(out) != world.known[name][0]:
            return ["--resume gives other bytes"]
    code, said = Child(["clean", str(out)], _nothing).wait()
    if code:
        return [f"clean gives {code}: {said.strip()[-3000:]}"]
    left = [str(p) for p in out.parent.glob(".*omnimerge*") if p.is_dir() and not p.is_symlink()]
    if left:
        return [f"{then}, {left} is left"]
    if scene.overwrite and out.name == "out" and not out.exists():
        return ["cleaned, and neither output is there"]
    return []


def _nothing() -> None:
    """No fault."""


def two_processes(
    draw: random.Random, scene: Scene, world: World, name: str
) -> tuple[Fault, tuple[int | str, str]]:
    """Stop a merge somewhere, start another command on the same output, let the first go on."""
    ready, go = os.pipe(), os.pipe()
    at = scene.moment(draw, "pwrite")
    second = draw.choice(("merge", "resume", "clean"))

    def act(number, real, arguments, options):
        if number == at:
            os.write(ready[1], b"!")
            os.read(go[0], 1)
        return real(*arguments, **options)

    fault = Fault(SECOND, f"{second} at write {at}", codes=(0,))
    first = Child(
        _merge(world, name, scene, fault), lambda: fault_kinds.tap("pwrite", world.folder, act)
    )
    select.select([ready[0]], [], [], SECONDS)
    more = ["--resume"] if second == "resume" else []
    arguments = _merge(world, name, scene, fault, *more)
    code, said = Child(
        ["clean", str(scene.out)] if second == "clean" else arguments, _nothing
    ).wait()
    os.write(go[1], b"!")
    ended = first.wait()
    for each in (*ready, *go):
        os.close(each)
    refused = code == 1 and "another process is writing" in said
    if not (code == 0 and "nothing was left" in said if second == "clean" else refused):
        return fault, (f"the second {second} gives {code}", said)
    return fault, ended


def describe(found: list[tuple[str, dict[str, Any]]], **more: Any) -> dict[str, Any]:
    """The results with their totals."""
    kinds: dict[str, dict[str, Any]] = {}
    for kind, each in found:
        entry = kinds.setdefault(kind, {"cases": 0, "kept": 0, "again": 0, "ends": Counter()})
        entry["cases"] += 1
        for what in ("kept", "again"):  # bytes, of the cases that were resumed
            entry[what] += each[what]
        entry["ends"][f"exit {each['code']}, {each['then']}"] += 1
    findings = [problem for _, each in found for problem in each["problems"]]
    return {
        "date": date.today().isoformat(), "python": platform.python_version(),
        "torch": torch.__version__, "root": fault_kinds.ROOT, **more,
        "cases": len(found), "findings": findings, "kinds": dict(sorted(kinds.items())),
    }  # fmt: skip


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--only", nargs="*", help="kinds")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--json", type=Path, help="also save the results here")
    given = parser.parse_args()
    torch.set_num_threads(1)
    journal.INTERVAL = 0.002
    slices.CHUNK_ELEMENTS = 1000
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="omnimerge-faults-") as scratch:
        Path(scratch).chmod(0o755)
        world = World(Path(scratch))
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the command took it
        kinds = given.only or [*fault_kinds.KINDS, SECOND]
        skipped = []
        if not fault_kinds.can_mount(Path(scratch) / "mount"):
            skipped = [kind for kind in kinds if kind in fault_kinds.NEED_MOUNT]
            kinds = [kind for kind in kinds if kind not in skipped]
        found = []
        for number in range(given.first, given.first + given.cases):
            kind = kinds[number % len(kinds)]
            try:
                found.append((kind, case(number, given.seed, kind, world)))
            finally:
                disk = world.folder / f"case{number}" / "disk"
                subprocess.run(["umount", disk], check=False, capture_output=True)
            for problem in found[-1][1]["problems"]:
                print(problem, file=sys.stderr, flush=True)
    seconds = round(time.monotonic() - start, 1)
    results = describe(found, seed=given.seed, seconds=seconds, skipped=skipped)
    text = json.dumps(results, indent=1)
    print(text)
    if given.json:
        given.json.write_text(text + "\n")
    sys.exit(1 if results["findings"] else 0)


if __name__ == "__main__":
    main()

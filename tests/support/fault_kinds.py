"""What can go wrong with a merge's files, each as something that is set up and put right again.

A kind draws a `Fault`. `prepare` runs in the parent before the merge, `inside` in the forked child
that is to merge, `repair` in the parent afterwards.
"""

from __future__ import annotations

import builtins
import errno
import fcntl
import io
import itertools
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from omnimerge.checkpoint import staging

NOBODY = 65534
ROOT = os.geteuid() == 0

# Call -> what a file system may answer.
ERRORS = {
    "pwrite": (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.ESTALE),
    "fsync": (errno.EIO, errno.ENOSPC, errno.EDQUOT),
    "rename": (errno.EXDEV, errno.ENOTEMPTY, errno.EACCES, errno.ESTALE, errno.EIO),
    "replace": (errno.EIO, errno.EXDEV, errno.EACCES),
    "mkdir": (errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EIO),
    "os.open": (errno.EIO, errno.EACCES, errno.EMFILE, errno.ENOSPC, errno.ESTALE),
    "io.open": (errno.EIO, errno.EACCES, errno.EMFILE, errno.ENOSPC, errno.ESTALE),
    "unlink": (errno.EACCES, errno.EIO, errno.ESTALE),
    "rmdir": (errno.EACCES, errno.EIO, errno.ENOTEMPTY),
    "posix_fallocate": (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO),
    "preadv": (errno.EIO, errno.ESTALE),
    "pread": (errno.EIO, errno.ESTALE),
    "stat": (errno.EIO, errno.ESTALE, errno.EACCES),
    "scandir": (errno.EIO, errno.ESTALE, errno.EACCES),
    "listdir": (errno.EIO, errno.ESTALE, errno.EACCES),
    "statvfs": (errno.EIO, errno.ENOSYS),
    "flock": (errno.ENOLCK, errno.EIO),
}
NO_FALLOCATE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


def _nothing() -> None:
    """Nothing to do."""


@dataclass
class Fault:
    """One case.

    Attributes:
        kind: its name in `KINDS`.
        what: the details, for people.
        codes: exit codes that are right.
        prepare: before the merge.
        inside: in the child, before the merge.
        repair: after it.
        out: where the output goes, if not the usual place.
        precious: files that nobody may touch.
    """

    kind: str
    what: str
    codes: tuple[int, ...] = (0, 1)
    prepare: Callable[[], None] = _nothing
    inside: Callable[[], None] = _nothing
    repair: Callable[[], None] = _nothing
    out: Path | None = None
    precious: tuple[Path, ...] = ()


@dataclass
class Scene:
    """What a fault may use: the case's folder and output, and what its merge does undisturbed."""

    work: Path
    out: Path
    inputs: Path
    weights: list[Path]
    counts: Counter[str]
    nbytes: int
    seconds: float
    overwrite: bool = False
    home: Path = field(default_factory=Path)

    def moment(self, draw: random.Random, name: str) -> int:
        """One of the merge's calls of this function."""
        return draw.randint(1, max(1, self.counts[name]))


def tap(name: str, home: Path, act: Callable[[int, Callable, tuple, dict], object]) -> None:
    """Let `act(number of the call, function, arguments, options)` stand for a function."""
    module = {"flock": fcntl, "io.open": io}.get(name, os)
    short = name.rpartition(".")[2]
    real, numbers = getattr(module, short), itertools.count(1)

    def call(*arguments, **options):
        first = arguments[0] if arguments else None
        if not isinstance(first, int) and not str(first).startswith(str(home)):
            return real(*arguments, **options)  # none of the merge's files
        return act(next(numbers), real, arguments, options)

    setattr(module, short, call)
    if name == "io.open":
        builtins.open = call


def count_calls(home: Path) -> Counter[str]:
    """Count the calls of this process from now on."""
    counts: Counter[str] = Counter()

    def counting(name):
        def act(number, real, arguments, options):
            counts[name] = number
            return real(*arguments, **options)

        return act

    for name in ERRORS:
        tap(name, home, counting(name))
    return counts


def _fail(code: int, arguments) -> None:
    path = next((str(a) for a in arguments if isinstance(a, (str, Path))), None)
    raise OSError(code, os.strerror(code), path)


def call_fails(draw: random.Random, scene: Scene) -> Fault:
    """A call fails at some moment, once or from then on."""
    name = draw.choice([n for n in ERRORS if scene.counts[n]])
    code, at, on = draw.choice(ERRORS[name]), scene.moment(draw, name), draw.random() < 0.5

    def act(number, real, arguments, options):
        if number == at or (on and number > at):
            _fail(code, arguments)
        return real(*arguments, **options)

    what = f"{name} gives {errno.errorcode[code]} at call {at}{' and on' if on else ''}"
    return Fault("call fails", what, inside=lambda: tap(name, scene.home, act))


def odd_file_system(draw: random.Random, scene: Scene) -> Fault:
    """Nothing fails that a merge needs: no fallocate, no locks, short reads and writes."""
    lacks = {"posix_fallocate": NO_FALLOCATE, "flock": NO_LOCKS, "fsync": (errno.EINVAL,)}
    chosen = {n: draw.choice(c) for n, c in lacks.items() if draw.random() < 0.6}
    short = [n for n in ("pwrite", "preadv", "pread") if draw.random() < 0.4]
    exchange, most = draw.random() < 0.5, draw.choice((1 << 9, 1 << 12))

    def lacking(name, code):
        def act(number, real, arguments, options):
            folder = name != "fsync" or stat.S_ISDIR(os.fstat(arguments[0]).st_mode)
            return _fail(code, ()) if folder else real(*arguments, **options)

        return act

    def cut(number, real, arguments, options):
        first, data, *rest = arguments
        if isinstance(data, int):  # pread
            return real(first, min(data, most), *rest)
        data = [data[0][:most]] if isinstance(data, list) else data[:most]
        return real(first, data, *rest)

    def inside():
        for name, code in chosen.items():
            tap(name, scene.home, lacking(name, code))
        for name in short:
            tap(name, scene.home, cut)
        if exchange:
            staging._renameat2 = lambda *_: _fail(errno.EINVAL, ())

    lacked = ", ".join(f"{n} {errno.errorcode[c]}" for n, c in chosen.items())
    what = f"lacks {lacked}; short {short}{'; no exchange' if exchange else ''}"
    return Fault("odd file system", what, codes=(0,), inside=inside)


def limit(draw: random.Random, scene: Scene) -> Fault:
    """Files may not grow beyond a size, or be as many."""
    if draw.random() < 0.7:
        most = draw.randrange(0, 70_000)
        fallocate = draw.random() < 0.5

        def inside():
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
            if not fallocate:
                tap("posix_fallocate", scene.home, lambda *_: _fail(errno.EOPNOTSUPP, ()))

        return Fault("limit", f"files of {most} bytes", inside=inside)
    files = draw.randrange(4, 60)
    limits = (files, files)
    what = f"{files} open files"
    return Fault("limit", what, inside=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limits))


def small_disk(draw: random.Random, scene: Scene) -> Fault:
    """The output lies on a small tmpfs, which is full at some moment."""
    disk, nbytes = scene.work / "disk", int(scene.nbytes * draw.uniform(0.1, 1.3))
    fallocate = draw.random() < 0.3

    def prepare():
        used = _disk_of(scene, disk)
        _mount(f"remount,size={used + nbytes}", disk)

    def inside():
        shutil.disk_usage = lambda _: shutil._ntuple_diskusage(1 << 40, 0, 1 << 40)  # a lie
        if not fallocate:
            tap("posix_fallocate", scene.home, lambda *_: _fail(errno.EOPNOTSUPP, ()))

    return Fault(
        "small disk", f"tmpfs of {nbytes:,} bytes, {'' if fallocate else 'no '}fallocate",
        prepare=prepare, inside=inside, out=disk / "out",
        repair=lambda: _mount("remount,size=100m", disk),
    )  # fmt: skip


def read_only(draw: random.Random, scene: Scene) -> Fault:
    """The output's file system is mounted read-only, from the beginning or from some moment."""
    disk = scene.work / "disk"
    at = scene.moment(draw, "pwrite") if draw.random() < 0.3 else 0

    def prepare():
        _disk_of(scene, disk)
        if not at:
            _mount("remount,ro", disk)

    def act(number, real, arguments, options):
        if number >= at:
            _fail(errno.EROFS, ())
        return real(*arguments, **options)

    return Fault(
        "read-only", f"read-only from write {at} on", codes=(1,), prepare=prepare,
        inside=lambda: tap("pwrite", scene.home, act) if at else None, out=disk / "out",
        repair=lambda: _mount("remount,rw", disk),
    )  # fmt: skip


def _disk_of(scene: Scene, disk: Path) -> int:
    """Mount a disk, with the earlier output on it; return the bytes that are used."""
    disk.mkdir()
    _mount("size=100m", disk)
    if scene.overwrite:
        shutil.move(scene.out, disk / "out")
    found = os.statvfs(disk)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def _mount(options: str, folder: Path) -> None:
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)],
        check=True, capture_output=True,
    )  # fmt: skip


def can_mount(folder: Path) -> bool:
    """Whether this process may mount a tmpfs."""
    folder.mkdir()
    try:
        _mount("size=1m", folder)
    except (OSError, subprocess.CalledProcessError):
        return False
    finally:
        subprocess.run(["umount", str(folder)], check=False, capture_output=True)
        folder.rmdir()
    return True


def input_changes(draw: random.Random, scene: Scene) -> Fault:
    """A weight file changes while it is read."""
    file, at = draw.choice(scene.weights), scene.moment(draw, "preadv")
    how = draw.choice(("truncated", "grown", "overwritten", "touched", "deleted", "replaced"))

    def change():
        size = file.stat().st_size
        if how == "truncated":
            os.truncate(file, draw.randrange(size))
        elif how == "grown":
            with file.open("ab") as stream:
                stream.write(b"more")
        elif how == "overwritten":
            with file.open("r+b") as stream:
                stream.seek(size // 2)
                stream.write(b"\x11\x3c" * min(2000, size // 8))
        elif how == "touched":
            os.utime(file)
        else:
            content = file.read_bytes()
            file.unlink()
            if how == "replaced":
                file.write_bytes(content)

    def act(number, real, arguments, options):
        if number == at:
            change()
        return real(*arguments, **options)

    what = f"{file.name} of {file.parent.name} is {how} at read {at}"
    return Fault("input changes", what, codes=(1,), inside=lambda: tap("preadv", scene.home, act))


def signalled(draw: random.Random, scene: Scene) -> Fault:
    """SIGINT or SIGTERM, once or twice, at a call or at a random time."""
    number = draw.choice((signal.SIGINT, signal.SIGTERM))
    names = [n for n in ("pwrite", "preadv", "fsync", "rename", "unlink") if scene.counts[n]]
    name, again = draw.choice(names), draw.random() < 0.3
    at, seconds = scene.moment(draw, name), draw.uniform(0.02, 1.2 * scene.seconds)
    timed = draw.random() < 0.5

    def shoot():
        for _ in range(1 + again):
            os.kill(os.getpid(), number)

    def act(count, real, arguments, options):
        if count == at:
            shoot()
        return real(*arguments, **options)

    def later():
        time.sleep(seconds)
        shoot()

    def inside():
        if timed:
            threading.Thread(target=later, daemon=True).start()
        else:
            tap(name, scene.home, act)

    when = f"after {seconds:.3f} s" if timed else f"at {name} {at}"
    what = f"{signal.Signals(number).name} {when}{', twice' if again else ''}"
    code = 130 if number == signal.SIGINT else 1
    return Fault("signal", what, codes=(0, code), inside=inside)


def no_permission(draw: random.Random, scene: Scene) -> Fault:
    """The user may not write the output's folder, or not read an input; root becomes another."""
    what, place = draw.choice((
        ("the folder of the output", scene.work),
        ("a weight file", draw.choice(scene.weights)),
        ("a folder of an input", scene.weights[0].parent),
        ("a config", scene.weights[0].parent / "config.json"),
    ))  # fmt: skip
    mode = stat.S_IMODE(place.stat().st_mode)

    def prepare():
        if ROOT:
            for path in (scene.work, *scene.work.rglob("*")):
                os.chown(path, NOBODY, NOBODY)
        place.chmod(0o555 if place == scene.work else 0)

    def inside():
        if ROOT:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)

    return Fault(
        "no permission", what, codes=(1,), prepare=prepare, inside=inside,
        repair=lambda: place.chmod(mode),
    )  # fmt: skip


def linked(draw: random.Random, scene: Scene) -> Fault:
    """The output, its hidden folder or a folder above is a link, or a file."""
    other, hidden = scene.work / "other", scene.work / ".new.omnimerge"
    out = scene.work / "new"
    places = {
        "the output is a link to nothing": (out, other / "there", (1,)),
        "the output is a link to an empty folder": (out, other / "empty", (0,)),
        "the output is a link to itself": (out, out, (1,)),
        "the output is a link to an input": (out, scene.weights[0].parent, (1,)),
        "the output is a link to a full folder": (out, other, (1,)),
        "the hidden folder is a link to a full folder": (hidden, other, (1,)),
        "the hidden folder is a link to nothing": (hidden, scene.work / "none", (1,)),
        "the hidden folder is a file": (hidden, None, (1,)),
    }
    what = draw.choice(sorted(places))
    place, goal, codes = places[what]

    def prepare():
        (other / "empty").mkdir(parents=True)
        (other / "mine").write_text("nobody may touch this")
        place.symlink_to(goal) if goal else place.write_text("mine")

    def repair():
        place.unlink() if place.is_symlink() or place.is_file() else None

    return Fault(
        "links", what, codes=codes, prepare=prepare, out=out, repair=repair,
        precious=(other / "mine",),
    )  # fmt: skip


KINDS = {
    "call fails": call_fails,
    "odd file system": odd_file_system,
    "limit": limit,
    "small disk": small_disk,
    "read-only": read_only,
    "input changes": input_changes,
    "signal": signalled,
    "no permission": no_permission,
    "links": linked,
}
NEED_MOUNT = ("small disk", "read-only")

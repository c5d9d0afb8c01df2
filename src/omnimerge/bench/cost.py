"""Time and memory of a merge to disk, taken in a fresh process."""

from __future__ import annotations

import multiprocessing
import shutil
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from omnimerge.bench import lines
from omnimerge.bench.line import BenchError, Line

_PRELOADED = ["torch", "omnimerge.methods", "omnimerge.engine.execute", "omnimerge.bench.cost"]


def measure(line: Line, recipe: Mapping[str, Any], out: Path) -> tuple[float, int | None]:
    """Merge to disk twice, in a process that does nothing else.

    Args:
        line: the line.
        recipe: what to merge.
        out: the folder to create; replaced if it exists.

    Returns:
        Seconds of the faster merge, and the most bytes that the process took on top of what it had
        at first; None where the system does not tell.
    """
    method = "forkserver" if sys.platform == "linux" else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(_PRELOADED)
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(_measured, line.name, dict(recipe), out).result()
    except BrokenProcessPool:
        raise BenchError("the process that merged was killed; is there enough memory?") from None


def _measured(name: str, recipe: Mapping[str, Any], out: Path) -> tuple[float, int | None]:
    import torch

    torch.set_num_threads(1)
    line = lines.get(name)
    line.warm_up(recipe)
    before = _status("VmRSS")
    seconds = []
    peak = None
    for _ in range(2):
        shutil.rmtree(out, ignore_errors=True)
        begun = time.perf_counter()
        line.write(recipe, out)
        seconds.append(time.perf_counter() - begun)
        peak = peak or _status("VmHWM")
    return min(seconds), None if before is None or peak is None else max(0, peak - before)


def _status(key: str) -> int | None:
    """Read an entry of the kernel's account of this process, in bytes."""
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    found = [entry.split()[1] for entry in text.splitlines() if entry.startswith(f"{key}:")]
    return 1024 * int(found[0]) if found else None

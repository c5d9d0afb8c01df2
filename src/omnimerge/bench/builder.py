"""Build the folders of a line, one per seed; what is complete is left alone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from omnimerge.bench import results
from omnimerge.bench.line import BenchError, Line, Report
from omnimerge.bench.processes import alone_in
from omnimerge.errors import suggestion


def build(
    line: Line,
    folder: Path,
    *,
    preset: str,
    seeds: int,
    command: Sequence[str],
    on_progress: Report,
) -> list[Path]:
    """Build seeds 0, 1, ... of a line.

    Args:
        line: the line.
        folder: gets one subfolder per seed.
        preset: name of the preset.
        seeds: how many.
        command: the command line, for the record.
        on_progress: told how far it is.

    Returns:
        The folders of the seeds.

    Raises:
        BenchError: for an unknown preset, or a folder of another line or preset, or one that
            another process writes into.
    """
    if preset not in line.presets:
        known = ", ".join(line.presets)
        hint = suggestion(preset, line.presets)
        raise BenchError(f"the line {line.name} has no preset {preset!r}{hint}; it has: {known}")
    built = []
    for seed in range(seeds):
        place = folder / f"seed-{seed}"
        place.mkdir(parents=True, exist_ok=True)
        _refuse_another(place, line.name, preset)
        if (place / results.BUILD_NAME).is_file():  # it may be in use by a run
            on_progress(f"seed {seed}: complete already")
        else:
            with alone_in(place):
                _build(line, place, preset, seed, command, on_progress)
        built.append(place)
    return built


def _build(
    line: Line, place: Path, preset: str, seed: int, command: Sequence[str], on_progress: Report
) -> None:
    begun = time.perf_counter()
    (place / _BEGUN).write_text(f"{line.name} {preset}\n", encoding="utf-8")
    line.build(
        place,
        preset=preset,
        seed=seed,
        on_progress=lambda text: on_progress(f"seed {seed}: {text}"),
    )
    done = results.Build(
        line=line.name,
        preset=preset,
        seed=seed,
        seconds=time.perf_counter() - begun,
        environment=results.environment(command),
    )
    results.write(done, place / results.BUILD_NAME)
    (place / _BEGUN).unlink()
    on_progress(f"seed {seed}: built in {done.seconds:.0f} s")


_BEGUN = "building.txt"


def _refuse_another(place: Path, line: str, preset: str) -> None:
    """Refuse a folder, complete or begun, that is of another line or preset."""
    if (place / results.BUILD_NAME).is_file():
        found = results.read(results.Build, place / results.BUILD_NAME)
        there = f"{found.line} {found.preset}"
    elif (place / _BEGUN).is_file():
        there = (place / _BEGUN).read_text(encoding="utf-8").strip()
    else:
        return
    if there != f"{line} {preset}":
        raise BenchError(f"{place} holds {there}, not {line} {preset}; give another folder")

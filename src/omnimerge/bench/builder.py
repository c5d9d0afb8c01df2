"""Build the folders of a line, one per seed; what is complete is left alone."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from omnimerge.bench import results
from omnimerge.bench.line import BenchError, Line, Report
from omnimerge.bench.processes import alone_in
from omnimerge.errors import suggestion
from omnimerge.search.store import write_atomically


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
        BenchError: for an unknown preset, a folder of another line, preset or settings, one that
            another process writes into or that cannot be written, or a trainer that was killed.
    """
    if preset not in line.presets:
        known = ", ".join(line.presets)
        hint = suggestion(preset, line.presets)
        raise BenchError(f"the line {line.name} has no preset {preset!r}{hint}; it has: {known}")
    built = []
    for seed in range(seeds):
        place = folder / f"seed-{seed}"
        try:
            place.mkdir(parents=True, exist_ok=True)
            _refuse_another(place, line, preset)
            if (place / results.BUILD_NAME).is_file():  # it may be in use by a run
                on_progress(f"seed {seed}: complete already")
            else:
                with alone_in(place):
                    _build(line, place, preset, seed, command, on_progress)
        except OSError as error:
            raise BenchError(f"cannot build in {place}: {error.strerror or error}") from error
        except BrokenProcessPool:
            raise BenchError(
                f"{place}: a process that trained was killed; is there enough memory? The same "
                "command goes on"
            ) from None
        built.append(place)
    return built


def _build(
    line: Line, place: Path, preset: str, seed: int, command: Sequence[str], on_progress: Report
) -> None:
    before = float(_begun(place).get("seconds", 0.0))
    start = time.perf_counter()

    def note(text: str) -> None:
        settings = line.settings(preset)
        held = {"line": line.name, "preset": preset, "settings": settings, "seconds": passed()}
        write_atomically(place / _BEGUN, json.dumps(held) + "\n")
        if text:
            on_progress(f"seed {seed}: {text}")

    def passed() -> float:
        return before + time.perf_counter() - start

    note("")
    line.build(place, preset=preset, seed=seed, on_progress=note)
    done = results.Build(
        line=line.name,
        preset=preset,
        settings=line.settings(preset),
        seed=seed,
        seconds=passed(),
        environment=results.environment(command),
    )
    results.write(done, place / results.BUILD_NAME)
    (place / _BEGUN).unlink()
    on_progress(f"seed {seed}: built in {done.seconds:.0f} s")


_BEGUN = "building.json"


def _refuse_another(place: Path, line: Line, preset: str) -> None:
    """Refuse a folder, complete or begun, that is of another line, preset or settings."""
    found: dict[str, Any]
    if (place / results.BUILD_NAME).is_file():
        found = results.read(results.Build, place / results.BUILD_NAME).model_dump()
    else:
        found = _begun(place)
    if not found:
        return
    if (found["line"], found["preset"]) != (line.name, preset):
        there = f"{found['line']} {found['preset']}"
        raise BenchError(f"{place} holds {there}, not {line.name} {preset}; give another folder")
    if found["settings"] != json.loads(json.dumps(line.settings(preset))):
        raise BenchError(
            f"{place} was built by another version, with other settings of {preset}; remove it or "
            "give another folder"
        )


def _begun(place: Path) -> dict[str, Any]:
    """What an interrupted build left a note of; empty if there is none."""
    try:
        found = json.loads((place / _BEGUN).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        found = None
    if not isinstance(found, dict) or not {"line", "preset", "settings"} <= found.keys():
        raise BenchError(f"{place / _BEGUN} is damaged; remove {place}, and build again")
    return found

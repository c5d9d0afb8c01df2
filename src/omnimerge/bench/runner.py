"""Run a line: score base, experts, references and every method, one row at a time.

The scale of a method is chosen on the validation split, and again without labels, by the criterion
of `omnimerge.search`; only then is the test split asked. Every row is on disk before the next one
begins, so that an interrupted run goes on.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omnimerge.bench import grid, results
from omnimerge.bench.cost import measure
from omnimerge.bench.line import BASE, BenchError, Line, Report, Subject
from omnimerge.bench.processes import alone_in
from omnimerge.bench.results import Build, Point, Results, Row, mean
from omnimerge.errors import OmnimergeError
from omnimerge.search import select
from omnimerge.search.criteria import unanimity
from omnimerge.search.store import write_atomically

MERGED = "merged"


@dataclass
class Run:
    """A run of one seed.

    Attributes:
        line: the line.
        folder: the built folder.
        methods: names of merge methods.
        scales: values of the keyword that is searched.
        on_progress: told about every row.
        keep: whether the merged checkpoints stay on disk.
    """

    line: Line
    folder: Path
    methods: Sequence[str]
    scales: Sequence[float]
    on_progress: Report
    keep: bool = False
    _subject: Subject | None = field(default=None, init=False)
    _held: dict[str, Any] = field(default_factory=dict, init=False)  # the recipe last put

    def rows(self) -> list[Row]:
        """Make every row that is not on disk yet.

        Returns:
            All rows: base, experts, references, then methods, each with its choice by search; those
            of methods that were run before and are not asked for now come last.

        Raises:
            BenchError: if rows are there that other versions made, or a method fails.
        """
        self._check_versions()
        singles = [
            (BASE, "base"),
            *((name, "expert") for name in self.line.experts),
            *((name, "reference") for name in self.line.references),
        ]
        found = [self._single(name, kind) for name, kind in singles]
        for method in self.methods:
            found += self._method(method)
        there = {(row.kind, row.name) for row in found}
        stored = [results.read(Row, file) for file in self._stored()]
        return [*found, *(row for row in stored if (row.kind, row.name) not in there)]

    def _stored(self) -> list[Path]:
        """Files of methods' rows on disk, by name."""
        folder = self.folder / results.ROWS_NAME
        methods = sorted(folder.glob("method-*.json"))
        searched = [
            path.with_name(f"search-{path.name.removeprefix('method-')}") for path in methods
        ]
        return [p for pair in zip(methods, searched, strict=True) for p in pair if p.is_file()]

    def _check_versions(self) -> None:
        """Rows are made by one set of versions, or none is like the other."""
        now = results.environment([]).versions
        file = self.folder / results.ROWS_NAME / results.VERSIONS_NAME
        if not file.is_file():
            write_atomically(file, json.dumps(now) + "\n")
            return
        before = json.loads(file.read_text(encoding="utf-8"))
        apart = [
            f"{name} {before.get(name, '-')} then, {now.get(name, '-')} now"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name)
        ]
        if apart:
            raise BenchError(
                f"rows in {file.parent} are of other versions ({'; '.join(apart)}); remove that "
                "folder to make all of them again"
            )

    def _single(self, name: str, kind: Any) -> Row:
        path = self._path(kind, name)
        if path.is_file():
            return results.read(Row, path)
        begun = time.perf_counter()
        scores = self.line.alone(self.folder, name, "test")
        took = time.perf_counter() - begun
        return self._done(Row(name=name, kind=kind, scores=scores, took=took))

    def _method(self, method: str) -> list[Row]:
        asked = tuple(self.scales) if grid.swept(method) else ()
        tried = grid.points(method, self.scales)
        paths = [self._path(kind, method) for kind in ("method", "search")]
        if paths[0].is_file():  # it is written last
            stored = [results.read(Row, path) for path in paths if path.is_file()]
            if self._is_of(stored[0], asked, tried):
                return stored
        for path in paths:
            path.unlink(missing_ok=True)
        reason = grid.refusal(method, self.line.recipe(self.folder, method, {}))
        if not tried:
            reason = reason or "its scale is a share, and none of the scales is at most 1"
        if reason:
            return [self._done(Row(name=method, kind="refused", asked=asked, reason=reason))]
        try:
            return self._merge(method, asked)
        except OmnimergeError as error:
            raise BenchError(f"{method}: {error}") from error

    def _is_of(self, row: Row, asked: tuple[float, ...], tried: list[dict[str, Any]]) -> bool:
        """Whether a row is what is asked for now, and what is to be kept of it is there."""
        if row.kind == "refused":
            return row.asked == asked
        kept = not self.keep or (self.folder / MERGED / row.name).is_dir()
        return kept and row.asked == asked and [p.parameters for p in row.points] == tried

    def _merge(self, method: str, asked: tuple[float, ...]) -> list[Row]:
        begun = time.perf_counter()
        points = list(self._tried(method))
        best = max(points, key=lambda point: mean(point.scores.values()))  # ties: the smallest
        seconds, peak = self._written(method, best.parameters)
        row = Row(
            name=method,
            kind="method",
            scores=self._test(method, best.parameters),
            parameters=best.parameters,
            points=tuple(points),
            asked=asked,
            seconds=seconds,
            peak_bytes=peak,
        )
        extra: list[Row] = []
        if len(points) >= 3:
            chosen = select(range(len(points)), [point.changed for point in points]).point
            parameters = points[int(chosen)].parameters
            scores = row.scores
            if parameters != best.parameters:
                scores = self._test(method, parameters)
            extra.append(
                Row(name=method, kind="search", scores=scores, parameters=parameters, asked=asked)
            )
        for each in extra:  # before the method's own row, which says that all is there
            self._done(each)
        took = time.perf_counter() - begun
        return [self._done(row.model_copy(update={"took": took})), *extra]

    def _tried(self, method: str) -> Iterator[Point]:
        """Score a method at every point on the validation split."""
        tried = grid.points(method, self.scales)
        scores, answers = [], []
        for parameters in tried:
            subject = self._put(method, parameters)
            scores.append(subject.score("val"))
            answers.append(list(subject.answers()))
        changed = unanimity(answers) if len(tried) >= 3 else [None] * len(tried)
        for parameters, score, change in zip(tried, scores, changed, strict=True):
            yield Point(parameters=parameters, scores=score, changed=change)

    def _put(self, method: str, parameters: dict[str, Any]) -> Subject:
        if self._subject is None:
            self._subject = self.line.subject(self.folder)
        recipe = self.line.recipe(self.folder, method, parameters)
        if recipe != self._held:
            self._held = {}  # a merge that fails half-way leaves nobody knows what
            self._subject.put(recipe)
            self._held = recipe
        return self._subject

    def _test(self, method: str, parameters: dict[str, Any]) -> dict[str, float]:
        return self._put(method, parameters).score("test")

    def _written(self, method: str, parameters: dict[str, Any]) -> tuple[float, int | None]:
        """Merge to disk, load the result with transformers; return seconds and bytes."""
        out = self.folder / MERGED / method
        out.parent.mkdir(exist_ok=True)
        cost = measure(self.line, self.line.recipe(self.folder, method, parameters), out)
        self.line.check(out)
        if not self.keep:
            shutil.rmtree(out)
        return cost

    def _path(self, kind: str, name: str) -> Path:
        kind = "method" if kind == "refused" else kind
        return self.folder / results.ROWS_NAME / f"{kind}-{name}.json"

    def _done(self, row: Row) -> Row:
        results.write(row, self._path(row.kind, row.name))
        average = row.reason if row.average is None else f"{row.average:.3f}"
        self.on_progress(f"{row.kind} {row.name}: {average}")
        return row


def built_folders(folder: Path) -> list[Path]:
    """Find the seeds of a build.

    Args:
        folder: what ``bench build`` wrote, or one seed of it.

    Returns:
        The folders of the seeds.

    Raises:
        BenchError: if there is none, or one is not complete.
    """
    places = [folder] if (folder / results.BUILD_NAME).is_file() else _seeds(folder)
    if not places:
        raise BenchError(f"{folder} holds no benchmark; make one with `omnimerge bench build`")
    for place in places:
        if not (place / results.BUILD_NAME).is_file():
            raise BenchError(f"{place} is not complete; run `omnimerge bench build` again")
    return places


def _seeds(folder: Path) -> list[Path]:
    found = [place for place in folder.glob("seed-*") if place.name[5:].isdigit()]
    return sorted(found, key=lambda place: int(place.name[5:]))


def check_built(line: Line, folder: Path) -> None:
    """Refuse a folder without the checkpoints that are merged, before anything is written into it.

    Args:
        line: the line.
        folder: of one seed.

    Raises:
        BenchError: naming what is missing.
    """
    recipe = line.recipe(folder, "task_arithmetic", {})
    needed = [recipe.get("base"), recipe.get("target")]
    needed += [entry.get(key) for entry in recipe["models"] for key in ("model", "adapter")]
    missing = list(dict.fromkeys(path for path in needed if path and not Path(path).is_dir()))
    if missing:
        names = ", ".join(str(Path(path).relative_to(folder)) for path in missing)
        raise BenchError(
            f"{folder} has no checkpoints in {names}; give a folder that `omnimerge bench build` "
            "wrote and nothing was removed from"
        )


def run(
    line: Line,
    folder: Path,
    *,
    methods: Sequence[str],
    scales: Sequence[float],
    command: Sequence[str],
    on_progress: Report,
    keep: bool = False,
) -> Results:
    """Run one seed, and write its ``results.json``.

    Args:
        line: the line.
        folder: the built folder of one seed.
        methods: names of merge methods.
        scales: values of the keyword that is searched.
        command: the command line, for the record.
        on_progress: told about every row.
        keep: whether the merged checkpoints stay on disk, under ``merged``.

    Returns:
        The results.

    Raises:
        BenchError: if checkpoints are missing, a method yields no model that loads and answers, or
            another process writes into the folder.
    """
    check_built(line, folder)
    built = results.read(Build, folder / results.BUILD_NAME)
    with alone_in(folder):
        rows = Run(line, folder, methods, scales, on_progress, keep).rows()
    outcome = Results(
        line=built.line,
        preset=built.preset,
        seed=built.seed,
        columns=line.columns,
        rows=tuple(rows),
        environment=results.environment(command),
        build=built.environment,
    )
    results.write(outcome, folder / results.RESULTS_NAME)
    return outcome

"""`omnimerge search RECIPE --prompts FILE -o DIR`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from omnimerge.cli._console import (
    force_option,
    json_option,
    print_json,
    recipe_from,
    recipe_options,
    table,
)

if TYPE_CHECKING:
    from omnimerge.search import SearchResult

_EPILOG = """\b
Example:
  omnimerge search recipe.yaml --prompts prompts.jsonl -o search/

\b
A line of prompts.jsonl; paths are relative to the file:
  {"id": "1", "prompt": "What is written on the sign?", "image": "images/1.jpg"}
"""


@click.command("search", epilog=_EPILOG)
@recipe_options
@click.option(
    "--prompts", required=True, type=click.Path(path_type=Path), help="Prompts without labels."
)
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Result folder.")
@click.option("--grid", default="0:0.6:0.1", show_default=True, help="start:stop:step, or 0,0.2,1.")
@click.option(
    "--sample", default=100, show_default=True, type=click.IntRange(1), help="Prompts to draw."
)
@click.option(
    "--criterion",
    default="unanimity",
    show_default=True,
    type=click.Choice(["unanimity", "pairwise", "backward"]),
)
@click.option("--max-new-tokens", default=32, show_default=True, type=click.IntRange(1))
@click.option("--batch-size", default=16, show_default=True, type=click.IntRange(1))
@click.option("--parameter", default="alpha", show_default=True, help="Keyword to search.")
@click.option(
    "--heldout",
    type=click.Path(path_type=Path),
    help="Labelled prompts whose accuracy is shown beside; the choice never sees them.",
)
@click.option("--device", default="cpu", show_default=True)
@click.option("--seed", default=0, show_default=True, help="Of the draw of prompts.")
@click.option("--overwrite", is_flag=True, help="Throw away answers found in the folder.")
@force_option
@json_option
def command(
    recipe: str | None,
    method: str | None,
    target: str | None,
    base: str | None,
    models: tuple[str, ...],
    adapters: tuple[str, ...],
    parameters: tuple[str, ...],
    select: str | None,
    vocabulary: str | None,
    branches: tuple[str, ...],
    layouts: tuple[str, ...],
    dtype: str | None,
    max_shard_size: str | None,
    as_json: bool,
    parameter: str,
    grid: str,
    **options: Any,
) -> None:
    """Find the merging coefficient without labels, in memory; no checkpoint is written.

    At every point of the grid the merged model answers the prompts; the point whose answers change
    least against its neighbours is chosen. A run that was stopped goes on where it was.
    """
    from omnimerge.report import write_search_report
    from omnimerge.search import parse_grid, search

    keys = {
        "method": method,
        "target": target,
        "base": base,
        "models": models,
        "adapters": adapters,
        "select": select,
        "vocabulary": vocabulary,
        "branches": branches,
        "layouts": layouts,
        "dtype": dtype,
        "max_shard_size": max_shard_size,
    }
    start = parse_grid(grid)[0]
    parsed = recipe_from(recipe, keys, parameters, defaults={parameter: start})
    with _progress(parameter) as on_progress:
        result = search(parsed, grid=grid, parameter=parameter, on_progress=on_progress, **options)
    report = write_search_report(options["out"])
    if as_json:
        print_json(result.model_dump(mode="json"))
        return
    print_search(result)
    click.echo(f"report: {report}")


def print_search(result: SearchResult) -> None:
    """Print the table of a search and its choice.

    Args:
        result: what the search found.
    """
    labelled = result.heldout is not None
    headers = [result.parameter, result.criterion, *(["accuracy"] if labelled else []), ""]
    rows = []
    for point in result.points:
        mark = "<- chosen" if point.alpha == result.selected else ""
        score = "-" if point.score is None else f"{point.score:g}"
        shown = [f"{point.accuracy:.3f}"] if labelled and point.accuracy is not None else []
        rows.append([f"{point.alpha:g}", score, *shown, mark])
    table(headers, rows, "rrr" if labelled else "rr")
    click.echo(
        f"chosen: {result.parameter} {result.selected:g}, by {result.criterion} on "
        f"{result.prompts.count} prompts without labels"
    )
    if labelled and result.heldout:
        click.echo(
            f"accuracy: on {result.heldout.count} labelled prompts, shown only; "
            "the choice never sees it"
        )
    for warning in result.diagnostics.warnings:
        click.echo(f"warning: {warning}")


@contextmanager
def _progress(parameter: str) -> Iterator[Callable[[float, int, int], None] | None]:
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Remaining())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("loading", total=None)
        yield lambda point, done, total: progress.update(
            task, description=f"{parameter} {point:g}", completed=done, total=total
        )

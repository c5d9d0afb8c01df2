"""`omnimerge search RECIPE --prompts FILE -o DIR`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from omnimerge.cli._console import (
    best_line,
    bootstrap_line,
    criterion_option,
    echo,
    force_option,
    json_option,
    parse_pairs,
    print_json,
    recipe_from,
    recipe_options,
    table,
)

if TYPE_CHECKING:
    from omnimerge.search import SearchResult

RECIPE_KEYS = (
    "method",
    "target",
    "base",
    "models",
    "adapters",
    "select",
    "vocabulary",
    "branches",
    "layouts",
    "dtype",
    "max_shard_size",
)
_EPILOG = """\b
Example:
  omnimerge search recipe.yaml --prompts prompts.jsonl -o search/

\b
A line of prompts.jsonl; paths are relative to the file:
  {"id": "1", "prompt": "What is written on the sign?", "image": "images/1.jpg"}
"""


def space_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say which coefficients are tried.

    Args:
        command: the click callback.

    Returns:
        The callback with the options.
    """
    for option in reversed(_SPACE_OPTIONS):
        command = option(command)
    return command


_SPACE_OPTIONS = (
    click.option(
        "--grid",
        multiple=True,
        default=("0:0.6:0.1",),
        show_default=True,
        help="start:stop:step, or 0,0.2,1; for another keyword density=0.2,0.5; for some tensors "
        "alpha@layers:0-13=0:0.6:0.2. Repeat it for more axes.",
    ),
    click.option("--shares", metavar="GRID", help="Search the share of each of several donors."),
    click.option("--parameter", default="alpha", show_default=True, help="Keyword of --grid."),
)


@click.command("search", epilog=_EPILOG)
@recipe_options
@space_options
@click.option(
    "--prompts", required=True, type=click.Path(path_type=Path), help="Prompts without labels."
)
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Result folder.")
@click.option("--refine", default=0, type=click.IntRange(0), help="Halve the step around the best.")
@click.option("--trials", type=click.IntRange(1), help="Try so many points, chosen by Optuna.")
@click.option(
    "--preset", type=click.Choice(["adamms", "adamms-qwen"]), help="Settings as published."
)
@click.option(
    "--sample", default=100, show_default=True, type=click.IntRange(1), help="Prompts to draw."
)
@criterion_option
@click.option(
    "--distance",
    default="exact",
    show_default=True,
    help="How answers are compared: exact, normalized, edit, embedding:PATH, or tokens.",
)
@click.option(
    "--per-step/--plain",
    "per_step",
    default=None,
    help="Divide distances by the step; default: where steps are not equal.",
)
@click.option("--max-new-tokens", default=32, show_default=True, type=click.IntRange(1))
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    help="The most prompts at once.  [default: 64; fewer where they are long]",
)
@click.option(
    "--heldout",
    type=click.Path(path_type=Path),
    help="Labelled prompts whose accuracy is shown beside; the choice never sees them.",
)
@click.option("--column", "columns", multiple=True, metavar="KEY=COLUMN", help="Of a data set.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--executor", default="local", show_default=True, type=click.Choice(["local", "ray"]))
@click.option("--checks/--no-checks", default=True, help="Noise floor, and the parents alone.")
@click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Run Python code that the target holds; the donor's is never run.",
)
@click.option("--seed", default=0, show_default=True, help="Of the draw of prompts.")
@click.option("--overwrite", is_flag=True, help="Throw away answers found in the folder.")
@force_option
@json_option
@click.pass_context
def command(
    context: click.Context,
    /,
    recipe: str | None,
    parameters: tuple[str, ...],
    as_json: bool,
    preset: str | None,
    columns: tuple[str, ...],
    **options: Any,
) -> None:
    """Find the merging coefficient without labels, in memory; no checkpoint is written.

    At every point of the grid the merged model answers the prompts; the point whose answers change
    least against its neighbours is chosen. A run that was stopped goes on where it was.
    """
    from omnimerge.report import write_search_report
    from omnimerge.search import search
    from omnimerge.search.planning import axes_of, load_varied

    keys = {key: options.pop(key) for key in RECIPE_KEYS}
    if preset:
        _apply_preset(context, preset, options)
    space = axes_of(options["grid"], options["shares"], options["parameter"])
    parsed = recipe_from(recipe, keys, parameters, load=partial(load_varied, space=space))
    with _progress() as on_progress:
        result = search(
            parsed,
            columns=parse_pairs(columns, "--column") or None,
            on_progress=on_progress,
            **options,
        )
    report = write_search_report(options["out"])
    if as_json:
        print_json(result.model_dump(mode="json"))
        return
    print_search(result)
    echo(f"recipe with the choice: {options['out'] / 'recipe.yaml'}")
    echo(f"report: {report}")


def _apply_preset(context: click.Context, name: str, options: dict[str, Any]) -> None:
    """Published settings, for whatever the command line does not say."""
    from omnimerge.search.criteria import PRESETS

    for key, value in PRESETS[name].items():
        if context.get_parameter_source(key) is click.core.ParameterSource.DEFAULT:
            options[key] = (value,) if key == "grid" else value


def print_search(result: SearchResult) -> None:
    """Print the table of a search and its choice.

    Args:
        result: what the search found.
    """
    from omnimerge.search.result import label

    labelled = result.heldout is not None
    names = [axis.name for axis in result.axes]
    headers = [*names, result.criterion, *(["accuracy"] if labelled else []), ""]
    rows = []
    for point in result.points:
        mark = "<- chosen" if point.values == result.selected else ""
        score = "-" if point.score is None else f"{point.score:g}"
        shown = [f"{point.accuracy:.3f}"] if labelled and point.accuracy is not None else []
        rows.append([*(f"{point.values[name]:g}" for name in names), score, *shown, mark])
    table(headers, rows, "r" * (len(names) + 1 + labelled))
    chosen = result.label if len(names) > 1 else f"{names[0]} {result.label}"
    compared = "" if result.distance == "exact" else f" with {result.distance} distance"
    echo(
        f"chosen: {chosen}, by {result.criterion}{compared} on {result.prompts.count} prompts "
        "without labels"
    )
    tied = [label(point) for point in result.tie_set]
    echo(best_line(tied))
    _print_checks(result)
    if labelled and result.heldout:
        echo(
            f"accuracy: on {result.heldout.count} labelled prompts, shown only; "
            "the choice never sees it"
        )
    for warning in result.diagnostics.warnings:
        echo(f"warning: {warning}")


def _print_checks(result: SearchResult) -> None:
    found = result.diagnostics
    if found.bootstrap:
        echo(bootstrap_line(found.bootstrap))
    if found.noise:
        echo(
            f"noise floor: {found.noise.differing} of {found.noise.prompts} answers differ when "
            "the chosen point is answered twice"
        )
    for note in found.notes:
        echo(f"note: {note}")


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None] | None]:
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
            task, description=point, completed=done, total=total
        )

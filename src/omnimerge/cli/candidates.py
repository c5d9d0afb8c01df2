"""`omnimerge candidates RECIPE --grid ... -o DIR`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from omnimerge.cli._console import echo, force_option, recipe_from, recipe_options
from omnimerge.cli.search import RECIPE_KEYS, space_options

if TYPE_CHECKING:
    from omnimerge.engine import MergePlan

_EPILOG = """\b
Example, with a harness of your own in between:
  omnimerge candidates recipe.yaml --grid 0:0.6:0.1 -o candidates/
  omnimerge select --logs results/ --pattern "alpha_{alpha}*.jsonl"
"""


@click.command("candidates", epilog=_EPILOG)
@recipe_options
@space_options
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder.")
@force_option
def command(
    recipe: str | None,
    parameters: tuple[str, ...],
    out: Path,
    force: tuple[str, ...],
    **options: Any,
) -> None:
    """Write the checkpoint of every point of a grid, for an evaluation elsewhere.

    What is there already is kept, so that a run that was stopped goes on.
    """
    from omnimerge.engine import run_plan
    from omnimerge.report import write_card
    from omnimerge.search.candidates import write_candidates
    from omnimerge.search.planning import axes_of, load_varied

    click.get_current_context().find_root().obj = {"again": "The same command goes on."}
    keys = {key: options.pop(key) for key in RECIPE_KEYS}
    space = axes_of(options["grid"], options["shares"], options["parameter"])
    parsed = recipe_from(recipe, keys, parameters, load=partial(load_varied, space=space))

    def merge(plan: MergePlan, folder: Path) -> None:
        run_plan(plan, folder, resume=True, finish=write_card)

    def told(point: str, written: bool) -> None:
        echo(f"{point}: {'written' if written else 'there already'}")

    found = write_candidates(parsed, out, merge, force=force, on_point=told, **options)
    echo(f"{len(found)} checkpoints in {out}; candidates.json says which is which")

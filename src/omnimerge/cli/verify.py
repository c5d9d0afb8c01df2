"""`omnimerge verify OUT`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from omnimerge.cli._console import echo, json_option, print_json

_EPILOG = """\b
Examples:
  omnimerge verify merged/
  omnimerge verify merged/ --deep --tensors 50
"""

_SHOWN = 5


@click.command("verify", epilog=_EPILOG)
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--deep", is_flag=True, help="Also compute merged tensors again, from the recipe.")
@click.option(
    "--tensors",
    default=20,
    show_default=True,
    type=click.IntRange(min=1),
    help="How many, with --deep.",
)
@click.option("--seed", default=0, show_default=True, help="Which ones, with --deep.")
@json_option
def command(out: Path, deep: bool, tensors: int, seed: int, as_json: bool) -> None:
    """Hold a merged checkpoint against its manifest, its target and its recipe.

    OUT was written by `merge`, `compose` or `extract-adapter`. Exits with 1 if something is wrong.
    What needs inputs that are not there is skipped, and said: run it in the folder where the merge
    ran.
    """
    from omnimerge.engine.verify import verify

    source = click.get_current_context().get_parameter_source
    for option in ("tensors", "seed"):
        if not deep and source(option) is not click.core.ParameterSource.DEFAULT:
            raise click.UsageError(f"--{option} is for --deep; give that too, or leave it out")
    checks = verify(out, deep=deep, tensors=tensors, seed=seed)
    if as_json:
        print_json({"out": str(out), "checks": [check.to_dict() for check in checks]})
    else:
        for check in checks:
            echo(f"{check.state:8}{check.name}")
            for detail in check.details[:_SHOWN]:
                echo(f"        {detail}")
            if len(check.details) > _SHOWN:
                echo(f"        and {len(check.details) - _SHOWN} more")
        echo(_summary([check.state for check in checks]))
    if any(check.state == "failed" for check in checks):
        raise click.exceptions.Exit(1)


def _summary(states: Sequence[str]) -> str:
    failed, skipped, number = states.count("failed"), states.count("skipped"), len(states)
    left = f"{skipped} of {number} checks skipped" if skipped else ""
    if failed:
        return f"{failed} of {number} checks failed" + (f", {left}" if left else "")
    if skipped:
        return f"nothing wrong in what was looked at; {left}"
    return f"all {number} checks passed"

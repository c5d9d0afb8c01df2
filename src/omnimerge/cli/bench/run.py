"""`omnimerge bench run`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from omnimerge.bench.grid import SCALES


@click.command("run", epilog="Example: omnimerge bench run internvl --methods all")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--methods", default="all", show_default=True, help="Names with commas, or all.")
@click.option(
    "--scales",
    default=",".join(map(str, SCALES)),
    show_default=True,
    help="What is tried for a method's scale; chosen on the validation split.",
)
@click.option("--keep", is_flag=True, help="Keep the merged checkpoints, under merged/.")
def command(folder: Path, methods: str, scales: str, keep: bool) -> None:
    """Merge the experts in FOLDER by every method and score the results.

    FOLDER is what `omnimerge bench build` wrote. A row that is there is not made again.
    """
    from omnimerge.bench import grid, lines, results, runner

    chosen, values = grid.choose_methods(methods), grid.read_scales(scales)
    places = runner.built_folders(folder)
    for place in places:  # all of them before the first one takes its minutes
        runner.check_built(lines.built(place), place)
    for place in places:
        built = results.read(results.Build, place / results.BUILD_NAME)
        click.echo(f"{place}: {built.line} {built.preset}", err=True)
        runner.run(
            lines.get(built.line),
            place,
            methods=chosen,
            scales=values,
            command=["omnimerge", *sys.argv[1:]],
            on_progress=lambda text: click.echo(f"  {text}", err=True),
            keep=keep,
        )
        click.echo(f"wrote {place / results.RESULTS_NAME}")

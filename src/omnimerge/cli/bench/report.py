"""`omnimerge bench report DIR...`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("report", epilog="Example: omnimerge bench report runs/internvl runs/qwen2vl")
@click.argument(
    "folders", metavar="DIR...", nargs=-1, required=True, type=click.Path(path_type=Path)
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The page.  [default: report.html in the first DIR]",
)
def command(folders: tuple[Path, ...], out: Path | None) -> None:
    """Make the HTML page of a benchmark: scores, scales, task vectors, experiments.

    Each DIR is what `omnimerge bench run`, `analyze` or `experiment` wrote to; seeds and lines may
    lie in folders of their own. The page is one file that needs no network and no JavaScript.
    """
    import omnimerge
    from omnimerge.bench.boards import find_boards
    from omnimerge.bench.page import dashboard
    from omnimerge.bench.scoreboard import scored_boards
    from omnimerge.report import write_dashboard

    first = folders[0] if folders[0].is_dir() else folders[0].parent
    boards = find_boards(folders, scored_boards(folders))
    page = dashboard(boards, version=omnimerge.__version__)
    click.echo(f"report: {write_dashboard(page, out or first / 'report.html')}")

"""`omnimerge report DIR`."""

from __future__ import annotations

from pathlib import Path

import click

from omnimerge.cli._console import echo


@click.command("report", epilog="Example: omnimerge report search/ -o report.html")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="The page.  [default: DIR/report.html]"
)
def command(folder: Path, out: Path | None) -> None:
    """Make the HTML page of a search: curve, guards, answers side by side, recipe, mapping.

    DIR is what `omnimerge search -o` wrote. The page is one file that needs no network.
    """
    from omnimerge.report import write_search_report

    echo(f"report: {write_search_report(folder, out)}")

"""`omnimerge clean PATH`."""

from __future__ import annotations

from pathlib import Path

import click

from omnimerge.cli._console import echo, size
from omnimerge.errors import OutputError


@click.command("clean", epilog="Example: omnimerge clean merged/")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--dry-run", is_flag=True, help="Say what is there, remove nothing.")
def command(path: Path, dry_run: bool) -> None:
    """Remove what interrupted merges left.

    PATH is the output of the merge, which need not exist, or a folder that holds outputs. An
    earlier output that was about to be replaced is put back, if nothing took its place.
    """
    from omnimerge.checkpoint.staging import clean, leftovers

    found, stuck = leftovers(path), []
    for each in found:
        kind = "an earlier output" if each.replaced else "an interrupted merge"
        kind = kind if each.folder.is_dir() else "the lock"
        more = ", can be resumed" if each.resumable and dry_run else ""
        try:
            done = "found" if dry_run else clean(each)
        except OutputError as error:  # the others can go
            stuck.append(str(error))
            continue
        echo(f"{done} {each.folder} ({kind} of {each.out}, {size(each.nbytes)}{more})")
    if stuck:
        raise OutputError("; ".join(stuck))
    if not found:
        echo(f"nothing was left of {path}, nor in it")

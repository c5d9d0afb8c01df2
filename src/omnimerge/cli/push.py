"""`omnimerge push OUT REPO`."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from omnimerge.cli._console import echo

_EPILOG = """\b
Examples:
  omnimerge push merged/ me/merged --private
  omnimerge merge recipe.yaml -o merged/ --push me/merged    # both at once
"""

private_option = click.option(
    "--private", is_flag=True, help="Create the repository private; refuse one that is public."
)


@click.command("push", epilog=_EPILOG)
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("repo")
@private_option
def command(out: Path, repo: str, private: bool) -> None:
    """Upload a merged checkpoint with its model card to the Hugging Face Hub.

    REPO is owner/name; it is created if there is none. Everything comes with one commit, which also
    removes the weight files of an earlier model there.
    """
    upload(out, repo, private)


def push_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add `--push` and `--private` to a command that writes a folder `out`.

    What cannot be pushed is refused before the command begins; the folder is complete before
    anything is pushed.

    Args:
        function: the command; it does not see the two options.

    Returns:
        The command that also pushes.
    """

    @click.option("--push", metavar="REPO", help="Then upload OUT to owner/name on the Hub.")
    @private_option
    @wraps(function)
    def command_and_push(push: str | None, private: bool, **options: Any) -> None:
        from omnimerge.checkpoint.hub import check_push

        if private and push is None:
            raise click.UsageError("--private is for --push REPO")
        if push is not None:
            check_push(push)
        function(**options)
        if push is not None:
            upload(options["out"], push, private)

    return command_and_push


def upload(out: Path, repo: str, private: bool) -> None:
    """Push, and say where to.

    Args:
        out: the folder of a merge.
        repo: ``owner/name``.
        private: create the repository private.
    """
    from omnimerge.checkpoint.hub import push, push_command

    again = f"The folder is complete; push it again with `{push_command(out, repo, private)}`."
    click.get_current_context().find_root().obj = {"again": again}
    echo(f"pushed to {push(out, repo, private=private)}")

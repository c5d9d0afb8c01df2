"""Groups of commands that are imported when called, so that `--help` never loads torch."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import click

from omnimerge.errors import suggestion


class LazyGroup(click.Group):
    """A group whose commands are one file each, with a `command` in it.

    Args:
        home: the package of the files.
        known: name of a command -> its help line, so that listing them imports none of them.
        **settings: as `click.Group` takes them.
    """

    def __init__(self, *, home: str, known: Mapping[str, str], **settings: Any) -> None:
        super().__init__(**settings)
        self._home = home
        self._known = known

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """List the names, in the order of the help page."""
        return list(self._known)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import a command; None if there is none of that name."""
        if cmd_name not in self._known:
            return None
        module = importlib.import_module(f"{self._home}.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that is called; suggest one for a name that is unknown."""
        name = args[0] if args else ""
        if name and not name.startswith("-") and name not in self._known:
            listed = ", ".join(self._known)
            raise click.UsageError(f"no command {name!r}{suggestion(name, self._known)}; {listed}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Write the help lines."""
        with formatter.section("Commands"):
            formatter.write_dl(list(self._known.items()))

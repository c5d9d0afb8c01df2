"""`omnimerge bench`: one file per command, imported when called."""

from __future__ import annotations

import importlib

import click

_COMMANDS = {
    "build": "Train a line: base, experts and the mixture-trained reference.",
    "run": "Merge the experts by every method and score the results.",
    "table": "Print the tables of one or several runs.",
    "report": "Make the HTML page of a benchmark.",
    "analyze": "Measure the task vectors of a recipe's models: norms, ranks, cosines.",
    "experiment": "Repeat a finding of the OptMerge paper on a line.",
    "published": "Print the published tables of OptMerge, AdaMMS and SWUDI.",
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"omnimerge.cli.bench.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group("bench", cls=_LazyGroup)
def command() -> None:
    """The miniature benchmark: five capabilities, and modalities towards one omni model."""

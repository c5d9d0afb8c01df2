"""`omnimerge bench`: one file per command, imported when called."""

from __future__ import annotations

import click

from omnimerge.cli._lazy import LazyGroup

_COMMANDS = {
    "build": "Train a line: base, experts and the mixture-trained reference.",
    "run": "Merge the experts by every method and score the results.",
    "table": "Print the tables of one or several runs.",
    "report": "Make the HTML page of a benchmark.",
    "analyze": "Measure the task vectors of a recipe's models: norms, ranks, cosines.",
    "experiment": "Repeat a finding of the OptMerge paper on a line.",
    "published": "Print the published tables of OptMerge, AdaMMS and SWUDI.",
}


@click.group("bench", cls=LazyGroup, home="omnimerge.cli.bench", known=_COMMANDS)
def command() -> None:
    """The miniature benchmark: five capabilities, and modalities towards one omni model."""

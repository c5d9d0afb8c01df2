"""`omnimerge zoo list|path|build`."""

from __future__ import annotations

from pathlib import Path

import click

from omnimerge.cli._console import table


@click.group("zoo")
def command() -> None:
    """The miniature models that come with omnimerge: small, and really trained."""


@command.command("list")
def list_models() -> None:
    """List the models."""
    from omnimerge.bench import zoo

    table(("name", "what"), [(name, zoo.describe(name)) for name in zoo.names()])


@command.command("path", epilog="Example: omnimerge inspect $(omnimerge zoo path mini-llm)")
@click.argument("name")
def path(name: str) -> None:
    """Print the folder of a model."""
    from omnimerge.bench import zoo

    click.echo(zoo.path(name))


@command.command("build")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="New folder.")
@click.option("--seed", default=0, show_default=True)
def build(out: Path, seed: int) -> None:
    """Train the models anew, into OUT; about 20 minutes on two cores."""
    from omnimerge.bench import zoo
    from omnimerge.checkpoint.writer import refuse_existing

    refuse_existing(out, overwrite=False)
    zoo.build(out, seed=seed, on_progress=lambda line: click.echo(line, err=True))
    click.echo(f"built {', '.join(zoo.names())} in {out}")

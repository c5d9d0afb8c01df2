"""`omnimerge bench build`."""

from __future__ import annotations

import sys
from pathlib import Path

import click


@click.command("build", epilog="Example: omnimerge bench build --line internvl -o internvl")
@click.option(
    "--line", "name", required=True, metavar="LINE", help="internvl, qwen2vl or modality."
)
@click.option("--preset", default="full", show_default=True, help="full or quick.")
@click.option("--seeds", default=1, show_default=True, type=click.IntRange(1), help="How many.")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder.")
def command(name: str, preset: str, seeds: int, out: Path) -> None:
    """Train a line into OUT, one folder per seed; what is there and complete is left alone."""
    from omnimerge.bench import builder, lines

    places = builder.build(
        lines.get(name),
        out,
        preset=preset,
        seeds=seeds,
        command=["omnimerge", *sys.argv[1:]],
        on_progress=lambda text: click.echo(text, err=True),
    )
    click.echo(f"built {name} {preset} in {', '.join(map(str, places))}")

"""`omnimerge bench experiment NAME DIR`."""

from __future__ import annotations

from pathlib import Path

import click

from omnimerge.bench import experiments

_LISTED = "\n".join(f"  {name:<14} {about}" for name, about in experiments.ABOUT.items())
_EPILOG = f"""\b
NAME:
{_LISTED}

Example: omnimerge bench experiment norm-growth runs/internvl/seed-0
"""


@click.command("experiment", epilog=_EPILOG)
@click.argument("name")
@click.argument("source", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The file to write.  [default: DIR/results/experiment-NAME.json]",
)
def command(name: str, source: Path, out: Path | None) -> None:
    """Repeat a finding of the OptMerge paper on a built line.

    DIR is one seed's folder of `omnimerge bench build`; for norm-growth and distributions also a
    recipe's YAML file. These two work on every line, the others on internvl and qwen2vl.
    `omnimerge bench report` shows the result.
    """
    result = experiments.run(name, source, lambda text: click.echo(text, err=True))
    default = source.parent if source.is_file() else source / "results"
    for sentence in result.outcome:
        click.echo(f"  {sentence}")
    click.echo(f"{name}: {result.write(out or default / f'experiment-{name}.json')}")

"""`omnimerge convert MERGEKIT.YML`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
import yaml

from omnimerge.cli._console import echo, echo_text
from omnimerge.errors import OutputError

if TYPE_CHECKING:
    from omnimerge.engine.mergekit import Converted

_EPILOG = """\b
Examples:
  omnimerge convert mergekit.yml
  omnimerge convert mergekit.yml --layers 32 -o recipe.yaml
"""


@click.command("convert", epilog=_EPILOG)
@click.argument("config", type=click.Path(dir_okay=False, path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), help="New file; default: print it.")
@click.option(
    "--layers",
    type=click.IntRange(min=1),
    help="Layers of the models; needed for gradients where the models are not local folders.",
)
def command(config: Path, out: Path | None, layers: int | None) -> None:
    """Print the recipe that computes what a mergekit configuration does.

    What has no equivalent is listed, all of it, and nothing is written. Comments in the recipe say
    what was left out and what stays different.
    """
    from omnimerge.engine.mergekit import convert_file

    text = _as_yaml(convert_file(config, layers=layers), config)
    if out is None:
        echo_text(text)
        return
    try:
        with out.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except OSError as error:
        raise OutputError(f"cannot write {out}: {error.strerror}; give another file") from error
    echo(f"wrote {out}; look at what it does with `omnimerge plan {out}`")


def _as_yaml(converted: Converted, config: Path) -> str:
    lines = [f"From {config.name}, a mergekit configuration.", *converted.notes]
    comments = "".join(f"# {line}\n" for line in lines)
    return comments + yaml.dump(
        converted.recipe, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100
    )


class _Dumper(yaml.SafeDumper):
    """Writes lists of numbers on one line, and no anchors."""

    def ignore_aliases(self, data: object) -> bool:  # noqa: ARG002
        return True


def _list(dumper: yaml.SafeDumper, values: list[object]) -> yaml.Node:
    flow = all(isinstance(value, (int, float)) for value in values)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=flow)


_Dumper.add_representer(list, _list)

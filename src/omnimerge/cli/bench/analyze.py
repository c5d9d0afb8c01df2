"""`omnimerge bench analyze RECIPE|DIR`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command("analyze", epilog="Example: omnimerge bench analyze recipe.yaml")
@click.argument("source", metavar="RECIPE|DIR", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The file to write.  [default: analysis.json, in DIR if one is given]",
)
@click.option(
    "--select",
    type=click.Choice(["all", "language_model", "linear"]),
    help="Which tensors.  [default: the recipe's, else linear]",
)
@click.option("--no-ranks", is_flag=True, help="Decompose no matrix: norms and cosines alone.")
def command(source: Path, out: Path | None, select: str | None, no_ranks: bool) -> None:
    """Measure the task vectors of a recipe's models: norms, ranks, cosines, distributions.

    The recipe names a base and models, full checkpoints or adapters; its method does not matter.
    DIR is one seed's folder of `omnimerge bench build`; of the modality line, the language models
    are measured. One tensor of all models is in memory at a time. `omnimerge bench report` shows
    the file.
    """
    from omnimerge.bench import lines
    from omnimerge.bench.analysis import analyze
    from omnimerge.cli._console import byte_progress

    recipe: Any = str(source)
    if source.is_dir():
        recipe = lines.built(source).task_vectors(source)
    with byte_progress("task vectors") as progress:
        found = analyze(recipe, select=select, spectra=not no_ranks, on_progress=progress)
    width = max(map(len, found.experts))
    for name, norm in zip(found.experts, found.norms, strict=True):
        share = f"{norm / found.base_norm:.2%} of the base's" if found.base_norm else ""
        click.echo(f"{name:<{width}}  norm {norm:.4g}  {share}")
    file = found.write(out or (source if source.is_dir() else Path()) / "analysis.json")
    click.echo(f"analysis: {file} ({found.tensors} tensors)")

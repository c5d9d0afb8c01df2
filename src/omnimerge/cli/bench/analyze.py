"""`omnimerge bench analyze RECIPE`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("analyze", epilog="Example: omnimerge bench analyze recipe.yaml -o analysis.json")
@click.argument("recipe", type=click.Path(dir_okay=False))
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("analysis.json"),
    show_default=True,
    help="The file to write.",
)
@click.option(
    "--select",
    type=click.Choice(["all", "language_model", "linear"]),
    help="Which tensors.  [default: the recipe's, else linear]",
)
@click.option("--no-ranks", is_flag=True, help="Decompose no matrix: norms and cosines alone.")
def command(recipe: str, out: Path, select: str | None, no_ranks: bool) -> None:
    """Measure the task vectors of a recipe's models: norms, ranks, cosines, distributions.

    The recipe names a base and models, full checkpoints or adapters; its method does not matter.
    One tensor of all models is in memory at a time. `omnimerge bench report` shows the file.
    """
    from omnimerge.bench.analysis import analyze
    from omnimerge.cli._console import byte_progress

    with byte_progress("task vectors") as progress:
        found = analyze(recipe, select=select, spectra=not no_ranks, on_progress=progress)
    width = max(map(len, found.experts))
    for name, norm in zip(found.experts, found.norms, strict=True):
        share = f"{norm / found.base_norm:.2%} of the base's" if found.base_norm else ""
        click.echo(f"{name:<{width}}  norm {norm:.4g}  {share}")
    click.echo(f"analysis: {found.write(out)} ({found.tensors} tensors)")

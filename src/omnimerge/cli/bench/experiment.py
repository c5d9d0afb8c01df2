"""`omnimerge bench experiment NAME DIR`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command(
    "experiment",
    epilog="Example: omnimerge bench experiment norm-growth runs/internvl/seed-0",
)
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

    NAME: norm-growth, ablation, rank-ratio, distributions or overtraining. DIR is one seed's folder
    of `omnimerge bench build`; for norm-growth and distributions also a recipe's YAML file.
    `omnimerge bench report` shows the result.
    """
    from omnimerge.bench import experiments

    module = experiments.get(name)
    if source.is_file() and name in experiments.RECIPE_ONLY:
        result = module.run(source)
    else:
        result = _on_a_line(name, module, source)
    default = source.parent if source.is_file() else source / "results"
    for sentence in result.outcome:
        click.echo(f"  {sentence}")
    click.echo(f"{name}: {result.write(out or default / f'experiment-{name}.json')}")


def _on_a_line(name: str, module: Any, folder: Path) -> Any:
    from omnimerge.bench import experiments, lines, results
    from omnimerge.bench.line import BenchError

    line = lines.built(folder)
    seed = results.read(results.Build, folder / results.BUILD_NAME).seed
    if name in experiments.RECIPE_ONLY:
        recipe = line.recipe(folder, "task_arithmetic", {})
        return module.run(recipe, line=line.name, seed=seed)
    tell = {"on_progress": lambda text: click.echo(text, err=True)}
    if name != "overtraining":
        return module.run(line, folder, seed=seed, **tell)
    trainer = getattr(line, "trainer", None)
    if trainer is None:
        raise BenchError(f"line {line.name} cannot train its experts for longer")
    return module.run(line, folder, trainer(folder), seed=seed, **tell)

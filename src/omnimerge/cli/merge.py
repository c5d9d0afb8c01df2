"""`omnimerge merge RECIPE -o OUT`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from omnimerge.cli._console import (
    byte_progress,
    force_option,
    recipe_from,
    recipe_options,
    show_adapter,
    size,
)

_EPILOG = """\b
Examples:
  omnimerge merge recipe.yaml -o merged/
  omnimerge merge --method adamms --target ./qwen2-vl --model ./llava-onevision \\
      --param alpha=0.3 -o merged/
  omnimerge merge --method optmerge --base ./qwen2-vl --adapter ./lora-ocr --adapter ./lora-chart \\
      --as-adapter 32 -o merged-lora/
"""


@click.command("merge", epilog=_EPILOG)
@recipe_options
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="New folder.")
@click.option("--seed", type=int, help="For methods that draw at random.")
@click.option("--overwrite", is_flag=True, help="Replace OUT, once the merge is complete.")
@click.option(
    "--as-adapter",
    metavar="RANK",
    type=click.IntRange(min=1),
    help="Write one PEFT adapter on the target, of this rank, instead of a checkpoint.",
)
@force_option
def command(
    recipe: str | None,
    parameters: tuple[str, ...],
    out: Path,
    overwrite: bool,
    as_adapter: int | None,
    force: tuple[str, ...],
    **options: Any,
) -> None:
    """Merge checkpoints into one that transformers loads.

    RECIPE is a YAML file; options replace its keys, or stand for a recipe of their own.
    """
    import omnimerge

    start = time.perf_counter()
    parsed = recipe_from(recipe, options, parameters)
    if as_adapter:
        with byte_progress("merging") as on_progress:
            summary = omnimerge.merge_as_adapter(
                parsed, out, as_adapter, overwrite=overwrite, force=force, on_progress=on_progress
            )
        show_adapter(summary, out)
        return
    with byte_progress("merging") as on_progress:
        plan = omnimerge.merge(
            parsed, out, overwrite=overwrite, force=force, on_progress=on_progress
        )
    elapsed = time.perf_counter() - start
    kept = len(plan.jobs) - len(plan.merged)
    shown = ", ".join(f"{key} {value}" for key, value in plan.recipe.all_parameters.items())
    click.echo(f"{plan.method.name}{f' ({shown})' if shown else ''} -> {out}")
    click.echo(f"merged {len(plan.merged)} tensors, kept {kept} of the target's:")
    for reason, count in plan.kept_reasons().items():
        click.echo(f"  {count:5}  {reason}")
    click.echo(f"wrote {size(plan.bytes_to_write)} in {elapsed:.1f} s")

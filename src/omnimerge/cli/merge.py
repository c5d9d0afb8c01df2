"""`omnimerge merge RECIPE -o OUT`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from omnimerge.cli._console import (
    byte_progress,
    bytes_from,
    force_option,
    memory_option,
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
  omnimerge merge recipe.yaml -o merged/ --resume     # after Ctrl-C, kill -9, a loss of power
  omnimerge merge --method optmerge --base ./qwen2-vl --adapter ./lora-ocr --adapter ./lora-chart \\
      --as-adapter 32 -o merged-lora/
"""


@click.command("merge", epilog=_EPILOG)
@recipe_options
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="New folder.")
@click.option("--seed", type=int, help="For methods that draw at random.")
@click.option("--overwrite", is_flag=True, help="Replace OUT, once the merge is complete.")
@click.option("--resume", is_flag=True, help="Go on with a merge that was interrupted.")
@memory_option
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
    resume: bool,
    memory: str,
    as_adapter: int | None,
    force: tuple[str, ...],
    **options: Any,
) -> None:
    """Merge checkpoints into one that transformers loads.

    RECIPE is a YAML file; options replace its keys, or stand for a recipe of their own.
    """
    import omnimerge

    if as_adapter and resume:
        raise click.UsageError("--as-adapter cannot be resumed; leave one of them out")
    bound = bytes_from("--memory", memory)
    click.get_current_context().find_root().obj = {"out": out}
    start = time.perf_counter()
    parsed = recipe_from(recipe, options, parameters)
    if as_adapter:
        with byte_progress("merging") as on_progress:
            summary = omnimerge.merge_as_adapter(
                parsed, out, as_adapter, overwrite=overwrite, force=force, on_progress=on_progress
            )
        show_adapter(summary, out)
        return
    there: list[int] = []
    with byte_progress("merging") as show:

        def on_progress(done: int, total: int) -> None:
            there.append(done) if not there else None
            if show:
                show(done, total)

        plan = omnimerge.merge(
            parsed,
            out,
            overwrite=overwrite,
            resume=resume,
            memory=bound,
            force=force,
            on_progress=on_progress,
        )
    if there[0] == plan.bytes_to_write:
        click.echo(f"{out} is complete already")
        return
    elapsed = time.perf_counter() - start
    kept = len(plan.jobs) - len(plan.merged)
    shown = ", ".join(f"{key} {value}" for key, value in plan.recipe.all_parameters.items())
    click.echo(f"{plan.method.name}{f' ({shown})' if shown else ''} -> {out}")
    click.echo(f"merged {len(plan.merged)} tensors, kept {kept} of the target's:")
    for reason, count in plan.kept_reasons().items():
        click.echo(f"  {count:5}  {reason}")
    before = f", {size(there[0])} of it before" if there[0] else ""
    click.echo(f"wrote {size(plan.bytes_to_write)}{before} in {elapsed:.1f} s")

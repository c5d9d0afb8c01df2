"""`omnimerge merge RECIPE -o OUT`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from omnimerge.cli._console import (
    byte_progress,
    bytes_from,
    device_option,
    echo,
    force_option,
    memory_option,
    recipe_from,
    recipe_options,
    show_adapter,
    size,
)
from omnimerge.cli.push import push_options

_EPILOG = """\b
Examples:
  omnimerge merge recipe.yaml -o merged/
  omnimerge merge --method adamms --target ./qwen2-vl --model ./llava-onevision \\
      --param alpha=0.3 -o merged/
  omnimerge merge recipe.yaml -o merged/ --resume     # after Ctrl-C, kill -9, a loss of power
  omnimerge merge recipe.yaml -o merged/ --device cuda
  omnimerge merge recipe.yaml -o /shared/merged/ --executor ray --address auto
  omnimerge merge recipe.yaml -o merged/ --push me/merged --private
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
@device_option
@click.option(
    "--executor",
    default="local",
    show_default=True,
    type=click.Choice(["local", "ray"]),
    help="Threads of this process, or the machines of a Ray cluster.",
)
@click.option(
    "--address",
    metavar="ADDRESS",
    help="Of the Ray cluster; auto: the one that this machine is part of.",
)
@click.option(
    "--as-adapter",
    metavar="RANK",
    type=click.IntRange(min=1),
    help="Write one PEFT adapter on the target, of this rank, instead of a checkpoint.",
)
@force_option
@push_options
def command(
    recipe: str | None,
    parameters: tuple[str, ...],
    out: Path,
    overwrite: bool,
    resume: bool,
    memory: str,
    device: str,
    executor: str,
    address: str | None,
    as_adapter: int | None,
    force: tuple[str, ...],
    **options: Any,
) -> None:
    """Merge checkpoints into one that transformers loads.

    RECIPE is a YAML file; options replace its keys, or stand for a recipe of their own.
    """
    import omnimerge
    from omnimerge.checkpoint.staging import left_of

    if as_adapter and resume:
        raise click.UsageError("--as-adapter cannot be resumed; leave one of them out")
    bound = bytes_from("--memory", memory)
    _check_executor(executor, address, as_adapter)
    device = _check_device(device, executor, as_adapter)
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
            device=device,
            executor=executor,
            address=address,
            force=force,
            on_progress=on_progress,
        )
    if there[0] == plan.bytes_to_write:
        echo(f"{out} is complete already")
        for each in left_of(out):
            echo(
                f"{each.folder} is of another merge: go on with that one by --overwrite --resume, "
                f"or remove it with `omnimerge clean {out}`"
            )
        return
    elapsed = time.perf_counter() - start
    kept = len(plan.jobs) - len(plan.merged)
    shown = ", ".join(f"{key} {value}" for key, value in plan.recipe.all_parameters.items())
    echo(f"{plan.method.name}{f' ({shown})' if shown else ''} -> {out}")
    echo(f"merged {len(plan.merged)} tensors, kept {kept} of the target's{':' if kept else ''}")
    for reason, count in plan.kept_reasons().items():
        echo(f"  {count:5}  {reason}")
    before = f", {size(there[0])} of it before" if there[0] else ""
    echo(f"wrote {size(plan.bytes_to_write)}{before} in {elapsed:.1f} s")
    for each in filter(lambda left: left.replaced, left_of(out)):
        echo(f"{each.folder}, the earlier output, could not be removed; `omnimerge clean {out}`")


def _check_executor(executor: str, address: str | None, as_adapter: int | None) -> None:
    """Refuse options that would have no effect."""
    source = click.get_current_context().get_parameter_source("memory")
    bounded = source is not click.core.ParameterSource.DEFAULT
    if executor == "local" and address is not None:
        raise click.UsageError("--address is for --executor ray; leave it out, or give that too")
    if address is not None and not address.strip():
        raise click.UsageError("--address is empty; give auto or host:port, or leave it out")
    if executor == "ray" and as_adapter:
        raise click.UsageError("--as-adapter runs on this machine; leave --executor out")
    if as_adapter and bounded:
        raise click.UsageError(
            "--as-adapter takes tensors whole, one at a time; leave --memory out"
        )
    if executor == "ray" and bounded:
        raise click.UsageError(
            "--memory bounds one process; with --executor ray, give every machine's memory to "
            "`ray start --memory`"
        )


def _check_device(device: str, executor: str, as_adapter: int | None) -> str:
    """Refuse a device that is not there, before anything is read; say what `auto` stands for."""
    if device == "cpu":
        return device
    if as_adapter:
        raise click.UsageError("--as-adapter merges on the CPU; leave --device out")
    from omnimerge.engine.devices import check_executor, describe_device, devices_named

    check_executor(device, executor)
    found = devices_named(device)
    if device == "auto":
        shown = ", ".join(f"{each} ({describe_device(each)})" for each in found)
        echo(f"device auto: {shown or 'cpu; torch finds no CUDA GPU'}", err=True)
    return ",".join(found) or "cpu"

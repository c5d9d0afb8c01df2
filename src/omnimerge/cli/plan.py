"""`omnimerge plan RECIPE`."""

from __future__ import annotations

from typing import Any

import click

from omnimerge.cli._console import (
    bytes_from,
    echo,
    force_option,
    json_option,
    memory_option,
    print_json,
    recipe_from,
    recipe_options,
    size,
    table,
)

_EPILOG = """\b
A recipe:
  method: adamms
  target: ./qwen2-vl
  models: [./llava-onevision]
  parameters: {alpha: 0.3}
"""


@click.command("plan", epilog=_EPILOG)
@recipe_options
@memory_option
@force_option
@json_option
def command(
    recipe: str | None,
    parameters: tuple[str, ...],
    force: tuple[str, ...],
    as_json: bool,
    memory: str,
    **options: Any,
) -> None:
    """Show what a merge would do. Reads headers only; what looks at weights runs when merging."""
    import omnimerge

    bound = bytes_from("--memory", memory)
    plan = omnimerge.plan(recipe_from(recipe, options, parameters), force=force)
    if as_json:
        print_json(plan.to_dict())
        return
    echo(f"{plan.method.name}  {plan.recipe.all_parameters or ''}".rstrip())
    echo(f"target  {plan.target.folder}")
    for model in plan.models:
        echo(f"model   {model.location}")
    if plan.base:
        echo(f"base    {plan.base.folder}")
    peak = max(plan.largest, min(bound, plan.peak_memory))
    rows = [("merged", len(plan.merged), plan.method.name)]
    rows += [("kept", count, why) for why, count in plan.kept_reasons().items()]
    table(("tensors", "count", "why"), rows, "lrl")
    echo(
        f"reads {size(plan.bytes_to_read)}, writes {size(plan.bytes_to_write)} in "
        f"{len(plan.shards)} file(s), buffers up to {size(peak)}"
    )
    needs = f"the largest needs {size(plan.largest)}"
    beyond = f"more than --memory {memory}; such ones run alone"
    if plan.whole_matrices:
        more = f", {beyond}" if plan.largest > bound else ""
        echo(f"{plan.method.name} takes matrices whole: {needs}{more}")
    elif plan.largest > bound:
        echo(f"of the slices that {plan.method.name} takes, {needs}, {beyond}")

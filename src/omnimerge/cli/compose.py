"""`omnimerge compose RECIPE -o OUT`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from omnimerge.cli._console import (
    byte_progress,
    echo,
    force_option,
    json_option,
    parse_parameters,
    print_json,
    size,
    table,
)

_EPILOG = """\b
Example of a recipe:
  method: task_arithmetic          # any of `omnimerge methods`
  base: ./vicuna                   # the LLM that task vectors are taken from
  models:
    - {model: ./llava, provides: image}
    - {model: ./qwen2-audio}       # provides what it offers
    - {model: ./video-llava, provides: video, adapter: ./lora}
  parameters: {scale: 0.3}

\b
Examples:
  omnimerge compose recipe.yaml -o omni/
  omnimerge compose recipe.yaml --method ties --param scale=0.5 -o omni/
"""


@click.command("compose", epilog=_EPILOG)
@click.argument("recipe", type=click.Path(dir_okay=False))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="New folder.")
@click.option("--method", help="Merge method, instead of the recipe's.")
@click.option("--param", "parameters", multiple=True, help="Keyword of the method: scale=0.3.")
@click.option("--dtype", type=click.Choice(["auto", "float32", "float16", "bfloat16"]))
@click.option("--max-shard-size", help="For example 5GB.")
@click.option("--overwrite", is_flag=True, help="Replace OUT, once the new model is complete.")
@force_option
@json_option
def command(
    recipe: str,
    out: Path,
    parameters: tuple[str, ...],
    overwrite: bool,
    force: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Compose MLLMs of several modalities over one LLM into one model.

    RECIPE is a YAML file. Each tower and projector is kept with its own placeholder tokens; the
    language models are merged. `import omnimerge` tells transformers of such models.
    """
    from omnimerge.compose import compose, load_recipe

    click.get_current_context().find_root().obj = {"out": out}
    start = time.perf_counter()
    given = {key: value for key, value in options.items() if value is not None}
    parsed = load_recipe(recipe, replace=given, parameters=parse_parameters(parameters))
    with byte_progress("composing") as on_progress:
        plan = compose(parsed, out, overwrite=overwrite, force=force, on_progress=on_progress)
    elapsed = time.perf_counter() - start
    found = plan.to_dict()
    if as_json:
        print_json({**found, "out": str(out), "seconds": round(elapsed, 3)})
        return
    _show(found, out)
    echo(f"wrote {size(found['bytes_to_write'])} in {elapsed:.1f} s")


def _show(found: dict[str, Any], out: Path) -> None:
    shown = ", ".join(f"{key} {value}" for key, value in found["parameters"].items())
    echo(f"{found['method']}{f' ({shown})' if shown else ''} -> {out}")
    rows = [
        (
            name,
            part["model_type"],
            part["model"],
            " ".join(part["placeholders"].values()),
            part["tensors"],
            size(part["bytes"]),
        )
        for name, part in found["parts"].items()
    ]
    table(("part", "type", "model", "placeholder", "tensors", "size"), rows, "llllrr")
    llm = found["language_model"]
    echo(f"language model: merged {llm['merged']} tensors, kept {llm['kept']} of the target's")
    for reason, count in llm["kept_reasons"].items():
        echo(f"  {count:5}  {reason}")
    for model, reasons in found["unused"].items():
        echo(f"not used of {model}:")
        for reason, count in reasons.items():
            echo(f"  {count:5}  {reason}")

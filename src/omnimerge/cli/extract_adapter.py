"""`omnimerge extract-adapter BASE MODEL -o OUT`."""

from __future__ import annotations

from pathlib import Path

import click

from omnimerge.cli._console import layout_option, show_adapter

_EPILOG = """\b
Examples:
  omnimerge extract-adapter ./qwen2-vl ./qwen2-vl-ocr -o ocr-lora/ --rank 32
  omnimerge extract-adapter ./qwen2-vl ./qwen2-vl-ocr -o ocr-lora/ --energy 0.99
"""


@click.command("extract-adapter", epilog=_EPILOG)
@click.argument("base")
@click.argument("model")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="New folder.")
@click.option("--rank", type=click.IntRange(min=1), help="Largest rank of a matrix.")
@click.option(
    "--energy",
    type=click.FloatRange(0, 1, min_open=True),
    help="Share of the squared change of every matrix that stays: the rank follows.",
)
@click.option(
    "--select",
    type=click.Choice(["all", "language_model", "linear"]),
    default="all",
    show_default=True,
    help="Which tensors are compared.",
)
@layout_option
@click.option("--overwrite", is_flag=True, help="Replace OUT, once the adapter is complete.")
def command(
    base: str,
    model: str,
    out: Path,
    rank: int | None,
    energy: float | None,
    select: str,
    layouts: tuple[str, ...],
    overwrite: bool,
) -> None:
    """Write what makes MODEL differ from BASE as a PEFT LoRA adapter on BASE."""
    import omnimerge
    from omnimerge.report import write_card

    if (rank is None) == (energy is None):
        raise click.UsageError("give either --rank or --energy")
    click.get_current_context().find_root().obj = {"out": out}
    summary = omnimerge.extract_adapter(
        base,
        model,
        out,
        rank=rank,
        energy=energy,
        select=select,
        layouts=layouts,
        overwrite=overwrite,
        finish=write_card,
    )
    show_adapter(summary, out)

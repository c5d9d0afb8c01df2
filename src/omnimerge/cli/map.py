"""`omnimerge map TARGET DONOR`."""

from __future__ import annotations

from collections import Counter
from typing import Any

import click

from omnimerge.cli._console import force_option, json_option, print_json, table


@click.command("map", epilog="Example: omnimerge map ./qwen2-vl ./llava-onevision")
@click.argument("target")
@click.argument("donor")
@click.option(
    "--select",
    type=click.Choice(["all", "language_model", "linear"]),
    default="language_model",
    show_default=True,
    help="Which target tensors may be merged.",
)
@click.option("--vocabulary", type=click.Choice(["auto", "target"]), default="auto")
@force_option
@json_option
def command(
    target: str, donor: str, select: str, vocabulary: str, force: tuple[str, ...], as_json: bool
) -> None:
    """Show what of DONOR goes where in TARGET, and whether the two may be merged.

    Every target tensor is merged, or kept with a reason; every donor tensor is used, or unused
    with a reason.
    """
    import omnimerge

    alignment = omnimerge.align(target, donor, select=select, vocabulary=vocabulary)
    result = alignment.to_dict(force)
    if as_json:
        print_json(result)
        return
    click.echo(f"target  {target}  ({alignment.target_slots.layout.name})")
    click.echo(f"donor   {donor}  ({alignment.donor_slots.layout.name})")
    _print(result)


def _print(result: dict[str, Any]) -> None:
    rows = [("merged", len(result["merged"]), "from the donor")]
    rows += [("kept", n, why) for why, n in _by_reason(result["kept"])]
    rows += [("unused", n, why) for why, n in _by_reason(result["unused"])]
    table(("tensors", "count", "why"), rows, "lrl")
    if (found := result["ancestor"]) and found["sampled"]:
        click.echo(
            f"ancestor: median cosine {found['cosine_median']:.3f}, lowest "
            f"{found['cosine_min']:.3f}, of {found['sampled']} matrices"
        )
    for note in result["notes"]:
        click.echo(f"note: {note}")
    if result["mergeable"]:
        click.echo("mergeable: yes")
    for reason in result["reasons"]:
        click.echo(f"mergeable: no, {reason}")


def _by_reason(entries: list[dict[str, str]]) -> list[tuple[str, int]]:
    return Counter(entry["reason"] for entry in entries).most_common()

"""`omnimerge map TARGET DONOR`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import click

from omnimerge.cli._console import (
    VOCABULARIES,
    branch_option,
    echo,
    force_option,
    json_option,
    layout_option,
    parse_pairs,
    print_json,
    table,
)
from omnimerge.errors import OutputError


@click.command("map", epilog="Example: omnimerge map ./qwen2-vl ./llava-onevision --html map.html")
@click.argument("target")
@click.argument("donor")
@click.option(
    "--select",
    type=click.Choice(["all", "language_model", "linear"]),
    default="language_model",
    show_default=True,
    help="Which target tensors may be merged.",
)
@click.option("--vocabulary", type=click.Choice(VOCABULARIES), default="auto", show_default=True)
@branch_option
@layout_option
@click.option("--html", type=click.Path(path_type=Path), help="Draw it into this file.")
@force_option
@json_option
def command(
    target: str,
    donor: str,
    force: tuple[str, ...],
    html: Path | None,
    as_json: bool,
    branches: tuple[str, ...],
    **options: Any,
) -> None:
    """Show what of DONOR goes where in TARGET, and whether the two may be merged.

    Every target tensor is merged, or kept with a reason; every donor tensor is used, or unused
    with a reason.
    """
    import omnimerge

    policy = parse_pairs(branches, "--branch") or None
    result = omnimerge.align(target, donor, branches=policy, **options).to_dict(force)
    if html:
        _draw(result, html)
    if as_json:
        print_json(result)
    else:
        _print(result, target, donor)
        if html:
            echo(f"picture: {html}")


def _draw(result: dict[str, Any], file: Path) -> None:
    from omnimerge.report import write_mapping_report

    try:
        write_mapping_report(result, file)
    except OSError as error:
        raise OutputError(f"cannot write {file}: {error.strerror}") from error


def _print(result: dict[str, Any], target: str, donor: str) -> None:
    for role, path in (("target", target), ("donor", donor)):
        found = result[role]
        echo(f"{role:7} {path}  {found['tensors']:,} tensors, layout {found['layout']}")
    rows = [("merged", len(result["merged"]), "from the donor")]
    rows += [("kept", n, why) for why, n in _by_reason(result["kept"])]
    rows += [("unused", n, why) for why, n in _by_reason(result["unused"])]
    table(("tensors", "count", "why"), rows, "lrl")
    _print_slots(result)
    differences = [(each["kind"], each["detail"]) for each in result["heterogeneity"]]
    if differences:
        table(("they differ in", ""), differences)
    if (found := result["ancestor"]) and found["sampled"]:
        echo(
            f"ancestor: median cosine {found['cosine_median']:.3f}, lowest "
            f"{found['cosine_min']:.3f}, of {found['sampled']} matrices"
        )
    for note in result["notes"]:
        echo(f"note: {note}")
    if result["mergeable"]:
        echo("mergeable: yes")
    for reason in result["reasons"]:
        echo(f"mergeable: no, {reason}")


def _print_slots(result: dict[str, Any]) -> None:
    """The language model slot by slot, the other components as a whole."""
    from omnimerge.report import component_rows, slot_rows

    rows = []
    for row in slot_rows(result):
        name = row.slot + (f"@{row.lane}" if row.lane else "")
        for route in row.routes:
            how = route.op if route.state in ("merged", "rearranged") else route.state
            told = f"{how}, {route.rule}" if route.rule else how
            source = " + ".join(_short(each) for each in route.sources)
            rows.append((name, route.where or "-", source or "-", told))
    table(("language model", "layers", "the donor's", "how"), rows)
    parts = [
        (row.label, sum(row.target.values()), sum(row.donor.values()), "; ".join(row.reasons))
        for row in component_rows(result)
    ]
    if parts:
        table(("other parts", "target", "donor", "why"), parts, "lrrl")


def _short(pattern: str) -> str:
    """A name inside a layer without the way to the layer."""
    return pattern.rpartition("{i}.")[2]


def _by_reason(entries: list[dict[str, str]]) -> list[tuple[str, int]]:
    return Counter(entry["reason"] for entry in entries).most_common()

"""`omnimerge bench table`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from omnimerge.cli._console import json_option, print_json, table


@click.command("table", epilog="Example: omnimerge bench table internvl qwen2vl --markdown")
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@json_option
@click.option("--markdown", is_flag=True, help="Print Markdown.")
def command(folders: tuple[Path, ...], as_json: bool, markdown: bool) -> None:
    """Print one table per line: mean ± deviation over seeds, the best method of a column with *."""
    from omnimerge.bench import tables

    made = tables.make_tables([each for path in folders for each in tables.read_results(path)])
    if as_json:
        print_json([_plain(asdict(one)) for one in made])
        return
    for one in made:
        click.echo(f"{one.line}, {one.preset}, seeds {', '.join(map(str, one.seeds))}\n")
        if markdown:
            click.echo(tables.markdown(one) + "\n")
            continue
        header = tables.header(one)
        rows = [[cell.replace(" ± ", "±") for cell in row] for row in tables.body(one)]
        table(header, rows, "l" + "r" * (len(header) - 1), width=160)
        if missing := tables.refused(one):
            click.echo("not run:")
            table(("method", "reason"), missing)


def _plain(value: object) -> object:
    """Turn sets into sorted lists, which JSON has no sets for."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return sorted(value) if isinstance(value, (set, frozenset)) else value

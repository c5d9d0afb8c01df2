"""`omnimerge bench published [TABLE]`."""

from __future__ import annotations

from pathlib import Path

import click

from omnimerge.cli._console import json_option, print_json, table

_EPILOG = """\b
Examples:
  omnimerge bench published
  omnimerge bench published optmerge-2
  omnimerge bench published optmerge-3 --against results.json
  omnimerge bench published optmerge-3 --against merged=eval/x_results.json --markdown
"""


@click.command("published", epilog=_EPILOG)
@click.argument("name", metavar="[TABLE]", required=False)
@click.option(
    "--against",
    multiple=True,
    metavar="[METHOD=]FILE",
    help="Your own numbers, to be shown beside the published ones; repeat it.",
)
@json_option
@click.option("--markdown", "as_markdown", is_flag=True, help="Print Markdown.")
def command(name: str | None, against: tuple[str, ...], as_json: bool, as_markdown: bool) -> None:
    """Print what AdaMMS, OptMerge and SWUDI report: the list of tables, or one of them.

    Known errors are marked, each with a footnote. Results of yours are JSON or CSV of method,
    column and value, or what lmms-eval and VLMEvalKit write.
    """
    from omnimerge.bench.published import compare, render, tables

    if as_json and as_markdown:
        raise click.UsageError("--json and --markdown exclude each other")
    if name is None:
        if against:
            raise click.UsageError(
                "--against needs a table; `omnimerge bench published` lists them"
            )
        _list(as_json, as_markdown)
        return
    chosen = tables.table(name)
    comparison = compare.compare(chosen, _read(against)) if against else None
    if as_json:
        print_json(render.as_dict(name, chosen, comparison))
    else:
        draw = render.markdown if as_markdown else render.text
        click.echo(draw(chosen, comparison))


def _list(as_json: bool, as_markdown: bool) -> None:
    from omnimerge.bench.published import tables

    known = [(name, tables.table(name)) for name in tables.names()]
    rows = [(name, entry.where, entry.title) for name, entry in known]
    if as_json:
        print_json([dict(zip(("name", "where", "title"), row, strict=True)) for row in rows])
    elif as_markdown:
        click.echo("| table | in the paper | what |\n|---|---|---|")
        for row in rows:
            click.echo(f"| {' | '.join(row)} |")
    else:
        table(("table", "in the paper", "what"), rows)


def _read(against: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Read all files; columns of one method may come from several."""
    from omnimerge.bench.published.harnesses import ResultsError
    from omnimerge.bench.published.results import read_results

    found: dict[str, dict[str, float]] = {}
    for given in against:
        method, equals, path = given.rpartition("=")
        if equals and Path(given).is_file():  # a file whose name has an equals sign
            method, path = "", given
        told = read_results(Path(path), method or None, warn=_warn)
        for key, values in told.items():
            row = found.setdefault(key, {})
            if twice := sorted(set(row) & set(values)):
                raise ResultsError(f"{path}: {key}: {twice[0]} is in another file too")
            row |= values
    return found


def _warn(text: str) -> None:
    click.echo(f"warning: {text}", err=True)

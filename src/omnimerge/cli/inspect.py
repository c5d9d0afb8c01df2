"""`omnimerge inspect PATH`."""

from __future__ import annotations

from typing import Any

import click

from omnimerge.cli._console import echo, json_option, layout_option, print_json, size, table


@click.command("inspect", epilog="Example: omnimerge inspect ./qwen2-vl")
@click.argument("path")
@layout_option
@json_option
def command(path: str, layouts: tuple[str, ...], as_json: bool) -> None:
    """Show what a checkpoint is, from its headers: components, geometry, dtype, size."""
    import omnimerge

    summary = omnimerge.inspect(path, layouts=layouts)
    if as_json:
        print_json(summary)
        return
    _print(summary)


def _print(summary: dict[str, Any]) -> None:
    echo(f"{summary['path']}")
    echo(f"model type  {summary['model_type']}   layout  {summary['layout'] or 'unknown'}")
    dtypes = ", ".join(f"{dtype} ({count})" for dtype, count in summary["dtypes"].items())
    files = len(summary["files"])
    echo(f"weights     {size(summary['bytes'])} in {files} file(s), {dtypes}")
    rows = [
        (name, entry["tensors"], f"{entry['parameters']:,}", size(entry["bytes"]))
        for name, entry in summary["components"].items()
    ]
    rows.append(("total", summary["tensors"], f"{summary['parameters']:,}", size(summary["bytes"])))
    table(("component", "tensors", "parameters", "bytes"), rows, "lrrr")
    if summary["llm"]:
        shown = {k: v for k, v in summary["llm"].items() if v is not None}
        echo("llm  " + "  ".join(f"{key} {value}" for key, value in shown.items()))
    if summary["note"]:
        echo(f"note: {summary['note']}")

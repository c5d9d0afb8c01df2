"""`omnimerge layout CHECKPOINT`."""

from __future__ import annotations

from pathlib import Path

import click

from omnimerge.cli._console import echo, echo_text, layout_option
from omnimerge.errors import OutputError, UnknownLayoutError

_EPILOG = """\b
Examples:
  omnimerge layout ./qwen2-vl
  omnimerge layout ./newfamily --like ./sibling -o newfamily.yaml
"""


@click.command("layout", epilog=_EPILOG)
@click.argument("checkpoint")
@click.option("--like", help="A model over the same LLM, to decide what names leave open.")
@click.option("--infer", is_flag=True, help="Infer it although a table fits.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Write the file, not to stdout.")
@layout_option
def command(
    checkpoint: str, like: str | None, infer: bool, out: Path | None, layouts: tuple[str, ...]
) -> None:
    """Show how CHECKPOINT names its language model, as a file to read, correct and give back.

    Where no table fits, the layout is inferred from names, shapes and, with --like, from the cosine
    with another model. What stays open is marked UNDECIDED.
    """
    from omnimerge.arch import infer_layout, layout_text, read_all_layouts, slots_of
    from omnimerge.checkpoint import Checkpoint

    extra = read_all_layouts(layouts)
    opened = Checkpoint.open(checkpoint)
    other = Checkpoint.open(like) if like else None
    if out is not None and out.exists():
        raise OutputError(f"{out} exists, perhaps with your corrections; give another name")
    open_choices = 0
    try:
        if infer:
            raise UnknownLayoutError(checkpoint)
        text = layout_text(slots_of(opened, extra).layout)
    except UnknownLayoutError:
        inferred = infer_layout(opened, other, layouts=extra)
        text, open_choices = inferred.text, len(inferred.open_choices())
    if out is None:
        echo_text(text)
    else:
        try:
            out.write_text(text, encoding="utf-8")
        except OSError as error:
            raise OutputError(f"cannot write {out}: {error.strerror}") from error
        echo(f"layout -> {out}")
    if open_choices:
        hint = "" if like else "; --like OTHER may decide them"
        echo(f"{open_choices} lines are UNDECIDED: fill them in{hint}", err=True)

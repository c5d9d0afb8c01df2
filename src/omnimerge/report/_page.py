"""What the pages of this room have in common: how a template is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template


def template(name: str, **filters: Callable[..., Any]) -> Template:
    """Return one of this room's templates.

    Args:
        name: its file's name.
        **filters: what it filters by, beside what Jinja has.

    Returns:
        The template, ready to be rendered.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,  # paths, names and answers come from models and strangers
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters)
    return environment.get_template(name)

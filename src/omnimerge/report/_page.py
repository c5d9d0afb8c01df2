"""What the pages of this room have in common: how a template is read."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

_ACTING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(value: Any) -> Any:
    r"""Write out the characters of a text that would change what stands beside it on the page.

    Args:
        value: a text; anything else, and what is HTML already, stays as it is.

    Returns:
        The text with control and direction characters as ``\x1b`` or ``\u202e``.
    """
    if type(value) is not str or value.isprintable():  # what is marked as HTML is a subclass
        return value
    return _ACTING.sub(lambda each: each[0].encode("unicode_escape").decode(), value)


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
        finalize=shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters)
    return environment.get_template(name)

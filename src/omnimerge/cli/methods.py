"""`omnimerge methods [NAME]`."""

from __future__ import annotations

import inspect

import click

from omnimerge.cli._console import json_option, print_json
from omnimerge.methods import MergeMethod, Param, all_methods, get_method


@click.command("methods", epilog="Example: omnimerge methods adamms")
@click.argument("name", required=False)
@json_option
def command(name: str | None, as_json: bool) -> None:
    """List merge methods by family, or describe one in full."""
    chosen = [get_method(name)] if name else list(all_methods().values())
    if as_json:
        print_json([_to_dict(method) for method in chosen])
    elif name:
        click.echo(_describe(chosen[0]))
    else:
        _list(chosen)


def _list(methods: list[MergeMethod]) -> None:
    for family in dict.fromkeys(method.family for method in methods):
        click.echo(f"{family}:")
        for method in methods:
            if method.family == family:
                click.echo(f"  {method.name:<18} {method.summary}")


def _describe(method: MergeMethod) -> str:
    needs = "models and their base" if method.needs_base else "models"
    if method.takes_target:
        needs = "the target and one donor"
    if method.low_rank:
        needs += ", adapters as factors"
    if method.adapters_only:
        needs = "LoRA adapters and their base"
    lines = [
        f"{method.name} ({method.family})",
        "",
        inspect.getdoc(method.fn) or "",
        "",
        f"Paper: {method.paper}",
        f"Takes: {needs}; merges by default: {method.select}",
        "",
        "Recipe keys under `parameters`:",
        *(f"  {describe_param(param)}" for param in method.params),
    ]
    return "\n".join(lines if method.params else [*lines[:-1], "No parameters."])


def describe_param(param: Param) -> str:
    """Describe one keyword on one line: scope, range, default.

    Args:
        param: the keyword.

    Returns:
        For example ``alpha (global) in [0, 1], required``.
    """
    scope = "per model" if param.per_model else "global"
    legal = f" in {param.range}" if param.range else ""
    legal = f" one of {', '.join(param.choices)}" if param.choices else legal
    default = "required" if param.required else f"default {_shown(param)}"
    return f"{param.name} ({scope}){legal}, {default}"


def _shown(param: Param) -> str:
    if param.default is None:
        return "1 each" if param.per_model else "none"
    return str(param.default).lower() if param.kind is bool else str(param.default)


def _to_dict(method: MergeMethod) -> dict[str, object]:
    return {
        "name": method.name,
        "family": method.family,
        "summary": method.summary,
        "paper": method.paper,
        "needs_base": method.needs_base,
        "adapters": "only" if method.adapters_only else "factored" if method.low_rank else "dense",
        "select": method.select,
        "parameters": [
            {
                "name": param.name,
                "per_model": param.per_model,
                "required": param.required,
                "default": param.default,
                "range": [param.range.low, param.range.high] if param.range else None,
                "choices": list(param.choices) or None,
            }
            for param in method.params
        ],
    }

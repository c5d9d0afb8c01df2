"""The `omnimerge` command. Commands are imported when called, so `--help` never loads torch."""

from __future__ import annotations

import importlib
from typing import Any

import click

from omnimerge.errors import OmnimergeError

# One file per command; the help line lives here so that listing commands imports none of them.
_COMMANDS = {
    "demo": "Map, search and merge the miniature pair: the whole of AdaMMS in a minute.",
    "inspect": "Show what a checkpoint is: components, geometry, dtype, size.",
    "map": "Show what of a donor goes where in a target, and whether it may.",
    "layout": "Show how a checkpoint names its language model, or infer it.",
    "plan": "Show what a merge would do, without reading weights.",
    "merge": "Merge checkpoints into one that transformers loads.",
    "extract-adapter": "Write what a fine-tuning changed as a PEFT adapter.",
    "search": "Find the merging coefficient without labels.",
    "select": "Choose a coefficient from answers that a harness logged.",
    "report": "Make the HTML page of a search.",
    "candidates": "Write the checkpoints of a grid, to evaluate elsewhere.",
    "methods": "List merge methods, or describe one.",
    "compose": "Compose MLLMs of several modalities over one LLM into one omni model.",
    "bench": "The miniature benchmark of merging methods, and the published one as data.",
    "convert": "Turn a mergekit configuration into a recipe.",
    "zoo": "The miniature models that come with omnimerge.",
}

_EPILOG = """\b
Examples:
  omnimerge map ./qwen2-vl ./llava-onevision
  omnimerge search recipe.yaml --prompts prompts.jsonl -o search/
  omnimerge merge recipe.yaml -o merged/
"""


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"omnimerge.cli.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0] if args else ""
        if name and not name.startswith("-") and name not in _COMMANDS:
            from omnimerge.errors import suggestion

            known = ", ".join(_COMMANDS)
            raise click.UsageError(f"no command {name!r}{suggestion(name, _COMMANDS)}; {known}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        """Turn every deliberate error into one line and exit code 1."""
        try:
            return super().invoke(ctx)
        except OmnimergeError as error:
            raise click.ClickException(str(error)) from error


@click.group(
    cls=_LazyGroup,
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="omnimerge", message="%(version)s")
def main() -> None:
    """Merge multimodal LLMs: map, merge and search, without training and without labels."""

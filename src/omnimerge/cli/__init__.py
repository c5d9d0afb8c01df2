"""The `omnimerge` command. Commands are imported when called, so `--help` never loads torch."""

from __future__ import annotations

import atexit
import errno
import gc
import io
import signal
import sys
import threading
import time
from functools import lru_cache
from typing import Any

import click

from omnimerge.cli._lazy import LazyGroup
from omnimerge.errors import OmnimergeError, printable

# One file per command; the help line lives here so that listing commands imports none of them.
_COMMANDS = {
    "demo": "Map, search and merge the miniature pair: the whole of AdaMMS in a minute.",
    "inspect": "Show what a checkpoint is: components, geometry, dtype, size.",
    "map": "Show what of a donor goes where in a target, and whether it may.",
    "layout": "Show how a checkpoint names its language model, or infer it.",
    "plan": "Show what a merge would do, without reading weights.",
    "merge": "Merge checkpoints into one that transformers loads.",
    "verify": "Hold a merged checkpoint against its manifest, target and recipe.",
    "push": "Upload a merged checkpoint with its model card to the Hugging Face Hub.",
    "clean": "Remove what interrupted merges left.",
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


_BEGAN = "omnimerge.began"
# What a stdout says that takes no more; everything else that writes names its file.
_UNPRINTED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)


class _Commands(LazyGroup):
    def invoke(self, ctx: click.Context) -> Any:
        """Turn every deliberate error, and one of the file system, into a line and exit code 1."""
        _spare_the_collector()
        try:
            return super().invoke(ctx)
        except OmnimergeError as error:
            raise click.ClickException(str(error)) from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # click knows about those
                raise
            why = error.strerror or type(error).__name__
            what = error.filename or ("cannot print" if error.errno in _UNPRINTED else "")
            sys.stdout = sys.stdout if error.filename else io.StringIO()  # or the end tries again
            raise click.ClickException(printable(f"{what}: {why}" if what else why)) from error
        except TerminatedError as error:
            click.echo(printable(f"Terminated.{_left(ctx)}"), err=True)
            raise click.exceptions.Exit(1) from error
        except KeyboardInterrupt as error:
            click.echo(printable(f"Interrupted.{_left(ctx)}"), err=True)
            raise click.exceptions.Exit(130) from error


@lru_cache
def _spare_the_collector() -> None:
    """Look less for garbage in what imports make and the end frees: a fifth of torch's import."""
    gc.set_threshold(100_000, 50, 100)
    atexit.register(gc.freeze)


class TerminatedError(KeyboardInterrupt):
    """SIGTERM came: end as on Ctrl-C."""


def _terminate(number: int, frame: Any) -> None:  # noqa: ARG001
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: tidying up takes a moment
    raise TerminatedError


def _left(ctx: click.Context) -> str:
    """What a merge that was interrupted left, and how to go on."""
    known = ctx.obj or {}
    if "again" in known:
        return f" {known['again']}"
    out = known.get("out")
    if out is None:
        return ""
    from omnimerge.checkpoint.staging import MANIFEST_NAME, leftovers

    if not any(each.resumable for each in leftovers(out)):
        manifest = out / MANIFEST_NAME
        done = manifest.is_file() and manifest.stat().st_mtime >= ctx.meta[_BEGAN]
        return f" {out} is complete." if done else " Nothing was written."
    return (
        " What is done is kept: go on by the same command with --resume, or remove it with "
        f"`omnimerge clean {out}`."
    )


@click.group(
    cls=_Commands,
    home="omnimerge.cli",
    known=_COMMANDS,
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="omnimerge", message="%(version)s")
def main() -> None:
    """Merge multimodal LLMs: map, merge and search, without training and without labels."""
    click.get_current_context().meta[_BEGAN] = time.time()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)

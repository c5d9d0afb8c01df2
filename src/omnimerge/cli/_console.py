"""What commands share: results to stdout, progress to stderr, sizes and options in one form."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click
import yaml

from omnimerge.errors import printable, suggestion

GATES = ("accounting", "geometry", "quantization", "ancestor", "finite")
DTYPES = ("auto", "float32", "float16", "bfloat16")
VOCABULARIES = ("auto", "target", "overlap")

force_option = click.option(
    "--force",
    multiple=True,
    type=click.Choice(GATES),
    help="Go on although this gate refuses. May be given several times.",
)
layout_option = click.option(
    "--layout",
    "layouts",
    multiple=True,
    type=click.Path(dir_okay=False),
    help="File with a layout of your own; see `omnimerge layout`. Repeat it.",
)
branch_option = click.option(
    "--branch",
    "branches",
    multiple=True,
    metavar="KEY=VALUE",
    help="Where one side holds tensors twice: shared, text or vision = text, vision or keep.",
)
criterion_option = click.option(
    "--criterion",
    default="unanimity",
    show_default=True,
    type=click.Choice(["unanimity", "pairwise", "backward"]),
)
memory_option = click.option(
    "--memory",
    default="1GB",
    show_default=True,
    metavar="SIZE",
    help="For the buffers of all threads; larger matrices that a method takes whole run alone.",
)
device_option = click.option(
    "--device",
    default="cpu",
    show_default=True,
    metavar="DEVICE",
    help="What computes: cpu, auto (all CUDA GPUs), cuda, cuda:1, or several: cuda:0,cuda:1.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def echo(line: str, *, err: bool = False) -> None:
    """Print a line; what a terminal would act on is written out, since names may hold anything.

    Args:
        line: what to print.
        err: whether to print to stderr.
    """
    click.echo(printable(line), err=err)


def echo_text(text: str) -> None:
    """Print several lines to stdout, as `echo` does each.

    Args:
        text: the lines, each with its end.
    """
    click.echo("\n".join(map(printable, text.split("\n"))), nl=False)


def print_json(value: Any) -> None:
    """Print a JSON-ready value to stdout.

    Args:
        value: what to print.
    """
    text = json.dumps(value, indent=1, ensure_ascii=False)
    click.echo(text if text.isascii() else _UNPRINTABLE.sub(_escaped, text))


# What JSON leaves as it is, and a terminal acts on: C1 controls, directions, halves of characters.
_UNPRINTABLE = re.compile("[\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff]")


def _escaped(match: re.Match[str]) -> str:
    return f"\\u{ord(match.group()):04x}"


def table(
    headers: Sequence[str], rows: Sequence[Sequence[Any]], numbers: str = "", *, width: int = 110
) -> None:
    """Print a table to stdout.

    Args:
        headers: one per column.
        rows: the cells.
        numbers: one letter per column, ``r`` for right-aligned.
        width: in characters, where stdout is no terminal.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, header in enumerate(headers):
        right = numbers[number : number + 1] == "r"
        drawn.add_column(
            Text(printable(header)), justify="right" if right else "left", overflow="fold"
        )
    for row in rows:
        drawn.add_row(*(Text(printable(str(cell))) for cell in row))
    shown = None if sys.stdout.isatty() else width
    Console(width=shown, highlight=False).print(drawn)


def best_line(tied: Sequence[str]) -> str:
    """Return the line that says how a choice was made.

    Args:
        tied: the points with the best score, for people.

    Returns:
        For example ``"best score at: 0.3, 0.4; rule: smallest score; ..."``.
    """
    from omnimerge.search.criteria import TIE_RULE

    joint = "; " if any("," in point for point in tied) else ", "
    return f"best score at: {joint.join(tied)}; rule: {TIE_RULE}"


def bootstrap_line(found: Any) -> str:
    """Return the line that says how a choice varies.

    Args:
        found: a `Bootstrap`.

    Returns:
        For example ``"resampling the prompts: 87% choose the same alone, 95 % 0.2 to 0.3"``.
    """
    spans = ", ".join(
        f"{low:g}" if low == high else f"{low:g} to {high:g}"
        for low, high in found.interval.values()
    )
    return f"resampling the prompts: {found.same:.0%} choose the same alone, 95 % {spans}"


def size(count: float) -> str:
    """Return a number of bytes for people, in powers of 1000.

    Args:
        count: bytes.

    Returns:
        For example ``"16.6 GB"``.
    """
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


@contextmanager
def byte_progress(label: str) -> Iterator[Callable[[int, int], None] | None]:
    """Show a progress bar on stderr while the block runs; nothing where stderr is no terminal.

    Args:
        label: what is going on.

    Yields:
        A callback that takes (bytes done, bytes in total), or None.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(label), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def bytes_from(option: str, value: str) -> int:
    """Read a size given on the command line.

    Args:
        option: where it was given.
        value: such as ``1GB``.

    Returns:
        Bytes.

    Raises:
        BadParameter: if it is no size.
    """
    from omnimerge.engine.recipe import parse_size

    try:
        return parse_size(value)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint=option) from error


def show_adapter(summary: Any, out: Any) -> None:
    """Print what an adapter holds.

    Args:
        summary: an `AdapterSummary`.
        out: its folder.
    """
    ranks, energy = summary.ranks.values(), summary.energy
    echo(f"adapter -> {out} ({size(summary.nbytes)})")
    if ranks:
        span = f"{min(ranks)} to {max(ranks)}" if min(ranks) < max(ranks) else f"{max(ranks)}"
        echo(f"  {len(ranks):5}  matrices of rank {span}")
    if energy:
        worst = min(energy, key=energy.__getitem__)
        mean = sum(energy.values()) / len(energy)
        echo(f"         they hold {mean:.2%} of the squared change on average,")
        echo(f"         {energy[worst]:.2%} at least ({worst})")
    if summary.whole:
        echo(f"  {len(summary.whole):5}  stored whole, such as {summary.whole[0]}")
    echo(f"  {summary.unchanged:5}  tensors unchanged")
    for reason, count in summary.left_out.items():
        echo(f"  {count:5}  left out: {reason}")


def parse_parameters(pairs: Sequence[str]) -> dict[str, Any]:
    """Read ``--param name=value`` options; values are YAML: ``0.3``, ``true``, ``[0.4, 0.6]``.

    Args:
        pairs: the options as given.

    Returns:
        Name -> value.

    Raises:
        click.UsageError: if one has no ``=`` or its value is not YAML.
    """
    parameters = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise click.UsageError(f"--param {pair!r}: write name=value, for example alpha=0.3")
        try:
            parameters[name.strip()] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise click.UsageError(f"--param {pair!r}: {value!r} is not a YAML value") from None
    return parameters


def parse_pairs(pairs: Sequence[str], option: str) -> dict[str, str]:
    """Read options of the form ``KEY=VALUE``.

    Args:
        pairs: the options as given.
        option: its name, for the message.

    Returns:
        Key -> value.

    Raises:
        click.UsageError: if one has no ``=``, or nothing beside it.
    """
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key or not value:
            raise click.UsageError(f"{option} {pair!r}: write KEY=VALUE")
        found[key] = value
    return found


def recipe_from(
    source: str | dict[str, Any] | None,
    options: dict[str, Any],
    parameters: Sequence[str],
    load: Callable[..., Any] | None = None,
) -> Any:
    """Build a recipe from a file, from options, or from a file with options that replace its keys.

    Args:
        source: the recipe file, if any.
        options: recipe keys as given on the command line; None and empty ones are left out.
        parameters: ``--param`` options.
        load: what reads it; default: `load_recipe`.

    Returns:
        The recipe.

    Raises:
        click.UsageError: if there is neither a file nor a method.
        RecipeError: if the recipe is wrong.
    """
    from omnimerge.engine import load_recipe

    given = {key: value for key, value in options.items() if value not in (None, ())}
    if "branches" in given:
        given["branches"] = parse_pairs(given["branches"], "--branch")
    adapters = [{"adapter": reference} for reference in given.pop("adapters", ())]
    if "models" in given or adapters:
        given["models"] = [*given.get("models", ()), *adapters]
    values = parse_parameters(parameters)
    if source is None and "method" not in given:
        raise click.UsageError("give a recipe file, or --method with --model")
    if source is None:
        source = {"parameters": {}}
    return (load or load_recipe)(source, replace=given, parameters=values)


def recipe_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that stand for recipe keys.

    Args:
        command: the click callback.

    Returns:
        The callback with the options.
    """
    for option in reversed(_RECIPE_OPTIONS):
        command = option(command)
    return command


def _check_method(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    if value is not None:
        from omnimerge.methods import all_methods

        if value not in all_methods():
            known = ", ".join(sorted(all_methods()))
            hint = suggestion(value, all_methods())
            raise click.BadParameter(f"no method {value!r}{hint}; known: {known}")
    return value


_RECIPE_OPTIONS = (
    click.argument("recipe", required=False, type=click.Path(dir_okay=False)),
    click.option("--method", callback=_check_method, help="Merge method; see `omnimerge methods`."),
    click.option("--target", help="Checkpoint whose architecture the output has."),
    click.option("--base", help="Common ancestor, for methods on task vectors."),
    click.option("--model", "models", multiple=True, help="Checkpoint to merge; repeat it."),
    click.option("--adapter", "adapters", multiple=True, help="PEFT adapter on the base; repeat."),
    click.option("--param", "parameters", multiple=True, help="Keyword of the method: alpha=0.3."),
    click.option("--select", type=click.Choice(["all", "language_model", "linear"])),
    click.option("--vocabulary", type=click.Choice(VOCABULARIES)),
    branch_option,
    layout_option,
    click.option("--dtype", type=click.Choice([*DTYPES, "float8_e4m3fn", "float8_e5m2"])),
    click.option("--max-shard-size", help="For example 5GB."),
)

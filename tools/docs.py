"""Write the docs pages that follow from code and results: methods, recipe keys, benchmark, ...

python tools/docs.py            # write them
python tools/docs.py --check    # fail if one is not what the code says
"""

from __future__ import annotations

import inspect
import os
import sys
from dataclasses import replace
from pathlib import Path

os.environ["COLUMNS"] = "100"

import click

import omnimerge
from omnimerge.arch import layouts
from omnimerge.bench import experiments, lines, tables
from omnimerge.bench.boards import find_boards
from omnimerge.bench.experiments.result import Experiment
from omnimerge.bench.page import dashboard
from omnimerge.bench.results import Build, Results, read
from omnimerge.bench.scoreboard import scored_boards
from omnimerge.cli import main as cli
from omnimerge.cli.methods import describe_param
from omnimerge.engine.recipe import Recipe
from omnimerge.methods import all_methods
from omnimerge.report.dashboard import read_dashboard, render_dashboard

DOCS = Path(__file__).parents[1] / "docs"
README = Path(__file__).parents[1] / "README.md"
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "bench"
_NOTE = "<!-- Written by tools/docs.py from the code; run `make docs` to change it. -->\n\n"

_RECIPE_KEYS = {
    "method": "a name that `omnimerge methods` lists",
    "target": "checkpoint whose architecture, tokenizer and other files the output has; default: base, else the first model",
    "base": "common ancestor, for methods on task vectors",
    "models": "checkpoints to merge: paths, Hub ids (`owner/name@revision`) or [URLs](hub.md#checkpoints-at-a-url); an entry may be a mapping with `model`, `adapter` (a PEFT LoRA adapter on top of the model; its default is the base) and `weight`",
    "parameters": "the method's keywords; `weight` entries of the models are short for `weights`",
    "select": "`all` floating-point tensors, the `language_model`, or the `linear` 2-D matrices of its layers; default: the method's",
    "lines": "LiNeS: `alpha` and `beta`; the merged task vector of any method with a base is scaled by `alpha + beta * depth`, depth going from 0 (first layer, and all outside of the layers) to 1",
    "overrides": "a list of `match` (`component`; `name`, a regular expression on the target's names; `slot`, one on [slots](mapping.md); `layers`: `0-13`) with `keep: target` or other `parameters`; the first that fits wins",
    "vocabulary": "`auto` merges embedding and head where both vocabularies are equal, else they stay the target's; `overlap` merges the rows of the tokens that both tokenizers have; `target` keeps them ([more](mapping/vocabulary.md))",
    "branches": "`shared`, `text`, `vision`: what feeds the target's tensors where one side holds them twice: `text`, `vision` or `keep` ([more](mapping/branches.md))",
    "layouts": "a list of files with layouts of your own ([their form](layouts.md#the-file))",
    "dtype": "`auto` (each tensor's own in the target), `float32`, `float16` or `bfloat16`; `float8_e4m3fn` or `float8_e5m2` for matrices only ([more](gpu.md#8-bit-storage))",
    "max_shard_size": "`5GB`, `500MB`; the target's own shards are kept where they fit",
    "seed": "for methods that draw at random",
}


def methods_page() -> str:
    """Every method with its docstring and its keywords."""
    lines = ["# Methods", "", "What each method computes, with its source. The same text as", ""]
    lines[-2] += " `omnimerge methods NAME`."
    families = list(dict.fromkeys(method.family for method in all_methods().values()))
    for family in families:
        lines += [f"## {family.capitalize()}", ""]
        for method in all_methods().values():
            if method.family != family:
                continue
            keywords = [f"- {describe_param(param)}" for param in method.params] or ["- none"]
            doc = inspect.getdoc(method.fn) or ""
            lines += [f"### `{method.name}`", "", "```text", doc.rstrip(), "```", ""]
            there = "the CPU's bits" if method.exact else "other rounding"
            lines += [f"Paper: <{method.paper}>. Merges by default: `{method.select}`."]
            lines[-1] += f" On a [GPU](gpu.md): {there}."
            lines += ["Keywords:", "", *keywords, ""]
    return "\n".join(lines)


def recipe_page() -> str:
    """Every key of a recipe."""
    if set(_RECIPE_KEYS) != set(Recipe.model_fields):
        raise SystemExit(f"describe {set(_RECIPE_KEYS) ^ set(Recipe.model_fields)} in {__file__}")
    example = (DOCS.parent / "examples" / "adamms.yaml").read_text(encoding="utf-8")
    rows = []
    for name, field in Recipe.model_fields.items():
        default = field.get_default(call_default_factory=True)
        shown = "required" if field.is_required() else f"`{default}`"
        shown = "-" if default in (None, (), {}) and not field.is_required() else shown
        rows.append(f"| `{name}` | {shown} | {_RECIPE_KEYS[name]} |")
    return (
        "# Recipes\n\nA recipe is a YAML file. Relative paths are looked up beside the file, then in "
        "the working directory.\nAn unknown key, a missing one or a value out of range is refused "
        f"before anything is read.\n\n```yaml\n{example}```\n\n| key | default | meaning |\n"
        "|---|---|---|\n" + "\n".join(rows) + "\n"
    )


def layouts_page() -> str:
    """Every layout with its names."""
    rows = [
        f"| `{layout.name}` | {layout.about} | `{layout.layers}` | `{layout.embed}` | `{layout.head}` |"
        for layout in layouts()
    ]
    return (
        "# Layouts\n\nHow families of checkpoints name their language model. The tensors decide, not "
        "`model_type`:\na layout fits if embedding, final norm and a gap-free run of layers are "
        "there; of those that fit, the one that\nknows most names inside layers. The tables are data, "
        "in `src/omnimerge/arch/layouts/`.\n\n"
        "| layout | checkpoints | layers | embedding | head |\n|---|---|---|---|---|\n"
        + "\n".join(rows)
        + "\n"
        + _LAYOUT_FILE
    )


_LAYOUT_FILE = """
## The file

| key | meaning |
|---|---|
| `name`, `about` | for people |
| `prefix` | what the language model's names start with |
| `layers` | a layer's names after the prefix, with `{i}` for its number; default `layers.{i}.` |
| `embed`, `norm` | embedding and final norm, after the prefix; default `embed_tokens`, `norm` |
| `head` | the output head, its whole name |
| `block` | name inside a layer, without `.weight` or `.bias` -> what it stands for: a slot (`attn.q`), a slot's copy for text or for images (`attn.o@vision`), several slots one after the other (`{concat: [attn.q, attn.k, attn.v], branch: text}`), or queries, keys and values interleaved by key/value head (`{grouped: [attn.q, attn.k, attn.v]}`) |
| `marker` | a prefix that some tensor must have, where names alone are another family's too |
| `inserted` | layers in which a name starts with this are none of the language model's |
| `own` | words in names of additions inside layers, such as adapters: the checkpoint's own |
| `components` | prefix -> `vision.`, `audio.`, `projector.` or `other.`, where the general table does not know it |
| `stacks` | name -> `prefix`, `head`, `about`, `marker`, where one block is found at several places |

Slots inside a layer: `input_norm`, `attn.q`, `attn.k`, `attn.v`, `attn.o`, `attn.q_norm`, `attn.k_norm`,
`post_attention_norm`, `pre_feedforward_norm`, `post_feedforward_norm`, `mlp.gate`, `mlp.up`, `mlp.down`.
A name that `block` does not list keeps its own words as its slot: it is merged with the same name in
another checkpoint, and refused where there is none.
"""


def commands_page() -> str:
    """The help of every command."""
    parts = ["# Commands\n"]
    context = click.Context(cli, info_name="omnimerge")
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        inner = click.Context(command, info_name=name, parent=context, max_content_width=100)
        inner.terminal_width = 100
        parts.append(f"## `{name}`\n\n```text\n{command.get_help(inner)}\n```\n")
    return "\n".join(parts)


def bench_page() -> str:
    """The tables and findings of the miniature benchmark, from the committed results."""
    if not RESULTS.is_dir():
        return _NO_RESULTS
    parts = [_BENCH]
    for name in lines.names():
        folder = RESULTS / name
        if not folder.is_dir():
            continue
        runs = tables.read_results(folder)
        (table,) = tables.make_tables(runs)
        parts += [f"## `{name}`", lines.get(name).about + ".", _where(folder, runs)]
        searched = {row.name: row for row in table.lines if row.kind == "search"}
        plain = tuple(row for row in table.lines if row.kind != "search")
        parts += [tables.markdown(replace(table, lines=plain))]
        if searched:
            rows = [
                f"| {row.name} | {_average(row)} | {_average(searched[row.name])} | {tables.scales(row.chosen)} | "
                f"{tables.scales(searched[row.name].chosen)} |"
                for row in plain
                if row.kind == "method" and row.name in searched
            ]
            parts += ["### Scales chosen without labels", "\n".join([_SEARCHED, *rows])]
        if name == "modality":
            parts += [_criterion(table)]
        files = sorted(folder.glob("seed-0/results/experiment-*.json"))
        found = {each.name: each for each in map(experiments.read, files)}
        parts += [_finding(found[each]) for each in experiments.names() if each in found]
    return "\n\n".join(parts)


_NO_RESULTS = """# Results of the miniature benchmark

There are none yet: what was run before had seen a few pictures of its tests in training and was thrown away.
`python benchmarks/bench.py FOLDER --save` and `make docs` make them. How it is done: [The miniature benchmark](bench.md)."""

_BENCH = """# Results of the miniature benchmark

Made by `python benchmarks/bench.py FOLDER --save`, which prints every command that it runs; the numbers
per seed are in `benchmarks/results/bench/`, and `omnimerge bench table benchmarks/results/bench/internvl` prints
them. How they came about, and what they cannot show: [The miniature benchmark](bench.md). All charts are on
[one page](bench-page.html), which `omnimerge bench report benchmarks/results/bench -o page.html` makes. Right answers in percent, mean ± deviation over seeds; the best method of a
column in bold; `gain` is the average less that of the same seed's base, and `scale` what each seed chose on
its validation questions. Everything was run on two cores: there is no row of a GPU."""

_SEARCHED = """The average on the test at the scale that labels choose (validation split), and at the one that
`unanimity` chooses from the same questions without their labels.

| method | by labels | without | scales | without |
|---|--:|--:|--:|--:|"""


def charts_page() -> str:
    """The page that `omnimerge bench report` makes of the committed results."""
    boards = find_boards([RESULTS], scored_boards([RESULTS]))
    return render_dashboard(read_dashboard(dashboard(boards, version=omnimerge.__version__)))


def _where(folder: Path, runs: list[Results]) -> str:
    here = runs[0].environment
    versions = ", ".join(f"{name} {number}" for name, number in here.versions.items())
    builds = [read(Build, file).seconds for file in sorted(folder.glob("seed-*/build.json"))]
    took = [sum(row.took for row in run.rows) for run in runs]
    both = [build + run for build, run in zip(builds, took, strict=True)]
    minutes = [" ".join(f"{seconds / 60:.0f}" for seconds in each) for each in (builds, took, both)]
    aim = "" if max(both) <= 60 * _AIM else f"; the aim was {_AIM} for both together"
    return (
        f"Minutes by seed, on {here.cores} cores ({here.machine}), without a GPU: {minutes[0]} to build, "
        f"{minutes[1]} to run, {minutes[2]} in all{aim}. {versions}."
    )


_AIM = 30  # minutes that building and running one seed should take on two cores


def _criterion(table: tables.Table) -> str:
    """Does one composed model do what each expert does, and what none of them can?"""
    rows = {(row.kind, row.name): row for row in table.lines}
    best = max(
        (r for r in table.lines if r.kind == "method" and r.cells),
        key=lambda r: r.cells[tables.AVERAGE].mean,
    )
    said = []
    for column in table.columns:
        expert = rows.get(("expert", column))
        cell = best.cells[column]
        if expert is not None:
            own = expert.cells[column]
            spread = max(own.deviation or 0.0, cell.deviation or 0.0)
            near = "within" if own.mean - cell.mean <= spread else "beyond"
            said.append(
                f"- {column}: {cell.text()}, the {column} expert {own.text()}; {near} the deviation."
            )
        else:
            top = max(
                (r for (kind, _), r in rows.items() if kind == "expert"),
                key=lambda r: r.cells[column].mean,
            )
            than = "better" if cell.mean > top.cells[column].mean else "not better"
            said.append(
                f"- {column}: {cell.text()}, the best expert ({top.name}) {top.cells[column].text()}: {than}."
            )
    return (
        f"The method with the best average is `{best.name}`. By kind of question:\n\n"
        + "\n".join(said)
    )


def bench_summary() -> str:
    """What merging gains on average, all lines in one small table, for the README."""
    if not RESULTS.is_dir():
        return "No results are committed."
    found = [
        tables.make_tables(tables.read_results(RESULTS / name))[0]
        for name in lines.names()
        if (RESULTS / name).is_dir()
    ]
    rows = [{(row.kind, row.name): row for row in table.lines if row.cells} for table in found]
    best = [next(name for kind, name in each if kind == "method") for each in rows]
    told: dict[str, list[tables.TableRow | None]] = {
        "base": [each.get(("base", "base")) for each in rows],
        "best expert": [_best_expert(table) for table in found],
    }
    shown = dict.fromkeys((*_SUMMARISED, *best))
    in_order = sorted(
        shown, key=lambda name: -sum(_mean(each.get(("method", name))) for each in rows)
    )
    told |= {f"`{name}`": [each.get(("method", name)) for each in rows] for name in in_order}
    told["reference"] = [
        next((r for (k, _), r in each.items() if k == "reference"), None) for each in rows
    ]
    head = ["", *(f"`{table.line}`" for table in found)]
    body = [[name, *(_gained(row) for row in each)] for name, each in told.items()]
    for place, name in enumerate(best, start=1):
        for line in body:
            if line[0] == f"`{name}`":
                line[place] = f"**{line[place]}**"
    lines_ = [head, ["---", *["--:"] * len(found)], *body]
    shown_lines = [f"`{table.line}`: {lines.get(table.line).about}." for table in found]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines_), "", *shown_lines])


_SUMMARISED = ("linear", "task_arithmetic", "ties", "dare_ties", "tsv", "iso_c", "wudi", "optmerge")
"""Those that the paper compares, or that most people know."""


def _best_expert(table: tables.Table) -> tables.TableRow:
    return max((r for r in table.lines if r.kind == "expert"), key=_mean)


def _gained(row: tables.TableRow | None) -> str:
    """Points above the base; of the base itself its right answers."""
    if row is None:
        return ""
    return f"+{row.gain.text()}".replace("+-", "-") if row.gain else f"{_average(row)} %"


def _mean(row: tables.TableRow | None) -> float:
    return row.cells[tables.AVERAGE].mean if row else 0.0


def _average(row: tables.TableRow) -> str:
    return row.cells[tables.AVERAGE].text()


def _finding(found: Experiment) -> str:
    """One experiment: what was asked, its table or curves, and what came out."""
    seeds = ", ".join(map(str, found.seeds))
    parts = [f"### {found.title} ({found.paper})", f"{found.question} Seed {seeds}."]
    if found.rows:
        head, rows = [found.head, *found.columns], found.rows
        cells = [[row.name, *(_number(v, found.digits) for v in row.values)] for row in rows]
    else:
        head = [found.x, *(f"{x:g}" for x in found.curves[0].x)]
        cells = [[curve.name, *(f"{y:.4g}" for y in curve.y)] for curve in found.curves]
    lines_ = [head, ["---", *["--:"] * (len(head) - 1)], *cells]
    parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines_))
    if found.levels:
        levels = ", ".join(f"{name} {value:.4g}" for name, value in found.levels.items())
        parts.append(f"For comparison: {levels}.")
    parts.append("\n".join(f"- {sentence}" for sentence in found.outcome))
    return "\n\n".join(parts)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _with_block(page: str, block: str) -> str:
    """Put a block between the two marks of a page that is otherwise written by hand."""
    before, begin, rest = page.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not end:
        raise SystemExit(f"README.md: the marks {_BEGIN} and {_END} are not there")
    return f"{before}{begin}\n{block}\n{end}{after}"


_BEGIN, _END = "<!-- bench: written by tools/docs.py -->", "<!-- /bench -->"


def main() -> None:
    """Write the pages, or check them."""
    pages = {
        "methods.md": methods_page(),
        "recipe.md": recipe_page(),
        "layouts.md": layouts_page(),
        "commands.md": commands_page(),
        "bench-results.md": bench_page(),
    }
    wanted_by_file = {DOCS / name: _NOTE + text.rstrip() + "\n" for name, text in pages.items()}
    if RESULTS.is_dir():
        wanted_by_file[DOCS / "bench-page.html"] = charts_page()
    wanted_by_file[README] = _with_block(README.read_text(encoding="utf-8"), bench_summary())
    stale = []
    for file, wanted in wanted_by_file.items():
        if "--check" not in sys.argv:
            file.write_text(wanted, encoding="utf-8")
        elif not file.is_file() or file.read_text(encoding="utf-8") != wanted:
            stale.append(file.name)
    if stale:
        raise SystemExit(f"docs are not what the code says: {', '.join(stale)}; run `make docs`")


if __name__ == "__main__":
    main()

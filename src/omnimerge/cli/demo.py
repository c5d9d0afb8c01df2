"""`omnimerge demo`."""

from __future__ import annotations

import time
from pathlib import Path

import click

from omnimerge.cli._console import table


@click.command("demo")
@click.option(
    "-o",
    "--out",
    default="omnimerge-demo",
    show_default=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Where prompts, search, merged checkpoint and report go.",
)
def command(out: Path) -> None:
    """Do what a user would do with two 7B models, with the miniature pair, and say each command.

    Two small multimodal LLMs of different architecture grew from one LLM and then learned
    different things. The demo inspects them, maps one onto the other, finds the coefficient
    without labels, merges, and reloads the result with transformers.
    """
    import torch

    from omnimerge.bench import zoo
    from omnimerge.bench.zoo import demo
    from omnimerge.search import read_result

    start = time.perf_counter()
    torch.set_num_threads(1)  # threads of such small kernels only wait for each other
    demo.prepare(out)
    shown = {
        str(zoo.path(demo.TARGET)): "$TARGET",
        str(zoo.path(demo.DONOR)): "$DONOR",
    }
    click.echo(f"$ TARGET=$(omnimerge zoo path {demo.TARGET})")
    click.echo(f"$ DONOR=$(omnimerge zoo path {demo.DONOR})")
    target, donor = shown
    recipe, heldout = out / "recipe.yaml", out / "heldout" / "prompts.jsonl"
    _run(shown, "inspect", target)
    _run(shown, "inspect", donor)
    _run(shown, "map", target, donor)
    _run(
        shown, "search", recipe, "--prompts", out / "prompts" / "prompts.jsonl",
        "--heldout", heldout, "--max-new-tokens", demo.MAX_NEW_TOKENS,
        "--batch-size", demo.BATCH_SIZE, "-o", out / "search", "--overwrite",
    )  # fmt: skip
    result = read_result(out / "search")
    _run(
        shown, "merge", recipe, "--param", f"alpha={result.alpha:g}",
        "-o", out / "merged", "--overwrite",
    )  # fmt: skip

    _heading("What came out: accuracy on the held-out prompts, each model loaded by transformers")
    scores = {
        "target alone": demo.score(Path(target), heldout),
        "donor alone": demo.score(Path(donor), heldout),
        f"merged, alpha {result.alpha:g}": demo.score(out / "merged", heldout),
    }
    rows = [
        [group, len(kinds), *(f"{found[group]:.3f}" for found in scores.values())]
        for group, kinds in demo.GROUPS.items()
    ]
    table(("questions", "kinds", *scores), rows, "lrrrr")
    accuracies = {point.alpha: point.accuracy or 0.0 for point in result.points}
    best = max(accuracies, key=lambda alpha: (accuracies[alpha], -alpha))
    click.echo(
        f"chosen without labels: alpha {result.alpha:g} ({accuracies[result.alpha]:.3f}); "
        f"best possible choice: alpha {best:g} ({accuracies[best]:.3f})"
    )
    click.echo(f"report: {out / 'search' / 'report.html'}")
    click.echo(
        f"{time.perf_counter() - start:.0f} s in all. Next: your own two models, see README."
    )


def _heading(text: str) -> None:
    click.echo()
    click.secho(text, bold=True)


def _run(shown: dict[str, str], *words: object) -> None:
    """Say a command as a user would type it, and run it."""
    from omnimerge.cli import main

    arguments = [str(word) for word in words]
    _heading("$ omnimerge " + " ".join(shown.get(word, word) for word in arguments))
    main.main(args=arguments, prog_name="omnimerge", standalone_mode=False)

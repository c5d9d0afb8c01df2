"""`omnimerge select --log 0.0=PATH --log 0.1=PATH ...`."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from omnimerge.cli._console import (
    best_line,
    bootstrap_line,
    criterion_option,
    echo,
    json_option,
    print_json,
    table,
)

if TYPE_CHECKING:
    from omnimerge.search.choice import Choice
    from omnimerge.search.logs import Log
    from omnimerge.search.result import Diagnostics, PointDiagnostics

_EPILOG = """\b
Examples:
  omnimerge select --log 0.0=a/mme.jsonl --log 0.1=b/mme.jsonl --log 0.2=c/mme.jsonl
  omnimerge select --logs eval --pattern 'merged-{alpha}/*_samples_mme.jsonl'
  omnimerge select --logs outputs --pattern 'merged-{alpha}/merged-{alpha}_MME.xlsx'
  omnimerge select --logs search/responses --pattern 'alpha_{alpha}.jsonl'
"""


@click.command("select", epilog=_EPILOG)
@click.option(
    "--log", "logs", multiple=True, metavar="ALPHA=PATH", help="Answers at ALPHA; repeat."
)
@click.option("--logs", "folder", type=click.Path(path_type=Path), help="Folder of all logs.")
@click.option("--pattern", help="A log's place in it, with {alpha}; * stands for anything.")
@criterion_option
@click.option(
    "--distance",
    default="exact",
    show_default=True,
    metavar="NAME",
    help="exact, normalized, edit, or embedding:FOLDER.",
)
@click.option(
    "--per-step/--plain",
    default=None,
    help="Divide by the step between coefficients.  [default: where steps are not equal]",
)
@click.option(
    "--reverse",
    is_flag=True,
    help="The logs' ALPHA is the target's share, as in AdaMMS's CogVLM scripts: a becomes 1 - a.",
)
@click.option("--filtered", is_flag=True, help="Compare lmms-eval's filtered_resps, not resps.")
@click.option("--allow-missing", is_flag=True, help="Leave out ids that are not in every log.")
@click.option("--parameter", default="alpha", show_default=True, help="What ALPHA is called.")
@json_option
def command(
    logs: tuple[str, ...],
    folder: Path | None,
    pattern: str | None,
    criterion: str,
    distance: str,
    per_step: bool | None,
    reverse: bool,
    filtered: bool,
    allow_missing: bool,
    parameter: str,
    as_json: bool,
) -> None:
    """Choose a coefficient from answers that a harness logged. Nothing but files is read.

    Takes lmms-eval's samples, VLMEvalKit's predictions, and JSON lines of id and response. Answers
    are joined on their ids. Labels and metrics in the files are not looked at.
    """
    from omnimerge.search.choice import choose
    from omnimerge.search.logs import open_log

    paths = _paths(logs, folder, pattern, reverse)
    read: dict[float, Log] = {}
    for alpha, path in paths.items():
        read[float(alpha)] = log = open_log(path, filtered=filtered)
        if not as_json:
            answers = f"{len(log.answers)} answers"
            echo(f"{parameter} {alpha.normalize():f}: {log.path} ({log.kind}, {answers})")
    choice = choose(
        read,
        criterion=criterion,
        distance=distance,
        per_step=per_step,
        allow_missing=allow_missing,
    )
    diagnostics = _diagnose(choice, read, parameter)
    if as_json:
        print_json(_as_result(choice, read, parameter, diagnostics))
    else:
        _print(choice, parameter, diagnostics)


def _paths(
    logs: tuple[str, ...], folder: Path | None, pattern: str | None, reverse: bool
) -> dict[Decimal, Path]:
    """Coefficient -> log, increasing."""
    from omnimerge.errors import SearchError
    from omnimerge.search.logs import find_logs, parse_alpha

    if (folder is None) != (pattern is None):
        raise click.UsageError("--logs and --pattern belong together")
    if not logs and folder is None:
        raise click.UsageError(
            "give --log ALPHA=PATH for each coefficient, or --logs and --pattern"
        )
    found = find_logs(folder, pattern) if folder is not None and pattern is not None else {}
    for given in logs:
        text, equals, path = given.partition("=")
        if not equals or not path:
            raise click.UsageError(f"--log {given!r}: write ALPHA=PATH, for example 0.1=log.jsonl")
        alpha = parse_alpha(text)
        if alpha in found:
            other, said = found[alpha], text.strip()
            raise SearchError(f"{other} and {path} are both given for {said}; give one")
        found[alpha] = Path(path)
    if reverse:
        if wrong := [alpha for alpha in found if not 0 <= alpha <= 1]:
            raise SearchError(f"--reverse: {wrong[0]} is no share; shares are between 0 and 1")
        found = {1 - alpha: path for alpha, path in found.items()}
    return dict(sorted(found.items()))


def _diagnose(choice: Choice, logs: dict[float, Log], parameter: str) -> Diagnostics:
    from omnimerge.generate import Response
    from omnimerge.search.guards import diagnose, resampled

    joined = choice.joined
    responses = [
        [Response(id_, text) for id_, text in zip(joined.ids, answers, strict=True)]
        for answers in joined.answers
    ]
    notes = [note for point in joined.points for note in logs[point].notes]
    if joined.missing:
        notes.append(
            f"{joined.missing} ids are not in every log and were left out; "
            f"{len(joined.ids)} were compared"
        )
    if choice.per_step:
        notes.append("distances are divided by the step between the coefficients")
    points = [{parameter: point} for point in joined.points]
    target = joined.points.index(0.0) if parameter == "alpha" and 0.0 in joined.points else None
    return diagnose(
        points,
        responses,
        choice.scores,
        ceilings=choice.ceilings,
        target=None if target is None else responses[target],
        bootstrap=resampled(points, joined.answers, choice.score),
        notes=notes,
    )


def _as_result(
    choice: Choice, logs: dict[float, Log], parameter: str, diagnostics: Diagnostics
) -> dict[str, Any]:
    """The keys of search.json; None for what no log tells."""
    from omnimerge import __version__
    from omnimerge.search.criteria import TIE_RULE
    from omnimerge.search.result import SearchResult

    joined, selection = choice.joined, choice.selection
    told = diagnostics.model_dump(mode="json")
    for point in told["points"]:
        point["mean_tokens"] = None
    return {
        **dict.fromkeys(SearchResult.model_fields),
        "points": [
            {
                "values": {parameter: point},
                "score": score,
                "responses": str(logs[point].path),
                "accuracy": None,
            }
            for point, score in zip(joined.points, choice.scores, strict=True)
        ],
        "selected": {parameter: selection.point},
        "criterion": choice.criterion,
        "distance": choice.distance,
        "per_step": choice.per_step,
        "axes": [{"name": parameter, "grid": list(joined.points)}],
        "tie_set": [{parameter: point} for point in selection.tie_set],
        "grid": ",".join(f"{point:g}" for point in joined.points),
        "prompts": {
            "file": None,
            "sha256": None,
            "count": len(joined.ids),
            "sample": None,
            "seed": None,
        },
        "diagnostics": told,
        "versions": {"omnimerge": __version__},
        "tie_rule": TIE_RULE,
        "labels_read": False,
    }


def _seen(point: PointDiagnostics) -> tuple[str, ...]:
    """What the answers at one point look like."""
    shares = (point.distinct_rate, point.empty_rate, point.like_target)
    different, empty, alike = ("-" if share is None else f"{share:.0%}" for share in shares)
    return different, empty, f"{point.mean_characters:.1f}", alike


def _print(choice: Choice, parameter: str, diagnostics: Diagnostics) -> None:
    selection, points = choice.selection, choice.joined.points
    rows = [
        (
            f"{point:g}",
            "-" if score is None else f"{score:g}",
            *_seen(each),
            "<- chosen" if point == selection.point else "",
        )
        for point, score, each in zip(points, choice.scores, diagnostics.points, strict=True)
    ]
    columns = ("different", "empty", "characters", "like target")
    table([parameter, choice.criterion, *columns, ""], rows, "rrrrrr")
    echo(
        f"chosen: {parameter} {selection.point:g}, by {choice.criterion} ({choice.distance}) on "
        f"{len(choice.joined.ids)} prompts"
    )
    echo(best_line([f"{point:g}" for point in selection.tie_set]))
    if diagnostics.bootstrap:
        echo(bootstrap_line(diagnostics.bootstrap))
    echo("labels: not read; ids, answers and prompts only")
    for note in diagnostics.notes:
        echo(f"note: {note}")
    for warning in diagnostics.warnings:
        echo(f"warning: {warning}")

"""How are the entries of task vectors spread, after full fine-tuning and with LoRA? Figure 2."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omnimerge.bench.analysis import Analysis, analyze
from omnimerge.bench.experiments.result import Entry, Experiment

NAME = "distributions"
ABOUT = "how the entries of task vectors are spread, full fine-tuning against LoRA"


def run(recipe: Mapping[str, Any] | Path, *, line: str = "", seed: int | None = None) -> Experiment:
    """Measure the experts' task vectors.

    Args:
        recipe: what names base and experts, or its YAML file.
        line: name of the line, for the file.
        seed: of the line.

    Returns:
        The distributions, and what they look like in numbers.
    """
    begun = time.perf_counter()
    result = from_analysis(analyze(recipe), line=line, seed=seed)
    return result.model_copy(update={"seconds": time.perf_counter() - begun})


def from_analysis(found: Analysis, *, line: str = "", seed: int | None = None) -> Experiment:
    """Take the distributions out of an analysis.

    Args:
        found: the analysis.
        line: name of the line, for the file.
        seed: of the line.

    Returns:
        The experiment.
    """
    rows = []
    for number, name in enumerate(found.experts):
        spread, norms = found.spread[number], [each.norms[number] for each in found.layers]
        ratio = max(norms) / min(norms) if norms and min(norms) > 0 else None
        ranks = [s.rank_99 / min(m.shape) for m in found.matrices if (s := m.spectra[number])]
        rows.append(
            Entry(
                name=name,
                values=(
                    found.norms[number],
                    ratio,
                    1e6 * spread.mean,
                    spread.skewness,
                    float(spread.modes),
                    statistics.fmean(ranks) if ranks else None,
                ),
            )
        )
    result = Experiment(
        name=NAME,
        title="Distributions of task vectors",
        paper="Figure 2",
        question="Magnitudes of the entries of every expert's task vector, all matrices of the "
        "language model together.",
        line=line,
        seeds=() if seed is None else (seed,),
        x="magnitude of an entry",
        y="share of the entries",
        head="expert",
        columns=(
            "norm",
            "largest / smallest layer",
            "mean magnitude, 1e-6",
            "skewness",
            "modes",
            "rank for 99 % / full",
        ),
        digits=2,
        rows=tuple(rows),
        edges=found.edges,
        shares={
            name: spread.shares for name, spread in zip(found.experts, found.spread, strict=True)
        },
    )
    return result.model_copy(update={"outcome": tuple(outcome(result))})


def outcome(result: Experiment) -> list[str]:
    """Say what came out.

    Args:
        result: the numbers.

    Returns:
        Sentences.
    """
    columns = {name: i for i, name in enumerate(result.columns)}

    def of(name: str) -> list[float]:
        return [v for row in result.rows if (v := row.values[columns[name]]) is not None]

    skewness, modes, norms = of("skewness"), of("modes"), of("norm")
    right, one = sum(s > 0 for s in skewness), sum(m < 1.5 for m in modes)
    count = len(result.rows)
    said = [
        f"Right-skewed: {right} of {count} task vectors (skewness {min(skewness):.2f} to "
        f"{max(skewness):.2f}); on a logarithmic axis {one} of {count} have a single peak.",
        "The paper has full fine-tuning right-skewed and LoRA with several peaks.",
    ]
    if min(norms) > 0:
        said.append(f"The largest norm is {max(norms) / min(norms):.2f} times the smallest.")
    if ratios := of("largest / smallest layer"):
        said.append(
            f"Within one expert, the layers' norms differ by up to a factor of {max(ratios):.2f}."
        )
    return said

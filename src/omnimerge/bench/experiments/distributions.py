"""How are the entries of task vectors spread, after full fine-tuning and with LoRA? Figure 2."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omnimerge.bench.analysis import analyze
from omnimerge.bench.experiments.result import Entry, Experiment

NAME = "distributions"


def run(recipe: Mapping[str, Any] | Path) -> Experiment:
    """Measure the experts' task vectors.

    Args:
        recipe: what names base and experts, or its YAML file.

    Returns:
        The distributions, and what they look like in numbers.
    """
    found = analyze(recipe)
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
    return Experiment(
        name=NAME,
        title="Distributions of task vectors",
        paper="Figure 2",
        question="Magnitudes of the entries of every expert's task vector, all matrices of the "
        "language model together.",
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

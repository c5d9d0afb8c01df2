"""An analysis of task vectors as sections of a dashboard."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

from omnimerge.bench.analysis import Analysis
from omnimerge.bench.spectra import SHARES

Section = dict[str, Any]


def analysis_sections(found: Analysis) -> list[Section]:
    """Return an analysis of task vectors: cosines, norms and ranks by layer, distributions.

    Args:
        found: the analysis.

    Returns:
        Sections.
    """
    sections: list[Section] = [
        {
            "kind": "heatmap",
            "title": "How alike the task vectors are",
            "text": [
                f"Cosine between the experts' task vectors: {found.tensors} tensors, "
                f"{found.entries:,} entries."
            ],
            "rows": list(found.experts),
            "columns": list(found.experts),
            "values": [list(row) for row in found.cosine],
            "digits": 3,
            "low": min(0.0, *(v for row in found.cosine for v in row if v is not None), 0.0),
            "high": 1.0,
            "scale": "cosine similarity",
        }
    ]
    if found.layers:
        sections += [_cosines_by_layer(found)] if len(found.experts) > 1 else []
        sections.append(_norms_by_layer(found))
        sections += _by_kind(found)
    if any(s for matrix in found.matrices for s in matrix.spectra):
        sections += [_rank_lines(found)] if found.layers else []
        sections += [_rank_table(found), _energy_lines(found)]
    sections.append(_magnitudes(found))
    return sections


def _cosines_by_layer(found: Analysis) -> Section:
    pairs = list(combinations(range(len(found.experts)), 2))
    values = [[each.cosine[a][b] for each in found.layers] for a, b in pairs]
    known = [0.0, *(value for row in values for value in row if value is not None)]
    return {
        "kind": "heatmap",
        "title": "How alike they are, by layer",
        "down": "pair",
        "across": "layer",
        "rows": [f"{found.experts[a]} · {found.experts[b]}" for a, b in pairs],
        "columns": [str(each.layer) for each in found.layers],
        "values": values,
        # Cosines near zero are noise: they get no deep colour because all are small.
        "low": min(0.0, *known),
        "high": max(0.2, *known),
        "digits": 3,
        "scale": "cosine similarity",
    }


def _norms_by_layer(found: Analysis) -> Section:
    layers = [each.layer for each in found.layers]
    return {
        "kind": "lines",
        "title": "Norm by layer",
        "x": "layer",
        "y": "Frobenius norm of the task vector",
        "lines": [
            line(name, layers, [each.norms[i] for each in found.layers])
            for i, name in enumerate(found.experts)
        ],
    }


def _by_kind(found: Analysis) -> list[Section]:
    """Heat maps over layers and kinds of matrices, means over the experts."""
    kinds = list(dict.fromkeys(m.kind for m in found.matrices if m.layer is not None))
    layers = [each.layer for each in found.layers]
    places = {(m.layer, m.kind): m for m in found.matrices}

    def heat(title: str, of: Callable[[Any], float | None], scale: str, digits: int) -> Section:
        return {
            "kind": "heatmap",
            "title": title,
            "text": ["Mean over the experts."],
            "down": "layer",
            "across": "matrix",
            "rows": [str(layer) for layer in layers],
            "columns": kinds,
            "values": [
                [of(m) if (m := places.get((layer, kind))) else None for kind in kinds]
                for layer in layers
            ],
            "digits": digits,
            "scale": scale,
        }

    def change(matrix: Any) -> float | None:
        return 100 * statistics.fmean(matrix.norms) / matrix.base_norm if matrix.base_norm else None

    def rank(matrix: Any) -> float | None:
        known = [s.effective_rank for s in matrix.spectra if s]
        return statistics.fmean(known) if known else None

    sections = [heat("Change by layer and matrix", change, "‖τ‖ / ‖base‖, %", 2)]
    if any(rank(m) is not None for m in found.matrices):
        title, scale = "Effective rank by layer and matrix", "exp of the entropy of s / Σ s"
        sections.append(heat(title, rank, scale, 1))
    return sections


def _rank_lines(found: Analysis) -> Section:
    lines = []
    for i, name in enumerate(found.experts):
        places, values = [], []
        for each in found.layers:
            known = [
                s.stable_rank
                for m in found.matrices
                if m.layer == each.layer and (s := m.spectra[i])
            ]
            if known:
                places.append(each.layer)
                values.append(statistics.fmean(known))
        if places:
            lines.append(line(name, places, values))
    return {
        "kind": "lines",
        "title": "Stable rank by layer",
        "x": "layer",
        "y": "stable rank ‖τ‖² / s₁², mean over the layer's matrices",
        "lines": lines,
    }


def _rank_table(found: Analysis) -> Section:
    """Norms and ranks of each expert, means over the matrices."""
    names = ("numerical_rank", "rank_99", "effective_rank", "stable_rank")
    titles = (
        "singular values above s₁ · max(m, n) · 2⁻²³",
        "directions that hold 99 % of the squared norm",
        "exp of the entropy of s / Σ s",
        "squared norm over the largest singular value squared",
    )
    rows = []
    for i, expert in enumerate(found.experts):
        spectra = [s for m in found.matrices if (s := m.spectra[i])]
        shares = [
            s.numerical_rank / min(m.shape[0], math.prod(m.shape[1:]))
            for m in found.matrices
            if (s := m.spectra[i])
        ]
        means = [
            statistics.fmean(getattr(s, name) for s in spectra) if spectra else None
            for name in names
        ]
        change = 100 * found.norms[i] / found.base_norm if found.base_norm else None
        values = [
            found.norms[i],
            change,
            *means,
            100 * statistics.fmean(shares) if shares else None,
        ]
        rows.append({"name": expert, "cells": [{"value": v} for v in values]})
    return {
        "kind": "table",
        "title": "Norms and ranks",
        "text": ["Ranks: means over the matrices."],
        "head": "expert",
        "columns": [
            {"name": "norm", "digits": 3, "scientific": True, "title": "Frobenius norm"},
            {"name": "of the base's", "unit": "%", "digits": 2},
            *(
                {"name": name.replace("_", " ").replace("rank 99", "rank for 99 %"), "title": title}
                for name, title in zip(names, titles, strict=True)
            ),
            {"name": "numerical / full", "unit": "%", "digits": 1},
        ],
        "rows": rows,
    }


def _energy_lines(found: Analysis) -> Section:
    lines = []
    for i, name in enumerate(found.experts):
        held = [s.energy for m in found.matrices if (s := m.spectra[i])]
        if held:
            means = [100 * statistics.fmean(each) for each in zip(*held, strict=True)]
            lines.append(line(name, [100 * share for share in SHARES], means))
    return {
        "kind": "lines",
        "title": "Energy in the first directions",
        "x": "directions kept, % of the full rank",
        "y": "squared norm that they hold, %, mean over the matrices",
        "lines": lines,
    }


def _magnitudes(found: Analysis) -> Section:
    return {
        "kind": "histogram",
        "title": "Magnitudes of the entries",
        "x": "magnitude of an entry of the task vector",
        "y": "share of the entries",
        "edges": list(found.edges),
        "log_x": True,
        "series": [
            {"name": name, "values": list(spread.shares)}
            for name, spread in zip(found.experts, found.spread, strict=True)
        ],
        "digits": 3,
        "notes": [
            f"{name}: mean {spread.mean:.2e}, skewness {spread.skewness:.2f}, "
            f"{spread.modes} peak{'s' if spread.modes != 1 else ''}, "
            f"{100 * spread.zeros:.1f} % exactly zero"
            for name, spread in zip(found.experts, found.spread, strict=True)
        ],
    }


def line(
    name: str, x: Sequence[float], y: Sequence[float], deviation: Sequence[float] = ()
) -> dict[str, Any]:
    """Return a curve with its band.

    Args:
        name: of the curve.
        x: its places.
        y: its values.
        deviation: half of the band; empty: no band.

    Returns:
        A line of a dashboard.
    """
    band = list(zip(y, deviation, strict=True)) if deviation else []
    return {
        "name": name,
        "x": list(x),
        "y": list(y),
        "low": [value - spread for value, spread in band],
        "high": [value + spread for value, spread in band],
    }

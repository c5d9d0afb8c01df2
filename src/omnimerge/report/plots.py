"""Plots as self-contained SVG text."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omnimerge.search import SearchResult

_INK, _MUTED, _GRID = "#1f2933", "#616e7c", "#e4e7eb"
_CURVE, _CHOICE = "#2b6cb0", "#c05621"


def search_curves(result: SearchResult) -> str:
    """Draw the criterion over the coefficient and, below it, the accuracy where it is known.

    Args:
        result: what a search found.

    Returns:
        An ``<svg>`` element.
    """
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    labelled = [p.accuracy for p in result.points if p.accuracy is not None]
    panels = 2 if labelled else 1
    with mpl.rc_context({"svg.hashsalt": "omnimerge", "font.size": 10, "axes.edgecolor": _MUTED}):
        figure, axes = plt.subplots(
            panels, 1, sharex=True, figsize=(6.4, 2.3 * panels + 0.4), squeeze=False
        )
        xs = [point.alpha for point in result.points]
        scored = [p for p in result.points if p.score is not None]
        scores = [p.score for p in scored if p.score is not None]
        _panel(axes[0, 0], [p.alpha for p in scored], scores, result.selected)
        axes[0, 0].set_title(
            f"{result.criterion}: answers that change (fewer is better)",
            loc="left", fontsize=10, color=_INK,
        )  # fmt: skip
        axes[0, 0].set_ylim(bottom=0)
        if labelled:
            _panel(axes[1, 0], xs, labelled, result.selected)
            axes[1, 0].set_title(
                "accuracy on held-out labels (the choice never sees it)",
                loc="left", fontsize=10, color=_INK,
            )  # fmt: skip
        share = " (the donor's share)" if result.recipe.get("method") == "adamms" else ""
        axes[-1, 0].set_xlabel(result.parameter + share, color=_INK)
        axes[-1, 0].set_xticks(xs)
        figure.tight_layout()
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None}, transparent=True)
        plt.close(figure)
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def _panel(axis: Any, xs: Sequence[float], ys: Sequence[float], selected: float) -> None:
    axis.plot(xs, ys, color=_CURVE, marker="o", markersize=5, linewidth=1.8, clip_on=False)
    chosen = [(x, y) for x, y in zip(xs, ys, strict=True) if x == selected]
    for x, y in chosen:
        axis.plot([x], [y], color=_CHOICE, marker="o", markersize=9, linestyle="none")
        axis.annotate(
            "chosen", (x, y), xytext=(0, 9), textcoords="offset points",
            ha="center", color=_CHOICE, fontsize=9,
        )  # fmt: skip
    axis.grid(axis="y", color=_GRID)
    axis.set_axisbelow(True)
    axis.margins(y=0.2)
    axis.tick_params(colors=_MUTED)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)

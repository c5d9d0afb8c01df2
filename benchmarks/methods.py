"""Time of the spectral methods beside the published loops, and on LoRA adapters of a 7B model.

    python benchmarks/methods.py --adam --json benchmarks/results/methods.json
    python benchmarks/methods.py --only "optmerge lora" --yardstick-steps 20

The yardstick of a row is this file's own straight re-statement of the published algorithm in plain
torch, float32 on all cores, from the same tensors. Ours and yardstick take turns. Every row has the
relative error (Frobenius) between the merged task vectors of the two. The whole loops take minutes
at 896x4864, and all threads wait for the slowest: on a machine that is busy otherwise, do not.

Matrices are synthetic: a base, and experts of base plus a product of low rank plus a little noise.
Adapters are the product alone, given as factors.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omnimerge import merge_tensors
from omnimerge.methods import LowRank

STEPS = 300  # of the published loops, and of our methods
SPECTRAL = ("tsv", "iso_c", "iso_cts", "optmerge", "swudi", "aswudi", "knots", "robustmerge")


@dataclass(frozen=True)
class Sizes:
    """Shapes and ranks of a run.

    `checked` are the shapes at which merged adapters are compared with merged dense matrices.
    """

    square: tuple[int, int] = (896, 896)
    wide: tuple[int, int] = (896, 4864)
    rank: int = 32
    adapted: tuple[tuple[int, int], ...] = ((3584, 3584), (3584, 18944))
    checked: tuple[tuple[int, int], ...] = ((448, 448), (448, 2368))
    adapter_rank: int = 16


SMALL = Sizes((40, 40), (40, 216), 4, ((64, 64), (64, 340)), ((64, 64), (64, 340)), 4)


def normal(seed: int, *shape: int, std: float) -> Tensor:
    """Draw a float32 matrix."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * std


def adapters(shape: tuple[int, int], count: int, rank: int) -> list[LowRank]:
    """Task vectors of low rank whose entries are about 1e-3."""
    m, n = shape
    spread = math.sqrt(1e-3 / math.sqrt(rank))
    return [
        LowRank(normal(10 * i + 1, m, rank, std=spread), normal(10 * i + 2, rank, n, std=spread))
        for i in range(count)
    ]


def experts(
    shape: tuple[int, int], count: int, rank: int, noise: float
) -> tuple[list[Tensor], Tensor]:
    """Dense experts and their base."""
    base = normal(0, *shape, std=0.02)
    products = (factors.dense() for factors in adapters(shape, count, rank))
    return [base + p + normal(10 * i + 3, *shape, std=noise) for i, p in enumerate(products)], base


# The published algorithms. Each returns the merged task vector and the seconds spent in steps.


def _stacked(models: list[Tensor], base: Tensor) -> tuple[Tensor, Tensor]:
    """Task vectors and their squared norms, the latter to divide by."""
    tau = torch.stack([model - base for model in models])
    return tau, tau.square().sum(dim=(1, 2), keepdim=True)


def _truncated(matrices: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """U_k S_k V_kᵀ and S_k V_kᵀ of each."""
    u, s, vt = torch.linalg.svd(matrices, full_matrices=False)
    rows = s[:, :kept, None] * vt[:, :kept]
    return u[:, :, :kept] @ rows, rows


def _descend(
    start: Tensor, centres: Tensor, rows: Tensor, norms: Tensor, steps: int, optimiser: Any
) -> tuple[Tensor, float]:
    """Minimise Σ_t ‖(τ - centre_t) rows_tᵀ‖² / ‖τ_t‖² by autograd and an optimiser of torch."""
    begun = time.perf_counter()
    tau = start.clone().requires_grad_()
    stepper = optimiser([tau])
    for _ in range(steps):
        stepper.zero_grad()
        (((tau - centres) @ rows.transpose(1, 2)).square() / norms).sum().backward()
        stepper.step()
    return tau.detach(), time.perf_counter() - begun


def published_wudi(models: list[Tensor], base: Tensor, steps: int) -> tuple[Tensor, float]:
    """WUDI: Adam from the sum."""
    tau, norms = _stacked(models, base)
    return _descend(tau.sum(0), tau, tau, norms, steps, partial(torch.optim.Adam, lr=1e-5))


def published_optmerge_lora(models: list[Tensor], base: Tensor, steps: int) -> tuple[Tensor, float]:
    """OptMerge for LoRA experts: truncated task vectors, SGD with momentum from the mean."""
    tau, norms = _stacked(models, base)
    centres, rows = _truncated(tau, min(base.shape) // len(models))
    optimiser = partial(torch.optim.SGD, lr=1e-4, momentum=0.9)
    return _descend(tau.mean(0), centres, rows, norms, steps, optimiser)


def published_optmerge_full(models: list[Tensor], base: Tensor, steps: int) -> tuple[Tensor, float]:
    """OptMerge for full fine-tuning: truncated around the mean, Adam from the sum."""
    tau, norms = _stacked(models, base)
    kept, mean = min(base.shape) // len(models), tau.mean(0)
    centres = _truncated(tau - mean, kept)[0] + mean
    rows = _truncated(tau, kept)[1]
    return _descend(tau.sum(0), centres, rows, norms, steps, partial(torch.optim.Adam, lr=1e-5))


def published_swudi(
    models: list[Tensor], base: Tensor, _steps: int | None = None, *, adaptive: bool = False
) -> tuple[Tensor, float]:
    """SWUDI, or SWUDI-A: the eigenvectors of the n x n matrix C; in the dtype of the models."""
    tau, norms = _stacked(models, base)
    grams = tau.transpose(1, 2) @ tau / norms
    values, vectors = torch.linalg.eigh(grams.sum(0))
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    if adaptive:
        rank = math.ceil(float(values.sqrt().sum().square() / values.sum()))
        gain = torch.ones_like(values)
    else:
        rank = math.ceil(0.65 * len(values))
        gain = 1 - torch.exp(-300.0 * values)
    gain[rank:] = 0
    start, pull = tau.sum(0), (tau @ grams).sum(0)
    ahead = pull @ vectors - start @ vectors * values
    return start + ahead * (gain / values.clamp(min=1e-8)) @ vectors.T, 0.0


def published_robustmerge(deltas: list[LowRank], base: Tensor) -> Tensor:
    """RobustMerge on the factors, with the constants of its code."""
    right, left, total = torch.zeros(()), torch.zeros(()), torch.zeros(())
    for delta in deltas:
        kept = []
        for factor in (delta.left, delta.right):
            limit = factor.abs().flatten().sort().values[int(factor.numel() * 0.8) - 1]
            kept.append(torch.where(factor.abs() >= limit, factor, torch.zeros(())))
        strength = delta.right.abs().sum(1) / kept[1].abs().sum(1)
        strength = strength.clamp(min=float(strength.sort().values[int(len(strength) * 0.8)]))
        left, right = left + 2 * strength * kept[0], right + 2 * kept[1]
        total = total + strength
    return base + left / total @ right


# Rows


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """‖a - b‖ / ‖b‖."""
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


@dataclass(frozen=True)
class Pair:
    """A method beside its published loop."""

    case: str
    shape: tuple[int, int]
    count: int
    rank: int
    ours: Callable[..., Tensor]
    yardstick: Callable[..., tuple[Tensor, float]]
    aim: float
    steps: int | None  # of the yardstick; None where it has none
    # Compare with the yardstick in float64: in float32 rounding, amplified by 1 / λ, decides.
    exact: bool = False
    noise: float = 1e-5

    def run(self, runs: int) -> dict[str, Any]:
        """Time both in turns and compare what they give."""
        models, base = experts(self.shape, self.count, self.rank, self.noise)
        times: dict[str, list[float]] = {"ours": [], "yardstick": []}
        for _ in range(runs):
            begun = time.perf_counter()
            ours = self.ours(models, base)
            times["ours"].append(time.perf_counter() - begun)
            begun = time.perf_counter()
            theirs, stepping = self.yardstick(models, base, self.steps)
            whole = time.perf_counter() - begun
            more = STEPS / self.steps - 1 if self.steps else 0
            times["yardstick"].append(whole + stepping * more)
        if self.steps and self.steps < STEPS:
            ours = self.ours(models, base, iterations=self.steps)
        if self.exact:
            theirs, _ = self.yardstick([m.double() for m in models], base.double(), self.steps)
        ratio = statistics.median(
            b / a for a, b in zip(times["ours"], times["yardstick"], strict=True)
        )
        row = {
            "ours_s": statistics.median(times["ours"]),
            "yardstick_s": statistics.median(times["yardstick"]),
            "ratio": ratio,
            "error": relative_error(ours - base, theirs),
            "aim": f">= {self.aim:g}x",
            "met": ratio >= self.aim,
        }
        if self.steps and self.steps < STEPS:
            row["extrapolated_from_steps"] = self.steps
        return row


@dataclass(frozen=True)
class Adapters:
    """A method on factors; compared with itself on dense matrices at a smaller size."""

    case: str
    shape: tuple[int, int]
    checked: tuple[int, int]
    rank: int
    aim: float = 2.0
    count: int = 5

    def run(self, runs: int) -> dict[str, Any]:
        """Time it, and compare."""
        method = self.case.split()[0]
        deltas, base = adapters(self.shape, self.count, self.rank), normal(0, *self.shape, std=0.02)
        times = []
        for _ in range(runs):
            begun = time.perf_counter()
            merge_tensors(method, deltas, base)
            times.append(time.perf_counter() - begun)
        seconds = statistics.median(times)
        return {
            "ours_s": seconds,
            "error": self._error(method),
            "checked_at": list(self.checked),
            "aim": f"<= {self.aim:g} s",
            "met": seconds <= self.aim,
        }

    def _error(self, method: str) -> float:
        deltas, base = adapters(self.checked, self.count, self.rank), torch.zeros(self.checked)
        if method == "robustmerge":
            dense = published_robustmerge(deltas, base)
        elif method in ("swudi", "aswudi"):
            # In float64: in float32 noise among the zero eigenvalues decides how many are used.
            tau = [delta.left.double() @ delta.right.double() for delta in deltas]
            dense, _ = published_swudi(tau, base.double(), adaptive=method == "aswudi")
        else:
            dense = merge_tensors(method, [delta.dense() for delta in deltas], base)
        return relative_error(merge_tensors(method, deltas, base), dense)


def rows_of(sizes: Sizes, steps: int, adam: bool) -> Iterator[Pair | Adapters]:
    """All rows, in the order of the table."""
    loops = (
        ("optmerge lora", "optmerge", {"variant": "lora"}, published_optmerge_lora, 50.0),
        ("optmerge full", "optmerge", {"variant": "full"}, published_optmerge_full, 5.0),
        ("wudi", "wudi", {}, published_wudi, 5.0),
    )
    for case, method, keywords, loop, aim in loops:
        ours = partial(merge_tensors, method, **keywords)
        for shape in (sizes.square, sizes.wide):
            yield Pair(case, shape, 5, sizes.rank, ours, loop, aim, steps)
            if case != "optmerge lora":  # adapters that were merged into float32 checkpoints
                exact = Pair(f"{case}, no noise", shape, 5, sizes.rank, ours, loop, aim, steps)
                yield replace(exact, noise=0.0)
    for method in ("swudi", "aswudi"):
        loop = partial(published_swudi, adaptive=method == "aswudi")
        for count in (2, 3, 5):
            ours = partial(merge_tensors, method)
            yield Pair(method, sizes.wide, count, sizes.rank, ours, loop, 3.0, None, exact=True)
    for shape, checked in zip(sizes.adapted, sizes.checked, strict=True):
        for method in (*SPECTRAL, *(["wudi"] if adam else [])):
            yield Adapters(f"{method} of adapters", shape, checked, sizes.adapter_rank)


def label(row: Pair | Adapters) -> str:
    """What --only looks into."""
    m, n = row.shape
    return f"{row.case} {m}x{n}, {row.count} experts"


def main() -> None:
    """Run the rows in turns, print and save the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also save the table here")
    parser.add_argument("--only", default="", help="rows whose label has this, such as 'lora 896x'")
    parser.add_argument("--adam", action="store_true", help="also wudi of adapters: minutes")
    parser.add_argument("--small", action="store_true", help="tiny shapes: whether it runs")
    parser.add_argument(
        "--yardstick-steps", type=int, default=STEPS, metavar="N",
        help=f"run N of the {STEPS} steps of the published loops, and extrapolate their time",
    )  # fmt: skip
    options = parser.parse_args()
    steps = options.yardstick_steps
    if not 1 <= steps <= STEPS:
        parser.error(f"--yardstick-steps: from 1 to {STEPS}")
    if options.runs < 1:
        parser.error("--runs: 1 at least")
    wanted = [
        row
        for row in rows_of(SMALL if options.small else Sizes(), steps, options.adam)
        if options.only in label(row)
    ]
    if not wanted:
        parser.error(f"--only: no row has {options.only!r}")
    cases = {row.case for row in wanted if not options.small}
    for row in rows_of(SMALL, 2, options.adam):  # import and compile what comes with the first run
        if row.case in cases:
            row.run(1)
    machine = {
        "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "processor": platform.machine(), "python": platform.python_version(),
        "torch": torch.__version__, "runs": options.runs,
    }  # fmt: skip
    print(machine)
    print(
        f"{'case':34}{'experts':>8}{'ours s':>9}{'yardstick s':>13}{'ratio':>8}"
        f"{'aim':>9}{'met':>5}{'error':>10}"
    )
    rows = []
    for row in wanted:
        found = {"case": row.case, "shape": list(row.shape), "experts": row.count}
        rows.append({**found, **row.run(options.runs)})
        _print(rows[-1])
        if options.json:  # after every row, since some take minutes
            options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


def _print(row: dict[str, Any]) -> None:
    m, n = row["shape"]
    case, ratio, yardstick, note = f"{row['case']} {m}x{n}", "", "", ""
    if "ratio" in row:
        ratio, yardstick = f"{row['ratio']:.1f}", f"{row['yardstick_s']:.2f}"
    if "extrapolated_from_steps" in row:
        note = f"  extrapolated from {row['extrapolated_from_steps']} steps"
    if "checked_at" in row:
        note = f"  error at {row['checked_at'][0]}x{row['checked_at'][1]}"
    print(
        f"{case:34}{row['experts']:8}{row['ours_s']:9.2f}{yardstick:>13}{ratio:>8}"
        f"{row['aim']:>9}{'yes' if row['met'] else 'no':>5}{row['error']:10.1e}{note}",
        flush=True,
    )


if __name__ == "__main__":
    main()

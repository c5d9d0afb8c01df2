"""What task vectors look like: norms, ranks, how alike experts are, how their entries are spread.

Streamed tensor by tensor: at no time more than one tensor of all experts is in memory, and LoRA
experts are measured on their factors. For the miniatures as for real checkpoints.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from omnimerge.arch import layer_index
from omnimerge.bench.spectra import EDGES, Histogram, Spectrum, Spread, dot, spectrum
from omnimerge.engine import MergePlan, Recipe, TensorJob, build_plan, load_recipe
from omnimerge.engine.slices import low_rank_deltas
from omnimerge.errors import CheckpointError, NonFiniteError, RecipeError
from omnimerge.methods import LowRank

ANALYSIS_NAME = "analysis.json"
# A method on task vectors that takes factors: the plan then offers them. Nothing is merged.
_PLANNED = "wudi"
_SHOWN = 1e-4  # share of the entries that makes a bin worth showing
Pairs = tuple[tuple[float | None, ...], ...]
"""Expert x expert; None where one of the two changes nothing."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TensorVectors(_Strict):
    """The experts' task vectors of one tensor.

    Attributes:
        tensor: its name in the target.
        kind: which of a layer's tensors, such as ``attn.q``; for others the slot.
        layer: of the language model; None outside of it.
        shape: of the tensor.
        base_norm: Frobenius norm of the base's tensor.
        norms: of the task vectors.
        spectra: one per expert; None for what is no matrix, or changes nothing, or was not asked.
        cosine: between the task vectors.
    """

    tensor: str
    kind: str
    layer: int | None
    shape: tuple[int, ...]
    base_norm: float
    norms: tuple[float, ...]
    spectra: tuple[Spectrum | None, ...]
    cosine: Pairs


class LayerVectors(_Strict):
    """The experts' task vectors of one layer, all of its tensors together.

    Attributes:
        layer: its number.
        base_norm: of the base.
        norms: of the task vectors.
        cosine: between them.
    """

    layer: int
    base_norm: float
    norms: tuple[float, ...]
    cosine: Pairs


class Analysis(_Strict):
    """The task vectors of all experts of a recipe: ``analysis.json``.

    Attributes:
        kind: what the file is.
        experts: their names.
        base: the base, as the recipe has it.
        select: which tensors are compared.
        tensors: how many.
        entries: how many entries they have.
        base_norm: Frobenius norm of the base's tensors together.
        norms: of the experts' task vectors.
        cosine: between the experts' task vectors.
        layers: the same by layer.
        matrices: the same by tensor, with spectra.
        edges: of the bins of `spread`, in units of the weights.
        spread: one per expert.
    """

    kind: Literal["task vectors"] = "task vectors"
    experts: tuple[str, ...]
    base: str
    select: str
    tensors: int
    entries: int
    base_norm: float
    norms: tuple[float, ...]
    cosine: Pairs
    layers: tuple[LayerVectors, ...]
    matrices: tuple[TensorVectors, ...]
    edges: tuple[float, ...]
    spread: tuple[Spread, ...]

    def write(self, file: Path) -> Path:
        """Write the analysis as JSON.

        Args:
            file: the file.

        Returns:
            `file`.
        """
        from omnimerge.search.store import write_atomically

        return write_atomically(file, self.model_dump_json(indent=1) + "\n")


def analyze(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    names: Sequence[str] | None = None,
    select: str | None = None,
    spectra: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
) -> Analysis:
    """Measure the task vectors of a recipe's models.

    Args:
        recipe: what names base and models; its method and parameters do not matter.
        names: of the experts; default: of their folders.
        select: which tensors: `all`, `language_model` or `linear`; default: the recipe's `select`,
            else `linear`.
        spectra: whether to decompose the matrices, by far the most of the work.
        on_progress: called with (bytes of tensors done, bytes of all).

    Returns:
        The analysis.

    Raises:
        RecipeError: if the recipe is wrong or has no base.
        NonFiniteError: if a checkpoint holds NaN or infinity.
    """
    plan = plan_of(recipe, select=select)
    experts = tuple(names) if names else expert_names(plan.recipe)
    collector = _Collector(len(experts))
    total, done = sum(job.output.nbytes for job in plan.merged), 0
    for job in plan.merged:
        collector.take(plan, job, spectra)
        done += job.output.nbytes
        if on_progress:
            on_progress(done, total)
    return collector.finish(plan, experts)


def plan_of(
    recipe: str | Path | Mapping[str, Any] | Recipe, *, select: str | None = None
) -> MergePlan:
    """Plan nothing but the reading of task vectors.

    Args:
        recipe: what names base and models.
        select: which tensors; default: the recipe's `select`, else `linear`.

    Returns:
        A plan whose jobs know base and models, and offer factors where these are adapters.

    Raises:
        RecipeError: if the recipe is wrong or has no base.
    """
    found = load_recipe(recipe)
    if found.base is None:
        raise RecipeError(["base: task vectors are taken from it; give the common ancestor"])
    raw = found.model_dump(exclude_unset=True)
    raw |= {"method": _PLANNED, "parameters": {}, "select": select or found.select or "linear"}
    raw["models"] = [
        {key: value for key, value in entry.items() if key != "weight"} for entry in raw["models"]
    ]
    kept = [each for each in raw.get("overrides", ()) if each.get("keep")]
    raw.pop("lines", None)
    return build_plan(load_recipe({**raw, "overrides": kept}), ancestor=False)


def expert_names(recipe: Recipe) -> tuple[str, ...]:
    """Name a recipe's models after their folders.

    Args:
        recipe: the recipe.

    Returns:
        One name per model, all different.
    """
    names: list[str] = []
    for entry in recipe.models:
        name = Path(entry.adapter or recipe.model_reference(entry)).name
        same = sum(re.sub(r" \(\d+\)$", "", other) == name for other in names)
        names.append(f"{name} ({same + 1})" if same else name)
    return tuple(names)


def task_vectors_of(plan: MergePlan, job: TensorJob) -> tuple[Tensor, list[Tensor | LowRank]]:
    """Read the base's tensor and the task vectors of all experts.

    Args:
        plan: from `plan_of`.
        job: one of its merged jobs.

    Returns:
        The base's tensor, float32, and one task vector per expert, as factors where all are
        adapters.

    Raises:
        NonFiniteError: if one holds NaN or infinity.
    """
    checkpoint, name = job.base  # type: ignore[misc]
    base = checkpoint.read_tensor(name).float().reshape(job.output.shape)
    found: list[Tensor | LowRank] = []
    found += low_rank_deltas(plan, job) or [
        model.read_tensor(name).float().reshape(job.output.shape) - base
        for model, name in job.sources
    ]
    for delta, (model, name) in zip(found, job.sources, strict=True):
        finite = delta.isfinite() if isinstance(delta, LowRank) else torch.isfinite(delta).all()
        if not finite:
            raise NonFiniteError(
                f"tensor {name!r} of {model.reference}, or of the base, holds NaN or infinity; "
                "repair the checkpoint"
            )
    return base, found


def read_analysis(file: Path) -> Analysis:
    """Read an analysis.

    Args:
        file: what `Analysis.write` wrote.

    Returns:
        The analysis.

    Raises:
        CheckpointError: if it cannot be read or is none.
    """
    try:
        return Analysis.model_validate_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {file} ({error.strerror})") from error
    except (ValidationError, UnicodeDecodeError):
        raise CheckpointError(
            f"{file} holds no analysis of task vectors; write one with `omnimerge bench analyze`"
        ) from None


class _Collector:
    """What is known of the tensors measured so far."""

    def __init__(self, experts: int) -> None:
        self._matrices: list[TensorVectors] = []
        self._sums: dict[int | None, _Sums] = {}
        self._whole = _Sums(experts)
        self._spreads = [Histogram() for _ in range(experts)]
        self._entries = 0

    def take(self, plan: MergePlan, job: TensorJob, spectra: bool) -> None:
        """Measure one tensor."""
        base, deltas = task_vectors_of(plan, job)
        products = torch.tensor([[dot(a, b) for b in deltas] for a in deltas], dtype=torch.float64)
        layer, squared = layer_index(job.slot), float(base.double().square().sum())
        wanted = spectra and base.dim() >= 2
        self._whole.add(products, squared)
        self._sums.setdefault(layer, _Sums(len(deltas))).add(products, squared)
        self._entries += base.numel()
        self._matrices.append(
            TensorVectors(
                tensor=job.output.name,
                kind=kind_of(job.slot),
                layer=layer,
                shape=tuple(job.output.shape),
                base_norm=math.sqrt(squared),
                norms=_norms(products),
                spectra=tuple(spectrum(delta) if wanted else None for delta in deltas),
                cosine=_cosines(products),
            )
        )
        for histogram, delta in zip(self._spreads, deltas, strict=True):
            histogram.add(delta.dense() if isinstance(delta, LowRank) else delta)

    def finish(self, plan: MergePlan, experts: tuple[str, ...]) -> Analysis:
        """Put everything together."""
        least = _SHOWN * self._entries
        used = [n for each in self._spreads for n, count in enumerate(each.counts) if count > least]
        first, last = min(used, default=0), max(used, default=0)
        return Analysis(
            experts=experts,
            base=str(plan.recipe.base),
            select=plan.recipe.selection,
            tensors=len(self._matrices),
            entries=self._entries,
            base_norm=math.sqrt(self._whole.base),
            norms=_norms(self._whole.products),
            cosine=_cosines(self._whole.products),
            layers=tuple(
                LayerVectors(
                    layer=layer,
                    base_norm=math.sqrt(sums.base),
                    norms=_norms(sums.products),
                    cosine=_cosines(sums.products),
                )
                for layer, sums in sorted(
                    (layer, sums) for layer, sums in self._sums.items() if layer is not None
                )
            ),
            matrices=tuple(self._matrices),
            edges=tuple(EDGES[first : last + 2]),
            spread=tuple(each.finish(first, last) for each in self._spreads),
        )


class _Sums:
    """Products of task vectors, and the base's squared norm, added up."""

    def __init__(self, experts: int) -> None:
        self.products = torch.zeros(experts, experts, dtype=torch.float64)
        self.base = 0.0

    def add(self, products: Tensor, base: float) -> None:
        self.products += products
        self.base += base


def kind_of(slot: str) -> str:
    """Return which of a layer's tensors a slot is.

    Args:
        slot: such as ``llm.layers.3.attn.q.weight``.

    Returns:
        Such as ``attn.q``; outside of layers the slot without its first and last part.
    """
    inner = re.sub(r"^.*?\blayers\.\d+\.", "", slot)
    inner = inner if inner != slot else slot.partition(".")[2] or slot
    return re.sub(r"\.weight(?=$|@)", "", inner)


def _norms(products: Tensor) -> tuple[float, ...]:
    return tuple(products.diagonal().clamp(min=0).sqrt().tolist())


def _cosines(products: Tensor) -> Pairs:
    norms = _norms(products)
    return tuple(
        tuple(
            max(-1.0, min(1.0, value / (norms[i] * norms[j]))) if norms[i] * norms[j] else None
            for j, value in enumerate(row)
        )
        for i, row in enumerate(products.tolist())
    )

"""A plan of a merge: one job per output tensor, and what it will read, write and hold."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omnimerge.arch import (
    Alignment,
    Merged,
)
from omnimerge.checkpoint import (
    Checkpoint,
    OutputTensor,
)
from omnimerge.checkpoint.dtypes import item_size
from omnimerge.engine.recipe import Recipe
from omnimerge.methods import MergeMethod

CHUNK_ELEMENTS = 1 << 18
# Entries that are measured at once: large enough that what a measurement costs by itself is small.
MEASURED_ELEMENTS = 1 << 20
# Per model: counts of its magnitudes, twice as they are added up, and blocks of its task vector.
_MEASURING = 1 << 22


@dataclass(frozen=True, slots=True)
class TensorJob:
    """What happens to one output tensor.

    Attributes:
        output: name, dtype and shape of the result.
        slot: its slot.
        sources: (checkpoint, tensor) per model, in the order the method wants; empty if kept.
        base: (checkpoint, tensor) of the common ancestor, where the method needs it.
        parameters: the method's keywords for this tensor.
        depth: 0 for the language model's first layer to 1 for its last; None outside of them.
        reason: why the tensor is kept; empty if it is merged.
        mapped: how each model, and last the base where it is needed, gets to it.
        own: (first, one past the last) element of runs that stay the target's; increasing.
    """

    output: OutputTensor
    slot: str
    sources: tuple[tuple[Checkpoint, str], ...]
    base: tuple[Checkpoint, str] | None
    parameters: Mapping[str, Any]
    depth: float | None
    reason: str
    mapped: tuple[Merged, ...] = ()
    own: tuple[tuple[int, int], ...] = ()

    @property
    def merged(self) -> bool:
        """Whether the tensor is merged; otherwise the target's is copied."""
        return not self.reason


@dataclass(frozen=True)
class MergePlan:
    """Everything that a merge will do.

    Attributes:
        recipe: the recipe.
        target: the target checkpoint.
        models: the models, in the recipe's order.
        base: the base checkpoint, if the recipe has one.
        alignments: how each model, and last the base where it is needed, maps onto the target.
        jobs: one per output tensor, in the target's file order.
        shards: the output's files, as lists of tensors.
        forced: names of gates that were waived.
    """

    recipe: Recipe
    target: Checkpoint
    models: tuple[Checkpoint, ...]
    base: Checkpoint | None
    alignments: tuple[Alignment, ...]
    jobs: tuple[TensorJob, ...]
    shards: tuple[tuple[OutputTensor, ...], ...]
    forced: tuple[str, ...]

    @property
    def method(self) -> MergeMethod:
        """The merge method."""
        return self.recipe.merge_method

    @property
    def merged(self) -> list[TensorJob]:
        """The jobs that merge."""
        return [job for job in self.jobs if job.merged]

    @property
    def bytes_to_read(self) -> int:
        """Bytes of tensor data that the merge reads."""
        total = 0
        for job in self.jobs:
            inputs = [*job.sources, *([job.base] if job.base else [])]
            inputs = inputs or [(self.target, job.output.name)]
            total += sum(checkpoint.tensors[name].nbytes for checkpoint, name in inputs)
        return total

    @property
    def bytes_to_write(self) -> int:
        """Bytes of tensor data that the merge writes."""
        return sum(job.output.nbytes for job in self.jobs)

    @property
    def peak_memory(self) -> int:
        """Bytes that the buffers of all workers take, an estimate from above, without a limit."""
        return worker_count() * self.largest

    @property
    def largest(self) -> int:
        """Bytes that the buffers for the largest slice take: below this, no limit can be kept."""
        return max((self.memory_of(job) for job in self.jobs), default=0)

    @property
    def memory_per_element(self) -> int:
        """Bytes that the buffers take per element of a slice: float32 beside the widest form."""
        return 8 * (len(self.models) + 4)

    @property
    def whole_matrices(self) -> bool:
        """Whether the method takes matrices whole, however large they are."""
        return self.method.slices == "whole"

    def memory_of(self, job: TensorJob, elements: int = CHUNK_ELEMENTS) -> int:
        """Estimate from above what the buffers for a slice of a tensor take.

        Args:
            job: the tensor.
            elements: of a slice.

        Returns:
            Bytes; for a method that takes whole matrices, those of the matrix. With what reading
            adapters takes, and what the method measures beforehand.
        """
        if not job.merged:
            return self.memory_per_element * elements
        if self.method.slices == "rows" and job.output.shape:
            elements = max(elements, job.output.shape[-1])
        buffers = self.memory_per_element * (
            _numel(job.output) if self.whole_matrices else elements
        )
        return buffers + self._memory_to_read(job) + self.memory_to_measure(job)

    def memory_to_measure(self, job: TensorJob) -> int:
        """Estimate from above what one thread takes to measure a slice of a tensor.

        Args:
            job: a tensor that is merged.

        Returns:
            Bytes; 0 if the method has to know nothing beforehand.
        """
        if self.method.statistics is None:
            return 0
        numel = min(_numel(job.output), MEASURED_ELEMENTS)
        inputs = [*job.sources, *([job.base] if job.base else [])]
        stored = sum(item_size(each.tensors[name].dtype) for each, name in inputs)
        return numel * stored + _MEASURING * len(inputs) + self._memory_to_read(job)

    def _memory_to_read(self, job: TensorJob) -> int:
        """What computing the inputs takes that are not stored as they are: one at a time."""
        inputs = [*job.sources, *([job.base] if job.base else [])]
        return max((each.memory_of(name) for each, name in inputs), default=0)

    def kept_reasons(self) -> dict[str, int]:
        """Count the kept tensors by reason.

        Returns:
            Reason -> number of tensors, most frequent first.
        """
        counts: dict[str, int] = {}
        for job in self.jobs:
            if not job.merged:
                counts[job.reason] = counts.get(job.reason, 0) + 1
        return dict(sorted(counts.items(), key=lambda pair: -pair[1]))

    def to_dict(self) -> dict[str, Any]:
        """Return the plan for JSON."""
        return {
            "method": self.method.name,
            "parameters": self.recipe.all_parameters,
            "target": self.target.location,
            "models": [model.location for model in self.models],
            "base": self.base.location if self.base else None,
            "select": self.recipe.selection,
            "tensors": {"merged": len(self.merged), "kept": len(self.jobs) - len(self.merged)},
            "kept_reasons": self.kept_reasons(),
            "shards": len(self.shards),
            "bytes_to_read": self.bytes_to_read,
            "bytes_to_write": self.bytes_to_write,
            "peak_memory": self.peak_memory,
            "largest_memory": self.largest,
            "whole_matrices": self.whole_matrices,
            "ancestor": [a.ancestor.to_dict() if a.ancestor else None for a in self.alignments],
            "jobs": [
                {
                    "target": job.output.name,
                    "action": "merge" if job.merged else "keep",
                    "reason": job.reason,
                    "sources": [list(merged.sources) for merged in job.mapped],
                    "rule": ", ".join(dict.fromkeys(m.rule for m in job.mapped if m.rule)),
                }
                for job in self.jobs
            ],
        }


def worker_count() -> int:
    """Return how many threads a merge uses."""
    return max(1, min(4, os.cpu_count() or 1))


def _numel(tensor: OutputTensor) -> int:
    return tensor.nbytes // item_size(tensor.dtype)

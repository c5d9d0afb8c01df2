"""What an executor is: it gets a plan and an output whose places are known, and fills them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from omnimerge.checkpoint import CheckpointWriter
from omnimerge.checkpoint.dtypes import item_size
from omnimerge.engine.inputs import InputFiles
from omnimerge.engine.plan import CHUNK_ELEMENTS, MergePlan, TensorJob
from omnimerge.engine.slices import slices_of

EXECUTORS = ("local", "ray")

Report = Callable[[int], None]
"""Called with the bytes that were written since the last call, from any thread."""


@dataclass(frozen=True)
class Task:
    """What one thread does without a break.

    Attributes:
        number: of the job in the plan.
        job: the output tensor.
        slices: (first element, one past the last) of what is to be computed, in order.
    """

    number: int
    job: TensorJob
    slices: tuple[tuple[int, int], ...]

    @property
    def nbytes(self) -> int:
        """Bytes that it writes."""
        return sum(stop - start for start, stop in self.slices) * item_size(self.job.output.dtype)


class Executor(Protocol):
    """Computes what is missing of an output, and writes it.

    Attributes:
        hashes: whether it gives the writer the checksums of the files; else the writer takes them
            as they grow.
        devices: accelerators that it computes on, such as ``{"cuda:0": "NVIDIA H200"}``; empty for
            the CPU.
    """

    hashes: bool
    devices: Mapping[str, str]

    def run(
        self, plan: MergePlan, files: InputFiles, writer: CheckpointWriter, report: Report
    ) -> None:
        """Write everything that the writer does not have yet.

        Args:
            plan: what to do.
            files: its inputs, as they were when it began.
            writer: the output.
            report: gets the bytes written.
        """

    def close(self) -> None:
        """Let go of what it holds."""


def tasks_left(
    plan: MergePlan, writer: CheckpointWriter, elements: int = CHUNK_ELEMENTS
) -> Iterator[Task]:
    """Give what is not written yet, in file order: reads and writes go forward through files.

    A tensor that the method has to know as a whole is one task: its thread knows it then.

    Args:
        plan: what to do.
        writer: the output.
        elements: of a slice, about.

    Yields:
        Tasks, most of them of one slice.
    """
    known = plan.method.new_statistics(plan.recipe.model_count(), plan.recipe.all_parameters)
    for number, job in enumerate(plan.jobs):
        size = item_size(job.output.dtype)
        slices = [
            (start, stop)
            for start, stop in slices_of(plan, job, elements)
            if start == stop or not writer.has(job.output.name, start * size, stop * size)
        ]
        if not slices:
            continue
        if job.merged and known and known.scope == "tensor":
            yield Task(number, job, tuple(slices))
        else:
            yield from (Task(number, job, (each,)) for each in slices)

"""Keep what a plan reads close to where it is merged, for those who merge more than once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from omnimerge.engine.slices import SliceWorker, inputs_of, low_rank_deltas, slices_of
from omnimerge.errors import OmnimergeError

if TYPE_CHECKING:
    from omnimerge.checkpoint import Checkpoint
    from omnimerge.engine.plan import MergePlan

Place = Literal["accelerator", "host", "files"]

_SHARE = 0.5  # of the free memory: the rest is for activations and the caches of generation
_TOLERANCE = 1e-6  # float32 rounding: an accelerator may fuse a product and a sum


class Parents:
    """The input tensors of a plan, read once, on the accelerator or in the host's memory.

    What does not fit into half of the memory that is free stays in the files, which are read again
    at every merge; the operating system keeps them in memory as far as it can.

    Args:
        place: where they are.
        device: the torch device that the model runs on.
        nbytes: their bytes, in the dtypes they are stored in.

    Attributes:
        place: where they are.
        device: the torch device on which the merge is computed.
        nbytes: their bytes, in the dtypes they are stored in.
    """

    def __init__(self, place: Place, device: str, nbytes: int) -> None:
        self.place: Place = place
        self.device = device if place == "accelerator" else "cpu"
        self.nbytes = nbytes
        self._held: dict[tuple[int, str], Tensor] = {}

    @classmethod
    def hold(
        cls,
        plan: MergePlan,
        device: str = "cpu",
        *,
        host: bool = True,
        free: Callable[[str], int] | None = None,
    ) -> Parents:
        """Read what the plan's merged tensors are computed from, where there is room for it.

        An accelerator is used only if it gives the same numbers there for the first slice, up to
        the rounding of float32, and if the method needs no statistics, which are counted by the
        CPU.

        Args:
            plan: the merge; it stays the owner of the open checkpoints.
            device: the torch device that the model runs on.
            host: whether the host's memory may be used: not by one of several processes on it,
                which share what the system keeps of the files.
            free: device -> bytes that are free there; default: asks torch and the system.

        Returns:
            The parents, in the best place that they fit.

        Raises:
            CheckpointError: if an input cannot be read.
        """
        free = free or free_bytes
        wanted = {
            (id(checkpoint), name): (checkpoint, name)
            for job in plan.merged
            if low_rank_deltas(plan, job) is None
            for checkpoint, name in inputs_of(job)
        }
        nbytes = sum(each.tensors[name].nbytes for each, name in wanted.values())
        if torch.device(device).type != "cpu" and nbytes <= _SHARE * free(device):
            found = cls("accelerator", device, nbytes)
            if found._works(plan):
                found._fill(wanted)
                return found
        fits = host and nbytes <= _SHARE * free("cpu")
        found = cls("host" if fits else "files", device, nbytes)
        if found.place == "host":
            found._fill(wanted)
        return found

    def get(self, checkpoint: Checkpoint, name: str) -> Tensor | None:
        """Return an input tensor, if it is held.

        Args:
            checkpoint: one of the plan's checkpoints.
            name: a tensor of it.

        Returns:
            The tensor, flat, in the dtype it is stored in, not to be written to; or None.
        """
        return self._held.get((id(checkpoint), name))

    def _fill(self, wanted: dict[tuple[int, str], tuple[Checkpoint, str]]) -> None:
        for key, (checkpoint, name) in wanted.items():
            self._held[key] = checkpoint.read(name).to(self.device)

    def _works(self, plan: MergePlan) -> bool:
        """Whether the method gives on this device what it gives on the CPU."""
        if plan.method.new_statistics(plan.recipe.model_count(), plan.recipe.all_parameters):
            return False
        job = next((each for each in plan.merged if low_rank_deltas(plan, each) is None), None)
        if job is None:
            return False
        (start, stop), *_ = slices_of(plan, job)
        self._fill({(id(each), name): (each, name) for each, name in inputs_of(job)})
        try:
            there = SliceWorker(plan, held=self.get).compute(job, start, stop).float().cpu()
        except OmnimergeError:  # the input's own fault, which the merge will report
            return True
        except RuntimeError:  # an operation that this device does not have
            return False
        here = SliceWorker(plan).compute(job, start, stop).float()
        step = torch.finfo(there.dtype if job.output.dtype == "F32" else torch.bfloat16).eps
        return torch.allclose(there, here, rtol=max(_TOLERANCE, 2 * step), atol=1e-8)


def free_bytes(device: str) -> int:
    """Return how much memory is free.

    Args:
        device: a torch device; ``cpu`` for the host.

    Returns:
        Bytes; for the host, what is available without swapping, within the limit of the control
        group (a container's); for a GPU, with what torch keeps for a next use. 0 where nobody
        knows.
    """
    if torch.device(device).type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + kept)
    if torch.device(device).type != "cpu":
        return 0
    return min(_available(), _left_in_group())


def _available() -> int:
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0


def _left_in_group() -> int:
    """What a container may still use; its file cache counts as free, since it can be dropped."""
    group = Path("/sys/fs/cgroup")
    for limit, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        most, now = _lines(group / limit), _lines(group / used)
        if most and now and most[0].isdigit():
            stat = dict(line.split() for line in _lines((group / used).with_name("memory.stat")))
            return max(0, int(most[0]) - int(now[0]) + int(stat.get(cache, 0)))
    return 1 << 62


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="ascii").splitlines()
    except OSError:
        return []

"""Hold a merged checkpoint against its manifest, its target and its recipe."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from omnimerge.arch import slots_of
from omnimerge.arch.family import EMBED, HEAD
from omnimerge.arch.geometry import geometry
from omnimerge.checkpoint import Checkpoint
from omnimerge.checkpoint.dtypes import is_floating, is_known, item_size, torch_dtype
from omnimerge.checkpoint.links import check_inside
from omnimerge.checkpoint.writer import MANIFEST_NAME
from omnimerge.engine.inputs import header_problems
from omnimerge.engine.knowledge import model_statistics
from omnimerge.engine.loading import load_recipe
from omnimerge.engine.manifest import file_hash
from omnimerge.engine.plan import MergePlan
from omnimerge.engine.planning import build_plan
from omnimerge.engine.slices import SliceWorker, slices_of
from omnimerge.engine.threads import one_thread
from omnimerge.errors import OmnimergeError, OutputError

_BLOCK = 1 << 22
# By norms: of what a merge changed, since that is small beside the tensor; and float32's rounding.
_ALIKE, _ROUNDING = 1e-2, 1e-6


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what.
        state: ``ok``, ``failed``, or ``skipped`` where it could not be looked at.
        details: what was found, one sentence each.
    """

    name: str
    state: Literal["ok", "failed", "skipped"]
    details: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the check for JSON."""
        return {"name": self.name, "state": self.state, "details": list(self.details)}


class _CannotLookError(Exception):
    """A check needs what is not there."""


def verify(out: Path, *, deep: bool = False, tensors: int = 20, seed: int = 0) -> list[Check]:
    """Verify the folder of a merge.

    Args:
        out: the folder.
        deep: also compute merged tensors again from the recipe, on the CPU; needs the inputs.
        tensors: how many, at least 1; all if there are fewer.
        seed: which ones.

    Returns:
        The checks, in order. Those that need inputs which are gone or have changed are skipped.

    Raises:
        OutputError: if the folder was not written by a merge.
        CheckpointError: if its weight files cannot be opened.
    """
    described = _manifest(out)
    with Checkpoint.open(out) as written:
        subject = _Subject(described, written)
        checks: list[tuple[str, Callable[[], Iterator[str]]]] = [
            ("checksums of the files", subject.checksums),
            ("names, shapes and dtypes", subject.headers),
            ("finite numbers", subject.finite),
            ("tied tensors", subject.tied),
            ("unmerged tensors are the target's", subject.kept),
        ]
        if deep:
            name = f"{tensors} merged tensors computed again"
            checks.append((name, lambda: subject.again(max(1, tensors), seed)))
        return [_run(name, look) for name, look in checks]


def _run(name: str, look: Callable[[], Iterator[str]]) -> Check:
    try:
        found = tuple(look())
    except _CannotLookError as reason:
        return Check(name, "skipped", (str(reason),))
    except OmnimergeError as error:
        return Check(name, "failed", (str(error),))
    return Check(name, "failed" if found else "ok", found)


_KINDS = {
    "devices": dict,
    "tensors": dict,
    "recipe": dict,
    "inputs": dict,
    "files": dict,
    "forced": list,
}


def _manifest(out: Path) -> dict[str, Any]:
    try:
        found = json.loads((out / MANIFEST_NAME).read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not {"tensors", "recipe"} <= set(found):
            raise ValueError("it holds no merge")
        for key, kind in _KINDS.items():
            if not isinstance(found.get(key, kind()), kind):
                raise ValueError(f"its {key} are damaged")
        if not all(isinstance(each, str) for each in found.get("forced", ())):
            raise ValueError("its forced are damaged")
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(
            f"{out} is no merged checkpoint: {MANIFEST_NAME}: {reason}; give the folder that "
            "`omnimerge merge` wrote"
        ) from error
    return found


class _Subject:
    """A written checkpoint beside its manifest; each check yields what is wrong."""

    def __init__(self, described: dict[str, Any], written: Checkpoint) -> None:
        self._described = described
        self._out = written
        self._planned: MergePlan | str | None = None

    def checksums(self) -> Iterator[str]:
        if not self._described.get("files"):
            raise _CannotLookError("the manifest has none; it is of an older version")
        for name, expected in self._described["files"].items():
            file = self._out.folder / name
            if not _is_file(file):
                yield f"{name} is missing"
                continue
            check_inside(self._out.folder, file)
            if file_hash(file) != expected:
                yield f"{name} is not what was written"

    def headers(self) -> Iterator[str]:
        plan = self._plan()
        expected = {job.output.name: job.output for job in plan.jobs}
        for name in expected.keys() - self._out.tensors.keys():
            yield f"tensor {name!r} is missing"
        for name, meta in self._out.tensors.items():
            planned = expected.get(name)
            if planned is None:
                yield f"tensor {name!r} should not be there"
            elif (meta.dtype, meta.shape) != (planned.dtype, planned.shape):
                yield (
                    f"tensor {name!r} is {meta.dtype} {list(meta.shape)} instead of "
                    f"{planned.dtype} {list(planned.shape)}"
                )

    def finite(self) -> Iterator[str]:
        for name, meta in self._out.tensors.items():
            if not is_known(meta.dtype) or not is_floating(meta.dtype):
                continue
            blocks = (part.float() for part in _blocks(self._out, name))
            if not all(torch.isfinite(part).all() for part in blocks):
                yield f"tensor {name!r} holds NaN or infinity"

    def tied(self) -> Iterator[str]:
        found = slots_of(self._out)
        slots = found.by_slot
        if HEAD not in slots or EMBED not in slots or not geometry(self._out, found).tied:
            return
        embed, head = (self._out.read_tensor(slots[slot]) for slot in (EMBED, HEAD))
        if not torch.equal(embed, head):
            yield f"{slots[HEAD]!r} is tied to {slots[EMBED]!r} by config.json and differs from it"

    def kept(self) -> Iterator[str]:
        plan = self._plan()
        for job in plan.jobs:
            name = job.output.name
            if job.merged or name not in self._out.tensors:
                continue
            dtype = torch_dtype(job.output.dtype)
            pairs = zip(_blocks(plan.target, name), _blocks(self._out, name), strict=False)
            if not all(_same(theirs.to(dtype), ours) for theirs, ours in pairs):
                yield f"tensor {name!r} is not the target's"

    def again(self, count: int, seed: int) -> Iterator[str]:
        plan = self._plan()
        jobs = sorted(plan.merged, key=lambda job: _draw(seed, job.output.name))[:count]
        worker = SliceWorker(plan, model_statistics(plan))
        # The CPU's bits, but for numbers that an accelerator rounds in another order.
        exact = plan.method.exact or not self._described.get("devices")
        for job in jobs:
            where, sums = "", torch.zeros(3, dtype=torch.float64)
            before, name = job.base or (plan.target, job.output.name)
            for start, stop in slices_of(plan, job):
                with one_thread():
                    again = worker.compute(job, start, stop)
                written = self._out.read(job.output.name, start, stop)
                if not _same(again, written):
                    where = where or f" (elements {start}:{stop})"
                if where and exact:
                    break
                sums += _squares(again, written, before.read(name, start, stop))
            different, changed, size = sums.sqrt().tolist()
            alike = not exact and different <= _ALIKE * changed + _ROUNDING * size
            if where and not alike:
                yield f"tensor {job.output.name!r} is not what the recipe gives{where}"

    def _plan(self) -> MergePlan:
        """The plan of the manifest's recipe, if its inputs are as they were."""
        if self._planned is None:
            self._planned = self._planned_again()
        if isinstance(self._planned, str):
            raise _CannotLookError(self._planned)
        return self._planned

    def _planned_again(self) -> MergePlan | str:
        described = self._described
        try:
            recipe = load_recipe(described["recipe"])
            plan = build_plan(recipe, force=described.get("forced", ()), ancestor=False)
        except OmnimergeError as error:
            return f"the merge cannot be planned again: {error}"
        try:
            problems = header_problems(plan, described["inputs"])
        except (AttributeError, KeyError, TypeError):
            return "what the manifest says of the inputs is damaged"
        return f"an input is not what was merged: {problems[0]}" if problems else plan


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long
        return False


def _blocks(checkpoint: Checkpoint, name: str) -> Iterator[Tensor]:
    meta = checkpoint.meta(name)
    step = max(1, _BLOCK // item_size(meta.dtype))
    for start in range(0, meta.numel, step):
        yield checkpoint.read(name, start, min(start + step, meta.numel))


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two flat tensors have the same bits."""
    return one.dtype == other.dtype and torch.equal(
        one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
    )


def _squares(again: Tensor, written: Tensor, before: Tensor) -> Tensor:
    """Sums of squares of: what differs, what the merge changed, what was written."""
    ours, theirs, old = (each.double() for each in (again, written, before))
    found = (ours - theirs, theirs - old, theirs)
    return torch.stack([each.square().sum() for each in found])


def _draw(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()

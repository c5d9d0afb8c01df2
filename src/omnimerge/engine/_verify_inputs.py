"""What a merge or a composition is by its inputs: they are opened, the merge is planned again."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omnimerge.arch import read_all_layouts, slots_of
from omnimerge.arch.family import EMBED, HEAD
from omnimerge.arch.geometry import geometry
from omnimerge.checkpoint import Checkpoint
from omnimerge.checkpoint.dtypes import torch_dtype
from omnimerge.checkpoint.hub import is_pinned
from omnimerge.checkpoint.links import check_inside
from omnimerge.checkpoint.remote import is_url
from omnimerge.engine._verify_folder import CannotLookError, WrittenFolder
from omnimerge.engine.execute import copied_files, written_config
from omnimerge.engine.inputs import header_problems
from omnimerge.engine.knowledge import model_statistics
from omnimerge.engine.loading import load_recipe
from omnimerge.engine.manifest import file_hash, roles, stored
from omnimerge.engine.plan import CHUNK_ELEMENTS, MergePlan, TensorJob
from omnimerge.engine.planning import build_plan
from omnimerge.engine.recipe import Recipe
from omnimerge.engine.slices import SliceWorker, slices_of
from omnimerge.engine.threads import one_thread
from omnimerge.errors import LayoutError, OmnimergeError

# By norms: of what a merge changed, since that is small beside the tensor; and float32's rounding.
_ALIKE, _ROUNDING = 1e-2, 1e-6
_ELSEWHERE = (
    "run it in the folder where the merge ran, or put the inputs where the recipe in "
    "merge_manifest.json names them"
)


class MergedAgain:
    """A folder beside its inputs; each check yields what is wrong.

    Args:
        folder: what was written.
    """

    def __init__(self, folder: WrittenFolder) -> None:
        self._folder = folder
        self._described = folder.described
        self._is_composed = "composed" in self._described
        self._planned: MergePlan | str | None = None
        # The target's tensor -> tensor of the output.
        self._places: dict[str, str] = {}
        self._twice: list[str] = []
        for name, entry in self._described["tensors"].items():
            if not self._is_composed:
                self._places[name] = name
            elif "part" in entry:
                continue
            elif self._places.setdefault(entry.get("from", ""), name) != name:
                self._twice.append(name)

    def headers(self) -> Iterator[str]:
        """Hold the manifest's tensors against the plan; for an older manifest, those written."""
        try:
            plan, weights = self._plan(), self._folder.weights
        except CannotLookError as reason:
            if not self._folder.says_shapes:
                raise CannotLookError(
                    f"the manifest has no shapes, it is of an older version; {reason}"
                ) from None
            return
        planned = {job.output.name: stored(job.output) for job in plan.jobs}
        named = self._named(weights)
        if self._is_composed:  # the vocabulary has more rows
            for name in (job.output.name for job in plan.jobs if _is_vocabulary(job)):
                named.pop(name, None)
                del planned[name]
        for name in self._twice:
            yield f"tensor {name!r} is of the same tensor of the target as another one"
        for name in sorted(planned.keys() ^ named.keys()):
            who, whom = ("recipe", "manifest") if name in planned else ("manifest", "recipe")
            yield f"tensor {name!r} is in the {who} and not in the {whom}"
        for name in planned.keys() & named.keys():
            if planned[name] != named[name]:
                yield f"tensor {name!r} is {named[name]}; the recipe gives {planned[name]}"

    def _named(self, weights: Checkpoint) -> dict[str, str]:
        """The target's tensor -> how the manifest says it is stored; an older one's, how it is."""
        if not self._folder.says_shapes:
            if self._is_composed:
                raise CannotLookError("the manifest has no shapes, it is of an older version")
            return {name: stored(meta) for name, meta in weights.tensors.items()}
        tensors = self._described["tensors"]
        return {name: tensors[at].get("stored", "") for name, at in self._places.items()}

    def tied(self) -> Iterator[str]:
        """Compare a tied head with the embedding."""
        weights = self._folder.weights
        try:
            layouts = read_all_layouts(self._described["recipe"].get("layouts") or ())
        except (AttributeError, TypeError, LayoutError) as error:
            raise CannotLookError(f"the recipe's layouts cannot be read: {error}") from error
        found = slots_of(weights, layouts)
        slots = found.by_slot
        if HEAD not in slots or EMBED not in slots or not geometry(weights, found).tied:
            return
        embed, head = (weights.read_tensor(slots[slot]) for slot in (EMBED, HEAD))
        if not torch.equal(embed, head):
            yield f"{slots[HEAD]!r} is tied to {slots[EMBED]!r} by config.json and differs from it"

    def copied(self, name: str) -> list[tuple[int, int]]:
        """Name the elements of a merged tensor that are another's as they were.

        Args:
            name: a tensor of the output.

        Returns:
            Runs of elements: the target's, where `vocabulary: overlap` finds no common token, and
            rows of tokens that a composition's parts brought.
        """
        try:
            jobs = self._plan().merged
        except CannotLookError:
            if "overlap" in str(self._described["tensors"].get(name, {}).get("rule")):
                raise
            return []
        job = next((job for job in jobs if self._places.get(job.output.name) == name), None)
        return [*job.own, *self._brought_runs(job)] if job else []

    def kept(self) -> Iterator[str]:
        """Compare what was not merged with the target, bit for bit."""
        plan, weights = self._plan(), self._folder.weights
        for job in plan.jobs:
            name = self._places.get(job.output.name)
            if name is None or name not in weights.tensors:
                continue
            ranges = self._ranges_of_target(job)
            if not _equal(plan.target, job.output.name, weights, name, ranges):
                what = ": rows of no common token are" if job.merged else " is"
                yield f"tensor {name!r}{what} not the target's"

    def parts(self) -> Iterator[str]:
        """Compare a composition's towers and projectors with their models, bit for bit."""
        weights = self._folder.weights
        sources = self._sources()
        for name, entry in self._described["tensors"].items():
            if "part" not in entry or name not in weights.tensors:
                continue
            source, theirs = sources.get(entry["part"]), entry.get("from", "")
            if source is None or theirs not in source.tensors:
                yield f"tensor {name!r} is of a model that the manifest does not know"
            elif not _equal(source, theirs, weights, name, [(0, source.meta(theirs).numel)]):
                yield f"tensor {name!r} is not that of {source.reference}"

    def files(self) -> Iterator[str]:
        """Compare what was copied of the target; cards may be edited."""
        plan, out = self._plan(), self._folder.out
        config = written_config(plan)
        for name, new in copied_files(plan).items():
            if not (out / new).is_file() or name.name == "README.md":
                continue
            check_inside(out, out / new)
            if new == "config.json" and config is not None:
                expected = hashlib.sha256(config.encode()).hexdigest()
            else:
                expected = file_hash(plan.target.folder / name)
            if file_hash(out / new) != expected:
                yield f"{new} is not the target's"

    def again(self, count: int, seed: int) -> Iterator[str]:
        """Compute merged tensors again; `count` of them, which `seed` draws."""
        plan, weights = self._plan(), self._folder.weights
        jobs = [job for job in plan.merged if not (self._is_composed and _is_vocabulary(job))]
        worker = SliceWorker(plan, model_statistics(plan))
        # The CPU's bits, but for numbers that an accelerator rounds in another order.
        exact = plan.method.exact or not self._described.get("devices")
        for job in sorted(jobs, key=lambda job: _draw(seed, job.output.name))[:count]:
            where, sums = "", torch.zeros(3, dtype=torch.float64)
            before, name = job.base or (plan.target, job.output.name)
            place = self._places.get(job.output.name, job.output.name)
            for start, stop in slices_of(plan, job):
                with one_thread():
                    again = worker.compute(job, start, stop)
                written = weights.read(place, start, stop)
                if not _same(again, written):
                    where = where or f" (elements {start}:{stop})"
                if where and exact:
                    break
                sums += _squares(again, written, before.read(name, start, stop))
            different, changed, size = sums.sqrt().tolist()
            alike = not exact and different <= _ALIKE * changed + _ROUNDING * size
            if where and not alike:
                yield f"tensor {place!r} is not what the recipe gives{where}"

    def _ranges_of_target(self, job: TensorJob) -> Iterator[tuple[int, int]]:
        """The elements of a tensor that are the target's: all but rows of parts' tokens."""
        numel = math.prod(job.output.shape)
        runs = job.own if job.merged else ((0, numel),)
        brought = self._brought_runs(job)
        for start, stop in runs:
            for first, last in brought:
                if start < (before := min(first, stop)):
                    yield start, before
                start = max(start, last)
            if start < stop or not numel:
                yield start, stop

    def _brought_runs(self, job: TensorJob) -> list[tuple[int, int]]:
        """The elements of a tensor that are rows of parts' tokens."""
        if not (self._is_composed and _is_vocabulary(job)):
            return []
        width = math.prod(job.output.shape[1:])
        return [(row * width, (row + 1) * width) for row in sorted(set(self._brought()))]

    def _brought(self) -> Iterator[int]:
        """Rows of the vocabulary that parts brought."""
        for part in self._described["composed"].values():
            try:
                yield from (int(row) for row in part["tokens"].values() if row >= 0)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise CannotLookError("what the manifest says of tokens is damaged") from error

    def _sources(self) -> dict[str, Checkpoint]:
        """The model of each part."""
        inputs = roles(self._plan())
        try:
            parts = self._described["composed"].items()
            return {name: inputs[part["input"]] for name, part in parts}
        except (KeyError, TypeError) as error:
            raise CannotLookError(
                "the manifest does not say which input each part is of"
            ) from error

    def _plan(self) -> MergePlan:
        """The plan of the manifest's recipe, if its inputs are as they were."""
        if self._planned is None:
            self._planned = self._planned_again()
        if isinstance(self._planned, str):
            raise CannotLookError(self._planned)
        return self._planned

    def _planned_again(self) -> MergePlan | str:
        described = self._described
        try:
            recipe = load_recipe(_merge_recipe(described["recipe"]))
            if absent := _absent(recipe):
                return f"{absent!r} is not here; {_ELSEWHERE}"
            plan = build_plan(recipe, force=described.get("forced", ()), ancestor=False)
        except OmnimergeError as error:
            return f"the merge cannot be planned again: {error}; {_ELSEWHERE}"
        try:
            problems = header_problems(plan, described["inputs"])
        except (AttributeError, KeyError, TypeError):
            return "what the manifest says of the inputs is damaged"
        if problems:
            return f"an input is not what was merged: {problems[0]}; {_ELSEWHERE}"
        jobs = tuple(job for job in plan.jobs if job.output.name in self._places)
        return replace(plan, jobs=jobs) if self._is_composed else plan


def _merge_recipe(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe without what only a composition's has."""
    models = recipe.get("models")
    if not isinstance(models, list):
        return recipe
    plain = [
        {key: value for key, value in entry.items() if key != "provides"}
        if isinstance(entry, dict)
        else entry
        for entry in models
    ]
    return {**recipe, "models": plain}


def _absent(recipe: Recipe) -> str | None:
    """The first input that is not here: the Hub is asked for commits only, never for a path."""
    entries = [each for entry in recipe.models for each in (entry.model, entry.adapter)]
    for reference in (recipe.target, recipe.base, *entries):
        if reference and not (_is_folder(reference) or is_url(reference) or is_pinned(reference)):
            return reference
    return None


def _is_folder(reference: str) -> bool:
    try:
        return Path(reference).expanduser().is_dir()
    except (OSError, RuntimeError, ValueError):  # a name too long, no such user
        return False


def _is_vocabulary(job: TensorJob) -> bool:
    return job.slot == EMBED or job.slot.startswith("llm.head.")


def _equal(
    one: Checkpoint,
    name: str,
    other: Checkpoint,
    place: str,
    ranges: Iterator[tuple[int, int]] | list[tuple[int, int]],
) -> bool:
    """Whether elements are those of another tensor, in its dtype."""
    dtype, size = torch_dtype(other.meta(place).dtype), other.meta(place).numel
    for first, last in ranges:
        if last > size:
            return False
        for start in range(first, last, CHUNK_ELEMENTS):
            stop = min(start + CHUNK_ELEMENTS, last)
            with one_thread():  # an adapter's product, to the same bits
                theirs = one.read(name, start, stop)
            if not _same(theirs.to(dtype), other.read(place, start, stop)):
                return False
    return True


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

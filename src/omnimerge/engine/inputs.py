"""What a merge's bytes depend on: its input files as they were when it began, and what is done."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omnimerge.checkpoint import AdaptedCheckpoint, Checkpoint
from omnimerge.checkpoint.links import real_path
from omnimerge.checkpoint.reader import place_of, stamp
from omnimerge.checkpoint.remote import is_url
from omnimerge.engine.manifest import file_hash, header_hash, roles, versions
from omnimerge.errors import CheckpointError, InputChangedError, OutputError

if TYPE_CHECKING:
    from omnimerge.engine.plan import MergePlan


class SourceFiles:
    """Files that must stay as they are while they are read.

    Args:
        checkpoints: whose weight files these are.
        others: more files.
        extracting: whether they are compared, for an adapter, and not merged; for messages.

    Raises:
        CheckpointError: if one cannot be read, or has changed since its header was.
    """

    def __init__(
        self,
        checkpoints: Iterable[Checkpoint],
        others: Iterable[Path] = (),
        *,
        extracting: bool = False,
    ) -> None:
        self._done, self._do = ("read", "extract") if extracting else ("merged", "merge")
        opened = list(checkpoints)
        self._others = {file: _stamped(file) for file in others}
        self._files = sorted({file for each in opened for file in each.files})
        self._seen = {file: _look(file) for file in self._files}
        for each in opened:  # between then and now lies the ancestor test
            for file, (size, modified) in each.stamps.items():
                self._compare(file, {"bytes": size, "modified_ns": modified}, self._seen[file])

    def check(self) -> None:
        """Look again.

        Raises:
            InputChangedError: if a file is another than at the beginning.
            CheckpointError: if it is gone.
        """
        for file, before in self._seen.items():
            self._compare(file, before, _look(file))
        for file, before in self._others.items():
            self._compare(file, before, _stamped(file))

    def _compare(self, file: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        if changed := [what for what, value in before.items() if now[what] != value]:
            raise InputChangedError(
                f"{place_of(file)} changed while it was {self._done} ({', '.join(changed)}); "
                f"{self._do} again when nothing writes to it"
            )


class InputFiles(SourceFiles):
    """The files of a plan's checkpoints that decide its output, and what they looked like.

    These are the weight files, and the target's other files, which are copied.

    Args:
        plan: the merge.

    Attributes:
        copied: the target's files that are no weights, relative to its folder.

    Raises:
        CheckpointError: if one cannot be read, or has changed since its header was.
    """

    def __init__(self, plan: MergePlan) -> None:
        self.copied = plan.target.other_files()
        folder = plan.target.folder
        super().__init__(checkpoints_of(plan), [folder / name for name in self.copied])

    def describe(self) -> list[dict[str, Any]]:
        """Return what is known of every weight file, as JSON values."""
        return [{"file": place_of(file.absolute()), **self._seen[file]} for file in self._files]

    @property
    def bytes_to_copy(self) -> int:
        """Bytes of the target's files that are no weights."""
        return sum(seen["bytes"] for seen in self._others.values())


def merge_key(plan: MergePlan, files: InputFiles, devices: Mapping[str, str] | None = None) -> str:
    """Return a digest of everything that the output's bytes depend on.

    Args:
        plan: the merge.
        files: its inputs.
        devices: the accelerators that compute; they count where the method gives other bits there.

    Returns:
        SHA-256 in hexadecimal; the same for the same merge of unchanged files with the same
        versions, on any machine that has the files at the same places.
    """
    described = {
        "recipe": absolute_recipe(plan),
        "forced": sorted(plan.forced),
        "seed": plan.recipe.seed,
        "files": files.describe(),
        "versions": versions(),
        "shards": [[[t.name, t.dtype, t.shape] for t in shard] for shard in plan.shards],
        "jobs": jobs_digest(plan),
        "copied": {str(name): file_hash(plan.target.folder / name) for name in files.copied},
    }
    if devices and not plan.method.exact:
        described["devices"] = sorted(set(devices.values()))
    text = json.dumps(described, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def jobs_digest(plan: MergePlan) -> str:
    """Return a digest of what is done to every tensor, to the element.

    What files other than weights decide, such as layouts and tokenizers, shows here.

    Args:
        plan: the merge.

    Returns:
        SHA-256 in hexadecimal.
    """
    digest = hashlib.sha256()
    for job in plan.jobs:
        mapped = [(each.sources, each.op, each.segments) for each in job.mapped]
        base = job.base and job.base[1]
        parameters = sorted(job.parameters.items())
        names = [name for _, name in job.sources]
        done = (job.output, names, base, parameters, job.depth, job.merged, mapped, job.own)
        digest.update(repr(done).encode())
    return digest.hexdigest()


def absolute_recipe(plan: MergePlan) -> dict[str, Any]:
    """Return the recipe with the folders that its references were found in.

    Args:
        plan: the plan that was made from it.

    Returns:
        A JSON-ready mapping; the recipe of the same bytes from any folder.
    """
    recipe = plan.recipe

    def place(checkpoint: Checkpoint) -> str:
        where = checkpoint.location
        return where if is_url(where) else str(checkpoint.folder.absolute())

    entries = []
    for entry, model in zip(recipe.models, plan.models, strict=True):
        found = {"model": place(model)}
        if isinstance(model, AdaptedCheckpoint):
            found = {"model": place(model.base), "adapter": place(model.adapter.store)}
        entries.append(entry.model_copy(update=found))
    changed: dict[str, Any] = {
        "models": tuple(entries),
        "layouts": tuple(str(Path(each).absolute()) for each in recipe.layouts),
    }
    if recipe.target:
        changed["target"] = place(plan.target)
    if recipe.base and plan.base:
        changed["base"] = place(plan.base)
    return recipe.model_copy(update=changed).model_dump(mode="json", exclude_defaults=True)


def protect_inputs(out: Path, checkpoints: Iterable[Checkpoint]) -> None:
    """Refuse an output that would take the place of an input.

    Args:
        out: the folder that is to be created.
        checkpoints: the inputs, adapters included.

    Raises:
        OutputError: if the folder is one of theirs, or holds one.
    """
    resolved = real_path(out)
    for checkpoint in checkpoints:
        for folder in {real_path(checkpoint.folder), *(f.parent for f in checkpoint.files)}:
            if (real := real_path(folder)) == resolved or resolved in real.parents:
                raise OutputError(f"{out} is or holds an input of this merge; give another folder")


def header_problems(plan: MergePlan, described: Mapping[str, Any]) -> list[str]:
    """Hold a plan's inputs against what a manifest says of them.

    Args:
        plan: the plan.
        described: the manifest's `inputs`.

    Returns:
        What differs, one sentence each.
    """
    problems = []
    for role, checkpoint in roles(plan).items():
        before = {each["name"]: each for each in described.get(role, {}).get("files", [])}
        for file in checkpoint.files:
            known = before.get(file.name)
            now = _look(file)
            if known is None:
                problems.append(f"{role} has {file}, which the manifest does not know")
            elif any(known[what] != now[what] for what in ("bytes", "header_sha256")):
                problems.append(f"{file} has changed since")
    return problems


def checkpoints_of(plan: MergePlan) -> Iterator[Checkpoint]:
    """Give the checkpoints of a plan.

    Args:
        plan: the plan.

    Yields:
        The target, the models, the base; one that has several parts comes several times.
    """
    yield from (plan.target, *plan.models, *([plan.base] if plan.base else []))


def _stamped(file: Path) -> dict[str, Any]:
    try:
        size, modified = stamp(file)
        return {"bytes": size, "modified_ns": modified}
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error


def _look(file: Path) -> dict[str, Any]:
    try:
        return {**_stamped(file), "header_sha256": header_hash(file)}
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error

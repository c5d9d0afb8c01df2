"""What a merge's bytes depend on: its input files, as they were when it began."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omnimerge.checkpoint import Checkpoint
from omnimerge.checkpoint.reader import place_of, stamp
from omnimerge.engine.manifest import header_hash, pinned_recipe, roles, versions
from omnimerge.errors import CheckpointError, InputChangedError

if TYPE_CHECKING:
    from omnimerge.engine.plan import MergePlan


class InputFiles:
    """The weight files of a plan's checkpoints, and what they looked like.

    Args:
        plan: the merge.

    Raises:
        CheckpointError: if one cannot be read, or has changed since its header was.
    """

    def __init__(self, plan: MergePlan) -> None:
        self._files = sorted({file for each in checkpoints_of(plan) for file in each.files})
        self._seen = {file: _look(file) for file in self._files}
        for each in checkpoints_of(plan):  # between then and now lies the ancestor test
            for file, (size, modified) in each.stamps.items():
                self._compare(file, {"bytes": size, "modified_ns": modified}, self._seen[file])

    def describe(self) -> list[dict[str, Any]]:
        """Return what is known of every file, as JSON values."""
        return [{"file": place_of(file), **self._seen[file]} for file in self._files]

    def check(self) -> None:
        """Look again.

        Raises:
            InputChangedError: if a file is another than at the beginning.
            CheckpointError: if it is gone.
        """
        for file, before in self._seen.items():
            self._compare(file, before, _look(file))

    @staticmethod
    def _compare(file: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        if changed := [what for what, value in before.items() if now[what] != value]:
            raise InputChangedError(
                f"{file} changed while it was merged ({', '.join(changed)}); merge again when "
                "nothing writes to it"
            )


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
        "recipe": pinned_recipe(plan),
        "forced": sorted(plan.forced),
        "seed": plan.recipe.seed,
        "files": files.describe(),
        "versions": versions(),
        "shards": [[[t.name, t.dtype, t.shape] for t in shard] for shard in plan.shards],
    }
    if devices and not plan.method.exact:
        described["devices"] = sorted(set(devices.values()))
    text = json.dumps(described, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


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


def _look(file: Path) -> dict[str, Any]:
    try:
        size, modified = stamp(file)
        return {"bytes": size, "modified_ns": modified, "header_sha256": header_hash(file)}
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error

"""``merge_manifest.json``: what was merged, from what, how, and what became of every tensor."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from omnimerge.checkpoint import AdaptedCheckpoint, Checkpoint, OutputTensor, TensorMeta
from omnimerge.checkpoint.hub import commit_of, license_of, pinned
from omnimerge.checkpoint.reader import stamp
from omnimerge.checkpoint.small_file import refuse_unreadable
from omnimerge.checkpoint.staging import JOURNAL_NAME
from omnimerge.checkpoint.writer import MANIFEST_NAME
from omnimerge.engine.plan import MergePlan, TensorJob

_CARD_NAME = "README.md"


def manifest(plan: MergePlan) -> dict[str, Any]:
    """Describe a merge.

    Args:
        plan: the plan that was carried out.

    Returns:
        A JSON-ready mapping: recipe, inputs with sizes and header hashes, versions, counts, and per
        tensor what was done and how it is stored.
    """
    return {
        "format": 1,
        "recipe": pinned_recipe(plan),
        "seed": plan.recipe.seed,
        "select": plan.recipe.selection,
        "forced": list(plan.forced),
        "inputs": {role: _input(checkpoint) for role, checkpoint in roles(plan).items()},
        "versions": versions(),
        "counts": {
            plan.method.name: len(plan.merged),
            "kept": len(plan.jobs) - len(plan.merged),
        },
        "kept_reasons": plan.kept_reasons(),
        "alignments": [
            {
                "model": a.donor.reference,
                "ancestor": a.ancestor.to_dict() if a.ancestor else None,
                "notes": a.notes,
                "unused": a.unused,
                **({"unused_parts": a.unused_parts} if a.unused_parts else {}),
            }
            for a in plan.alignments
        ],
        "tensors": {
            job.output.name: {"stored": stored(job.output)} | _done(plan, job) for job in plan.jobs
        },
    }


def stored(tensor: OutputTensor | TensorMeta) -> str:
    """Say how a tensor is stored, on one line of a manifest.

    Args:
        tensor: of a plan or of a file.

    Returns:
        For example ``BF16 [2048, 64]``.
    """
    return f"{tensor.dtype} {list(tensor.shape)}"


def pinned_recipe(plan: MergePlan) -> dict[str, Any]:
    """Return the recipe with what came from the Hub as ``owner/name@commit``.

    Args:
        plan: the plan that was made from it, which knows the commits.

    Returns:
        A JSON-ready mapping; the recipe of the same bytes at any time.
    """
    return pin(plan.recipe.model_dump(mode="json", exclude_none=True), plan)


def pin(recipe: dict[str, Any], plan: MergePlan) -> dict[str, Any]:
    """Replace what came from the Hub by ``owner/name@commit``.

    Args:
        recipe: a recipe as JSON values; it is changed.
        plan: a plan of the same checkpoints.

    Returns:
        The recipe.
    """
    for role, checkpoint in (("target", plan.target), ("base", plan.base)):
        if role in recipe and checkpoint:
            recipe[role] = pinned(recipe[role], checkpoint.folder)
    for entry, model in zip(recipe["models"], plan.models, strict=True):
        if "model" in entry:
            entry["model"] = pinned(entry["model"], model.folder)
        if isinstance(model, AdaptedCheckpoint):
            entry["adapter"] = pinned(entry["adapter"], model.adapter.store.folder)
    return recipe


def roles(plan: MergePlan) -> dict[str, Checkpoint]:
    """Name the inputs of a merge.

    Args:
        plan: the plan.

    Returns:
        ``target``, ``models.0`` ... and ``base``.
    """
    found = {"target": plan.target, **{f"models.{i}": m for i, m in enumerate(plan.models)}}
    return {**found, "base": plan.base} if plan.base else found


def write_manifest(described: Mapping[str, Any], folder: Path, digests: Mapping[str, str]) -> None:
    """Write a manifest, with the checksums of all other files, into a folder.

    Args:
        described: what it says.
        folder: the output folder; all that is still to come is the card, which people edit.
        digests: checksums that are known already, by file name.
    """
    names = [name for name in output_files(folder) if name != JOURNAL_NAME]
    files = {name: digests.get(name) or file_hash(folder / name) for name in names}
    text = json.dumps({**described, "files": files}, indent=1, ensure_ascii=False)
    (folder / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")


def output_files(folder: Path) -> list[str]:
    """List the files that the manifest of a folder has to name, and no others.

    Args:
        folder: an output.

    Returns:
        Paths relative to it, sorted: all but the manifest, the card and what is hidden. Links to
        folders are not followed.

    Raises:
        CheckpointError: if a folder cannot be read.
    """
    found = []
    for root, folders, files in os.walk(folder, onerror=refuse_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [name for name in folders if Path(root, name).is_symlink()]
        names = [name for name in (*files, *links) if not name.startswith(".")]
        found += [Path(root, name).relative_to(folder).as_posix() for name in names]
    return sorted(set(found) - {MANIFEST_NAME, _CARD_NAME})


def file_hash(file: Path) -> str:
    """Return the SHA-256 of a file.

    Args:
        file: the file.

    Returns:
        The digest in hexadecimal.
    """
    found = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of what computed a result.

    Returns:
        Package (and python) -> version.
    """
    found = {"python": platform.python_version()}
    for package in ("omnimerge", "torch", "transformers", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def header_hash(file: Path) -> str:
    """Return the SHA-256 of a weight file's header, which names, types and places every tensor.

    Args:
        file: a safetensors file; for another format, its first MiB is taken.

    Returns:
        The digest in hexadecimal.
    """
    with file.open("rb") as stream:
        prefix = stream.read(8)
        safetensors = file.suffix == ".safetensors"
        length = int.from_bytes(prefix, "little") if safetensors else 1 << 20
        return hashlib.sha256(prefix + stream.read(length)).hexdigest()


def _input(checkpoint: Checkpoint) -> dict[str, Any]:
    adapter = checkpoint.adapter if isinstance(checkpoint, AdaptedCheckpoint) else None
    return {
        "reference": checkpoint.reference,
        **_origin(checkpoint.folder),
        **({"adapter": _origin(adapter.store.folder)} if adapter else {}),
        "model_type": checkpoint.config.get("model_type"),
        "files": [
            {"name": f.name, "bytes": stamp(f)[0], "header_sha256": header_hash(f)}
            for f in checkpoint.files
        ],
    }


def _origin(folder: Path) -> dict[str, Any]:
    """The commit and the license of what came from the Hub, or would go by its card."""
    found = {"revision": commit_of(folder), "license": license_of(folder)}
    return {key: value for key, value in found.items() if value}


def _done(plan: MergePlan, job: TensorJob) -> dict[str, Any]:
    if not job.merged:
        return {"kept": job.reason}
    return {
        "sources": [list(merged.sources) for merged in job.mapped],
        **({"rule": rule} if (rule := _rule(job)) else {}),
        **({"parameters": dict(job.parameters)} if _differs(plan, job) else {}),
    }


def _rule(job: TensorJob) -> str:
    return ", ".join(dict.fromkeys(merged.rule for merged in job.mapped if merged.rule))


def _differs(plan: MergePlan, job: TensorJob) -> bool:
    return bool(job.parameters != plan.recipe.all_parameters)

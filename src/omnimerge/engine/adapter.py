"""Write what a merge or a fine-tuning changed as one PEFT LoRA adapter."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omnimerge.arch import SlotMap, align, memory_names, read_all_layouts, slots_of
from omnimerge.arch.geometry import geometry
from omnimerge.arch.hf_tables import parameter_modules
from omnimerge.checkpoint import Checkpoint, CheckpointWriter, OutputTensor
from omnimerge.checkpoint.adapter import CONFIG_NAME
from omnimerge.checkpoint.dtypes import item_size
from omnimerge.checkpoint.hub import commit_of, pinned
from omnimerge.checkpoint.writer import refuse_existing
from omnimerge.engine.inputs import SourceFiles, checkpoints_of, protect_inputs
from omnimerge.engine.knowledge import model_statistics
from omnimerge.engine.manifest import manifest, stored, versions, write_manifest
from omnimerge.engine.plan import MergePlan, TensorJob
from omnimerge.engine.slices import SliceWorker, low_rank_deltas, merged_delta, slices_of
from omnimerge.errors import NotMergeableError, OutputError, RecipeError
from omnimerge.methods import LowRank, truncate

_Change = tuple[str, "Tensor | LowRank"]


@dataclass
class AdapterSummary:
    """What an adapter holds.

    Attributes:
        ranks: module -> rank of its factors.
        energy: module -> share of the squared change that the factors hold.
        whole: modules and biases that are stored as they are.
        unchanged: tensors that did not change.
        left_out: reason -> number of tensors that are not compared.
        nbytes: size of the weights.
    """

    ranks: dict[str, int] = field(default_factory=dict)
    energy: dict[str, float] = field(default_factory=dict)
    whole: list[str] = field(default_factory=list)
    unchanged: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    nbytes: int = 0


def merge_as_adapter(
    plan: MergePlan,
    out: Path,
    rank: int,
    *,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    finish: Callable[[Path], None] | None = None,
) -> AdapterSummary:
    """Merge, and write the result as one adapter on the target.

    Args:
        plan: what to do.
        out: the folder to create.
        rank: the largest rank of a matrix.
        overwrite: replace the folder of an earlier merge.
        on_progress: called with (bytes of tensors done, bytes of all).
        finish: called with the folder when all else is in it, to write a card.

    Returns:
        What the adapter holds.

    Raises:
        OutputError: if `out` exists, or tensors changed that no adapter can hold.
        InputChangedError: if an input changes meanwhile.
    """
    protect_inputs(out, checkpoints_of(plan))
    refuse_existing(out, overwrite=overwrite)
    files = SourceFiles(checkpoints_of(plan))
    total = sum(job.output.nbytes for job in plan.merged)

    def changes() -> Iterator[_Change]:
        done = 0
        worker = SliceWorker(plan, model_statistics(plan))
        for job in plan.merged:
            yield job.output.name, _change_of(plan, job, worker)
            done += job.output.nbytes
            if on_progress:
                on_progress(done, total)

    described = manifest(plan) | {"adapter": {"rank": rank}}
    described["target_tensors"] = described.pop("tensors")
    for entry in described["target_tensors"].values():
        del entry["stored"]  # the adapter stores none of them
    return _write(
        plan.target,
        changes(),
        files,
        out,
        described,
        overwrite=overwrite,
        finish=finish,
        rank=rank,
    )


def extract_adapter(
    base: str | Path,
    model: str | Path,
    out: Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    select: str = "all",
    layouts: Iterable[str | Path] = (),
    overwrite: bool = False,
    finish: Callable[[Path], None] | None = None,
) -> AdapterSummary:
    """Write the difference of a fine-tuned model and its base as an adapter.

    Args:
        base: the checkpoint that the adapter will be put on.
        model: the fine-tuned checkpoint.
        out: the folder to create.
        rank: the largest rank of a matrix; or
        energy: the share of the squared change of every matrix that has to stay, in (0, 1].
        select: which tensors are compared: `all`, `language_model` or `linear`.
        layouts: files with layouts of your own.
        overwrite: replace the folder of an earlier run.
        finish: called with the folder when all else is in it, to write a card.

    Returns:
        What the adapter holds.

    Raises:
        OutputError: if `out` exists, or tensors changed that no adapter can hold.
        RecipeError: if neither or both of `rank` and `energy` are given.
        NotMergeableError: if the model is no descendant of the base.
        InputChangedError: if one of the two changes meanwhile.
    """
    if (rank is None) == (energy is None):
        raise RecipeError(["give either rank or energy"], "the call")
    refuse_existing(out, overwrite=overwrite)
    ancestor, tuned = Checkpoint.open(base), Checkpoint.open(model)
    protect_inputs(out, (ancestor, tuned))
    files = SourceFiles((ancestor, tuned), extracting=True)
    alignment = align(ancestor, tuned, select=select, layouts=read_all_layouts(layouts))
    if reasons := alignment.reasons():
        raise NotMergeableError(reasons)

    def changes() -> Iterator[_Change]:
        for merged in alignment.merged:
            origin = ancestor.read_tensor(merged.target).float()
            checkpoint, name = alignment.source(merged)
            yield merged.target, checkpoint.read_tensor(name).float() - origin

    described = {
        "format": 1,
        "adapter": {
            "base": pinned(str(base), ancestor.folder),
            "model": pinned(str(model), tuned.folder),
            "rank": rank,
            "energy": energy,
        },
        "versions": versions(),
    }
    summary = _write(
        ancestor,
        changes(),
        files,
        out,
        described,
        overwrite=overwrite,
        finish=finish,
        rank=rank,
        energy=energy,
    )
    for why in alignment.kept.values():
        summary.left_out[why] = summary.left_out.get(why, 0) + 1
    return summary


def _change_of(plan: MergePlan, job: TensorJob, worker: SliceWorker) -> Tensor | LowRank:
    """The merged tensor minus the target's, as factors where the method leaves it so."""
    deltas = low_rank_deltas(plan, job)
    if deltas is not None and job.base == (plan.target, job.output.name):
        return merged_delta(plan, job, deltas)
    merged = torch.empty(job.output.nbytes // item_size(job.output.dtype))
    for start, stop in slices_of(plan, job):
        merged[start:stop] = worker.compute(job, start, stop)
    return merged.sub_(plan.target.read(job.output.name).float()).view(job.output.shape)


class _Collector:
    """Turns changed tensors into the contents of an adapter, and collects what cannot be one."""

    def __init__(self, base: Checkpoint, limits: Mapping[str, Any]) -> None:
        self._base = base
        self._limits = limits
        self._slots: SlotMap = slots_of(base)
        self._modules = parameter_modules(base.folder)
        self._memory = memory_names(base, list(self._modules))
        self._disk = {memory: disk for disk, memory in self._memory.items()}
        self._tied = geometry(base, self._slots).tied
        self.summary = AdapterSummary()
        self.tensors: dict[str, Tensor] = {}
        self.biases: dict[str, Tensor] = {}
        self.saved: list[str] = []
        self.problems: list[str] = []

    def take(self, name: str, change: Tensor | LowRank) -> None:
        changed = change.left.any() if isinstance(change, LowRank) else change.any()
        if not changed:
            self.summary.unchanged += 1
            return
        parameter = self._memory.get(name, "")
        module, kind = self._modules.get(parameter, ("", "inner"))
        leaf = parameter.rpartition(".")[2]
        if self._slots.by_name[name] == "llm.embed.weight" and self._tied:
            self.problems.append(f"{name} (tied to the head)")
        elif leaf == "weight" and kind in ("linear", "embedding", "convolution"):
            self._factor(name, module, kind, change)
        elif leaf == "bias" and kind == "linear":
            self.biases[module] = self._whole(name, change)
        elif kind == "plain":
            if module not in self.saved:
                self.saved.append(module)
                self.summary.whole.append(module)
            self.tensors[parameter] = self._whole(name, change)
        else:
            self.problems.append(name)

    def finish(self) -> None:
        """Add what a module needs besides the tensors that changed."""
        for module, bias in self.biases.items():
            self.tensors[f"{module}.base_layer.bias"] = bias
            self.summary.whole.append(f"{module}.bias")
            if module not in self.summary.ranks:  # PEFT keeps biases of adapted modules only
                rows, columns = self._base.meta(self._disk[f"{module}.weight"]).shape
                self.tensors[f"{module}.lora_A.weight"] = torch.zeros(1, columns)
                self.tensors[f"{module}.lora_B.weight"] = torch.zeros(rows, 1)
                self.summary.ranks[module] = 1
        for parameter, (module, _) in self._modules.items():
            if module in self.saved and parameter not in self.tensors:
                stored = self._base.read_tensor(self._disk[parameter])
                self.tensors[parameter] = stored.float()

    def _whole(self, name: str, change: Tensor | LowRank) -> Tensor:
        stored = self._base.read_tensor(name).float()
        dense = change.dense() if isinstance(change, LowRank) else change
        return stored + dense.view(stored.shape)

    def _factor(self, name: str, module: str, kind: str, change: Tensor | LowRank) -> None:
        shape = self._base.meta(name).shape
        matrix = change if isinstance(change, LowRank) else change.flatten(1)
        factors, energy = truncate(matrix, **self._limits)
        a, b = factors.right, factors.left
        if kind == "embedding":
            self.tensors[f"{module}.lora_embedding_A"] = b.T
            self.tensors[f"{module}.lora_embedding_B"] = a.T
        else:
            inner = [1] * (len(shape) - 2)
            self.tensors[f"{module}.lora_A.weight"] = a.reshape(-1, *shape[1:])
            self.tensors[f"{module}.lora_B.weight"] = b.reshape(*b.shape, *inner)
        self.summary.ranks[module] = b.shape[1]
        self.summary.energy[module] = energy


def _write(
    base: Checkpoint,
    changes: Iterable[_Change],
    files: SourceFiles,
    out: Path,
    described: Mapping[str, Any],
    *,
    overwrite: bool,
    finish: Callable[[Path], None] | None,
    **limits: Any,
) -> AdapterSummary:
    collector = _Collector(base, limits)
    for name, change in changes:
        collector.take(name, change)
    if collector.problems:
        shown = ", ".join(collector.problems[:3])
        raise OutputError(
            f"{len(collector.problems)} tensors changed that no LoRA adapter holds, such as "
            f"{shown}; write a full checkpoint, or leave them out with `select: linear`"
        )
    collector.finish()
    files.check()  # nothing of them is read from here on
    summary = collector.summary
    if not collector.tensors:
        raise OutputError("nothing changed, so there is no adapter to write")
    config = _config(base, collector)
    outputs = [
        OutputTensor(f"base_model.model.{name}", "F32", tuple(tensor.shape))
        for name, tensor in collector.tensors.items()
    ]
    summary.nbytes = sum(output.nbytes for output in outputs)
    with CheckpointWriter(out, [outputs], overwrite=overwrite, stem="adapter_model") as writer:
        for output, tensor in zip(outputs, collector.tensors.values(), strict=True):
            writer.write(output.name, tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        text = json.dumps(config, indent=1, ensure_ascii=False)
        (writer.folder / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
        tensors = {output.name: {"stored": stored(output)} for output in outputs}
        write_manifest({**described, "tensors": tensors}, writer.folder, writer.digests())
        if finish:
            finish(writer.folder)
    return summary


def _base_model(base: Checkpoint) -> dict[str, Any]:
    """Where PEFT finds the base: a path, or a repository of the Hub with its commit."""
    repo, _, commit = pinned(base.reference, base.folder).partition("@")
    if commit and commit == commit_of(base.folder):
        return {"base_model_name_or_path": repo, "revision": commit}
    return {"base_model_name_or_path": base.reference}


def _config(base: Checkpoint, collector: _Collector) -> dict[str, Any]:
    """PEFT's config; alpha equals the rank everywhere, so that the scale is 1."""
    ranks = collector.summary.ranks
    largest = max(ranks.values(), default=1)
    smaller = {module: rank for module, rank in ranks.items() if rank != largest}
    return {
        "peft_type": "LORA",
        "task_type": None,
        **_base_model(base),
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": smaller,
        "alpha_pattern": smaller,
        "target_modules": list(ranks),
        "modules_to_save": collector.saved or None,
        "bias": "lora_only" if collector.biases else "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
    }

"""Merge multimodal LLMs: map, merge and search, without training and without labels.

The public API, loaded on first use so that `import omnimerge` costs nothing:

* `load_recipe(source)`: a YAML file or a mapping -> `Recipe`
* `plan(recipe)`: what a merge would do -> `MergePlan`
* `merge(recipe, out)`: write the merged checkpoint
* `verify(out)`: hold a merged checkpoint against its manifest, its target and its recipe
* `merge_as_adapter(recipe, out, rank)`: write what the merge changes as one PEFT adapter
* `extract_adapter(base, model, out, rank=16)`: what a fine-tuning changed, as a PEFT adapter
* `search(recipe, prompts, out)`: find a coefficient without labels -> `SearchResult`
* `merge_tensors(method, models, base, **parameters)`: one tensor, in memory
* `merge_state_dicts(method, models, base, **parameters)`: whole models, in memory
* `LowRank`: a task vector as two factors, for both of these
* `methods()`: every merge method by name
* `inspect(path)`: what a checkpoint is; `align(target, donor)`: what goes where
* `OmnimergeError`: the base of every error raised on purpose
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omnimerge.compose.registration import register as _register

if TYPE_CHECKING:
    from omnimerge.arch import Alignment
    from omnimerge.engine import MergePlan, Recipe
    from omnimerge.engine.adapter import AdapterSummary

__version__ = "0.1.0"

__all__ = [
    "LowRank",
    "MergePlan",
    "OmnimergeError",
    "Recipe",
    "__version__",
    "align",
    "extract_adapter",
    "inspect",
    "load_recipe",
    "merge",
    "merge_as_adapter",
    "merge_state_dicts",
    "merge_tensors",
    "methods",
    "plan",
    "search",
    "verify",
]

_LAZY = {
    "LowRank": "omnimerge.methods",
    "extract_adapter": "omnimerge.engine.adapter",
    "MergePlan": "omnimerge.engine",
    "Recipe": "omnimerge.engine",
    "OmnimergeError": "omnimerge.errors",
    "load_recipe": "omnimerge.engine",
    "merge_state_dicts": "omnimerge.methods",
    "merge_tensors": "omnimerge.methods",
    "verify": "omnimerge.engine.verify",
}

_register()  # transformers' auto classes load composed models; costs nothing until they are used


def __getattr__(name: str) -> Any:
    """Import public names on first use; the rooms `methods` and `search` can be called too."""
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in ("methods", "search"):
        return importlib.import_module(f"omnimerge.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def inspect(path: str | Path, *, layouts: Collection[str | Path] = ()) -> dict[str, Any]:
    """Describe a checkpoint from its headers: components, geometry, dtypes, sizes.

    Args:
        path: folder, or Hub id with an optional ``@revision``.
        layouts: files with layouts of your own; they go before the built-in ones.

    Returns:
        A JSON-ready mapping, the same as `omnimerge inspect --json`.

    Raises:
        CheckpointError: if the checkpoint cannot be opened.
    """
    from omnimerge.arch import read_all_layouts, summarize
    from omnimerge.checkpoint import Checkpoint

    with Checkpoint.open(path) as checkpoint:
        return summarize(checkpoint, read_all_layouts(layouts))


def align(
    target: str | Path,
    donor: str | Path,
    *,
    select: str = "language_model",
    vocabulary: str = "auto",
    branches: Mapping[str, str] | None = None,
    layouts: Collection[str | Path] = (),
) -> Alignment:
    """Map a donor onto a target: what is merged, kept and unused, and whether it may be merged.

    Args:
        target: folder or Hub id of the checkpoint whose architecture the output would have.
        donor: folder or Hub id of the checkpoint that is mapped onto it.
        select: `language_model`, `all` or `linear`.
        vocabulary: `auto`, `target` or `overlap`.
        branches: what else feeds the target's `shared`, `text` or `vision` tensors, where one side
            holds them twice: the donor's `text` or `vision` ones, or nothing (`keep`).
        layouts: files with layouts of your own; they go before the built-in ones.

    Returns:
        The alignment; `alignment.reasons()` is empty if the pair can be merged.

    Raises:
        CheckpointError: if a checkpoint cannot be opened.
        LayoutError: if a checkpoint fits no known layout, or a layout file is wrong.
    """
    from omnimerge.arch import align as align_checkpoints
    from omnimerge.arch import read_all_layouts
    from omnimerge.checkpoint import Checkpoint

    ours, theirs = Checkpoint.open(target), Checkpoint.open(donor)
    return align_checkpoints(
        ours,
        theirs,
        select=select,
        vocabulary=vocabulary,
        branches=branches,
        layouts=read_all_layouts(layouts),
    )


def plan(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    force: Collection[str] = (),
    ancestor: bool = False,
) -> MergePlan:
    """Plan a merge: one job per output tensor, bytes to read and write, peak memory.

    Args:
        recipe: a YAML file, the mapping it would hold, or a `Recipe`.
        force: names of gates to waive: `accounting`, `geometry`, `quantization`, `ancestor`,
            `finite`.
        ancestor: also run the ancestor test, which reads a sample of the weights.

    Returns:
        The plan.

    Raises:
        RecipeError: if the recipe is wrong; all problems at once.
        CheckpointError: if a checkpoint cannot be opened.
        NotMergeableError: if a gate refuses; all reasons at once.
    """
    from omnimerge.engine import build_plan, load_recipe

    return build_plan(load_recipe(recipe), force=force, ancestor=ancestor)


def merge(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    out: str | Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    memory: int = 10**9,
    device: str = "cpu",
    executor: str = "local",
    address: str | None = None,
    force: Collection[str] = (),
    on_progress: Callable[[int, int], None] | None = None,
) -> MergePlan:
    """Merge checkpoints into a folder that transformers loads.

    The folder holds the weights, the target's other files as they are (its README.md under the
    name README.target.md), a manifest and a model card. It appears complete or not at all.
    A merge that was killed leaves a hidden folder beside it, which `resume` goes on with.

    Args:
        recipe: a YAML file, the mapping it would hold, or a `Recipe`.
        out: the folder to create.
        overwrite: replace an existing folder, once the new one is complete.
        resume: go on with what an interrupted run of the same merge left; if there is nothing,
            begin; if all is there already, do nothing.
        memory: bytes for the buffers of all threads together; a matrix that a method has to see
            whole is held even if it is larger. Of the local executor.
        device: what computes: `cpu`, `auto` (all CUDA GPUs, where there are any), `cuda` (the first
            one), `cuda:1`, or several: `cuda:0,cuda:1`. Of the local executor.
        executor: `local`, the threads of this process, or `ray`, a cluster whose machines all see
            the folders of the recipe and of `out`.
        address: of the Ray cluster, `auto` for the one that this machine is part of; None: the one
            that RAY_ADDRESS names, or one on this machine alone.
        force: names of gates to waive: `accounting`, `geometry`, `quantization`, `ancestor`,
            `finite`.
        on_progress: called with (bytes written, bytes to write), first of all with what was there.

    Returns:
        The plan that was carried out.

    Raises:
        RecipeError: if the recipe is wrong; all problems at once. Or if the device cannot be used.
        CheckpointError: if a checkpoint cannot be read.
        NotMergeableError: if a gate refuses; all reasons at once.
        NonFiniteError: if an input holds NaN or infinity.
        OutputError: if the output exists or cannot be written.
        ExecutorError: if Ray is not installed, or its cluster cannot be used.
    """
    from contextlib import closing

    from omnimerge.checkpoint.writer import refuse_existing, refuse_mounted
    from omnimerge.engine import build_plan, executor_named, load_recipe, run_plan
    from omnimerge.report import write_card

    if resume:  # before the ancestor test takes its time
        refuse_mounted(Path(out))
    else:
        refuse_existing(Path(out), overwrite=overwrite)
    chosen = executor_named(executor, memory=memory, address=address, device=device)
    with closing(chosen) as workers:
        parsed = load_recipe(recipe)
        built = build_plan(parsed, force=force)
        run_plan(
            built,
            Path(out),
            overwrite=overwrite,
            resume=resume,
            executor=workers,
            on_progress=on_progress,
            finish=write_card,
        )
    return built


def merge_as_adapter(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    out: str | Path,
    rank: int,
    *,
    overwrite: bool = False,
    force: Collection[str] = (),
    on_progress: Callable[[int, int], None] | None = None,
) -> AdapterSummary:
    """Merge, and write what changes in the target as one PEFT LoRA adapter.

    Args:
        recipe: a YAML file, the mapping it would hold, or a `Recipe`; its `dtype` plays no part.
        out: the folder to create.
        rank: the largest rank of a matrix.
        overwrite: replace the folder of an earlier merge, once the new one is complete.
        force: names of gates to waive: `accounting`, `geometry`, `quantization`, `ancestor`,
            `finite`.
        on_progress: called with (bytes done, bytes to do).

    Returns:
        What the adapter holds, with the share of the change that its rank leaves.

    Raises:
        RecipeError: if the recipe is wrong; all problems at once.
        OutputError: if the output exists, or tensors changed that no adapter can hold.
    """
    from omnimerge.checkpoint.writer import refuse_existing
    from omnimerge.engine import adapter, build_plan, load_recipe
    from omnimerge.errors import RecipeError
    from omnimerge.report import write_card

    if rank < 1:
        raise RecipeError([f"rank: {rank} is not positive"], "the call")
    refuse_existing(Path(out), overwrite=overwrite)
    built = build_plan(load_recipe(recipe, replace={"dtype": "float32"}), force=force)
    return adapter.merge_as_adapter(
        built, Path(out), rank, overwrite=overwrite, on_progress=on_progress, finish=write_card
    )

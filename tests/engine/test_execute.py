"""The merge itself: exactness, bad days, and that the output is complete or not there."""

import errno
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_merge import files, recipe_of

import omnimerge
from omnimerge.checkpoint import Checkpoint
from omnimerge.engine import build_plan, load_recipe, merged_tensors
from omnimerge.engine import plan as plan_module
from omnimerge.errors import (
    CheckpointError,
    NonFiniteError,
    NotMergeableError,
    OmnimergeError,
    OutputError,
    RecipeError,
)
from omnimerge.methods import all_methods


@pytest.fixture
def recipe(checkpoints):
    return recipe_of(checkpoints)


def with_donor(recipe, tmp_path, change):
    """The recipe with a changed copy of its donor."""
    copy = tmp_path / "donor"
    shutil.copytree(recipe["models"][0], copy)
    file = copy / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return {**recipe, "models": [str(copy)]}


def leftovers(folder):
    return sorted(
        p.name for p in Path(folder).iterdir() if p.name.startswith(".") or p.name == "out"
    )


def test_the_published_result_is_reproduced(golden, tmp_path):
    case = golden / "adamms" / "llava_onevision_into_qwen2_vl"
    alpha = json.loads((case / "case.json").read_text())["alpha"]
    recipe = {
        "method": "adamms",
        "target": str(case / "target"),
        "models": [str(case / "donor")],
        "parameters": {"alpha": alpha},
    }
    plan = omnimerge.merge(recipe, tmp_path / "out")
    expected = load_file(case / "expected.safetensors")
    out = Checkpoint.open(tmp_path / "out")
    assert set(out.tensors) == set(expected)
    for name, tensor in expected.items():
        got = out.read_tensor(name).double()
        assert (got - tensor.double()).norm() <= 1e-6 * tensor.double().norm(), name
    assert len(plan.merged) == 25
    assert [f.name for f in out.files] == [  # the target's own shards
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


def test_files_of_the_output(recipe, tmp_path):
    target = Path(recipe["target"])
    (target / "README.md").write_text("the target's card")
    omnimerge.merge(recipe, tmp_path / "out")
    out = tmp_path / "out"
    assert (out / "config.json").read_bytes() == (target / "config.json").read_bytes()
    assert (out / "README.target.md").read_text() == "the target's card"
    card = (out / "README.md").read_text()
    assert "merged by `adamms` | 27" in card and "alpha: 0.3" in card
    manifest = json.loads((out / "merge_manifest.json").read_text())
    assert manifest["counts"] == {"adamms": 27, "kept": len(Checkpoint.open(target).tensors) - 27}
    assert manifest["inputs"]["target"]["files"][0]["bytes"] > 0
    assert len(manifest["inputs"]["models.0"]["files"][0]["header_sha256"]) == 64
    assert {"omnimerge", "torch", "python"} <= set(manifest["versions"])
    assert set(manifest["tensors"]) == set(Checkpoint.open(target).tensors)
    (target / "README.md").unlink()


def test_one_rounding_from_float32(checkpoints, tmp_path):
    def halved(name):
        folder = tmp_path / name
        shutil.copytree(checkpoints(name), folder)
        file = folder / "model.safetensors"
        save_file({k: v.bfloat16() for k, v in load_file(file).items()}, file)
        return folder

    target, donor = halved("qwen2_vl"), halved("llava_onevision")
    recipe = {
        "method": "adamms",
        "target": str(target),
        "models": [str(donor)],
        "parameters": {"alpha": 0.3},
    }
    omnimerge.merge(recipe, tmp_path / "out")
    out, ours, theirs = (Checkpoint.open(f) for f in (tmp_path / "out", target, donor))
    for layer in (0, 1):
        leaf = f"layers.{layer}.mlp.up_proj.weight"
        a = ours.read_tensor(f"model.{leaf}").float()
        b = theirs.read_tensor(f"language_model.model.{leaf}").float()
        assert torch.equal(out.read_tensor(f"model.{leaf}"), (0.7 * a + 0.3 * b).bfloat16())


def test_chunks_do_not_show(recipe, tmp_path, monkeypatch):
    omnimerge.merge(recipe, tmp_path / "whole")
    monkeypatch.setattr("omnimerge.engine.slices.CHUNK_ELEMENTS", 7)
    monkeypatch.setattr("omnimerge.engine.slices._KERNEL_ELEMENTS", 3)
    omnimerge.merge(recipe, tmp_path / "pieces")
    whole, pieces = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("whole", "pieces"))
    assert whole == pieces


SLICED = sorted(m.name for m in all_methods().values() if m.slices != "whole" and m.needs_base)


@pytest.mark.parametrize("name", SLICED)
def test_slices_of_task_vectors_do_not_show(name, checkpoints, tmp_path, monkeypatch):
    folders = [str(checkpoints("qwen2_vl", own=own)) for own in ("base", "expert0", "expert1")]
    one = all_methods()[name].models[1] == 1
    recipe = {"method": name, "base": folders[0], "models": folders[1 : 2 if one else 3], "seed": 3}
    recipe["parameters"] = {"t": 0.01} if name == "nearswap" else {}
    omnimerge.merge(recipe, tmp_path / "whole")
    monkeypatch.setattr("omnimerge.engine.slices.CHUNK_ELEMENTS", 300)
    monkeypatch.setattr("omnimerge.engine.slices._KERNEL_ELEMENTS", 70)
    monkeypatch.setattr("omnimerge.engine.knowledge.MEASURED_ELEMENTS", 190)
    omnimerge.merge(recipe, tmp_path / "pieces")
    whole, pieces = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("whole", "pieces"))
    assert whole == pieces


def test_tensors_in_memory_are_those_on_disk(recipe, tmp_path):
    omnimerge.merge(recipe, tmp_path / "out")
    out = Checkpoint.open(tmp_path / "out")
    plan = build_plan(load_recipe({**recipe, "parameters": {"alpha": 0.5}}))
    tensors = dict(merged_tensors(plan, {"alpha": 0.3}))
    assert len(tensors) == 27
    assert all(torch.equal(t, out.read_tensor(name)) for name, t in tensors.items())


def test_overrides_take_the_first_match(recipe, tmp_path):
    overrides = [
        {"match": {"name": r"mlp\.up_proj"}, "keep": "target"},
        {"match": {"layers": "1"}, "parameters": {"alpha": 1.0}},
    ]
    omnimerge.merge({**recipe, "overrides": overrides}, tmp_path / "out")
    target, donor = Checkpoint.open(recipe["target"]), Checkpoint.open(recipe["models"][0])
    out = Checkpoint.open(tmp_path / "out")

    def read(checkpoint, name):
        return checkpoint.read_tensor(name)

    up, gate = "layers.1.mlp.up_proj.weight", "layers.1.mlp.gate_proj.weight"
    assert torch.equal(read(out, f"model.{up}"), read(target, f"model.{up}"))
    assert torch.equal(read(out, f"model.{gate}"), read(donor, f"language_model.model.{gate}"))
    first = "layers.0.mlp.gate_proj.weight"
    expected = 0.7 * read(target, f"model.{first}") + 0.3 * read(
        donor, f"language_model.model.{first}"
    )
    torch.testing.assert_close(read(out, f"model.{first}"), expected)


def test_output_dtype_and_config(recipe, tmp_path):
    omnimerge.merge({**recipe, "dtype": "bfloat16"}, tmp_path / "out")
    out = Checkpoint.open(tmp_path / "out")
    assert {meta.dtype for meta in out.tensors.values()} == {"BF16"}
    before = json.loads((Path(recipe["target"]) / "config.json").read_text())
    assert before["dtype"] == "float32"
    assert out.config == {**before, "dtype": "bfloat16"}


def test_small_shards_have_an_index(recipe, tmp_path):
    omnimerge.merge({**recipe, "max_shard_size": "20KB"}, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    out = Checkpoint.open(tmp_path / "out")
    assert index["metadata"]["total_size"] == out.total_bytes()
    assert set(index["weight_map"]) == set(out.tensors)
    assert len(out.files) > 3
    whole = Checkpoint.open(recipe["target"])
    assert out.total_bytes() == whole.total_bytes()


def test_an_existing_folder_is_refused_and_can_be_replaced(recipe, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    with pytest.raises(OutputError, match="exists and is not empty"):
        omnimerge.merge(recipe, out)
    with pytest.raises(OutputError, match="is not the folder of an earlier merge"):
        omnimerge.merge(recipe, out, overwrite=True)
    assert (out / "mine.txt").read_text() == "precious"
    shutil.rmtree(out)
    omnimerge.merge(recipe, out)
    (out / "old.txt").write_text("of the earlier merge")
    omnimerge.merge(recipe, out, overwrite=True)
    assert not (out / "old.txt").exists()
    assert leftovers(tmp_path) == ["out"]


def test_an_output_that_is_or_holds_an_input_is_refused(recipe, tmp_path):
    models = tmp_path / "models"
    shutil.copytree(recipe["target"], models / "a")
    shutil.copytree(recipe["models"][0], models / "b")
    (models / "merge_manifest.json").write_text("{}")
    mine = {**recipe, "target": str(models / "a"), "models": [str(models / "b")]}
    for out in (models, models / "a", models / "b"):
        (out / "merge_manifest.json").write_text("{}")
        with pytest.raises(OutputError, match="is or holds an input"):
            omnimerge.merge(mine, out, overwrite=True)
    assert (models / "b" / "model.safetensors").is_file()


def test_a_folder_that_appears_during_the_merge_is_kept(recipe, tmp_path):
    from omnimerge.engine import run_plan

    out = tmp_path / "out"

    def appear(_):
        out.mkdir()
        (out / "mine.txt").write_text("precious")

    with pytest.raises(OutputError, match=r"exists and is not empty.*; what is done is kept"):
        run_plan(build_plan(load_recipe(recipe)), out, finish=appear)
    assert (out / "mine.txt").read_text() == "precious"
    assert leftovers(tmp_path) == [".out.omnimerge", "out"]


def test_folders_made_for_a_failed_merge_are_removed(recipe, tmp_path):
    bad = with_donor(recipe, tmp_path, lambda t: t[UP].fill_(math.nan))
    with pytest.raises(NonFiniteError):
        omnimerge.merge(bad, tmp_path / "new" / "deep" / "out")
    assert not (tmp_path / "new").exists()


def test_a_disk_that_fills_up_at_the_card_is_explained(recipe, tmp_path):
    from omnimerge.engine import run_plan

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OutputError, match=r"no space left for.*; what is done is kept"):
        run_plan(build_plan(load_recipe(recipe)), tmp_path / "out", finish=full)
    assert leftovers(tmp_path) == [".out.omnimerge"]
    run_plan(build_plan(load_recipe(recipe)), tmp_path / "out", resume=True)
    assert leftovers(tmp_path) == ["out"]


def test_what_training_left_in_the_target_is_not_copied(recipe, tmp_path):
    target = tmp_path / "target"
    shutil.copytree(recipe["target"], target)
    for name in ("optimizer.pt", "rng_state_0.pth", "checkpoint-5/optimizer.pt", "spk_dict.pt"):
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_text("x")
    (target / "model.safetensors.index.fp32.json").write_text("{}")
    omnimerge.merge({**recipe, "target": str(target)}, tmp_path / "out")
    kept = {p.name for p in (tmp_path / "out").rglob("*")}
    assert "spk_dict.pt" in kept
    assert not kept & {"optimizer.pt", "rng_state_0.pth", "checkpoint-5"}
    assert not any(".index." in name for name in kept)


def test_overrides_that_fit_nothing_are_refused(recipe):
    for match in ({"layers": "50-60"}, {"name": "modle.layers"}, {"component": "audio"}):
        override = {"match": match, "keep": "target"}
        with pytest.raises(RecipeError, match=r"overrides.0.match: fits no tensor"):
            omnimerge.plan({**recipe, "overrides": [override]})


def test_unknown_gates_are_refused(recipe, tmp_path):
    with pytest.raises(RecipeError, match="did you mean 'ancestor'"):
        omnimerge.merge(recipe, tmp_path / "out", force=["ancester"])
    with pytest.raises(RecipeError, match="give a list"):
        omnimerge.merge(recipe, tmp_path / "out", force="finite")


def test_the_manifest_lists_what_was_not_used(recipe, tmp_path):
    omnimerge.merge(recipe, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "merge_manifest.json").read_text())
    (alignment,) = manifest["alignments"]
    donor = Checkpoint.open(recipe["models"][0])
    assert len(alignment["unused"]) == len(donor.tensors) - 27
    assert alignment["ancestor"]["sampled"] == 14


def test_a_failed_overwrite_leaves_the_old_folder(recipe, tmp_path):
    out = tmp_path / "out"
    omnimerge.merge(recipe, out)
    before = (out / "model.safetensors").read_bytes()
    bad = with_donor(recipe, tmp_path, lambda t: t[UP].fill_(math.nan))
    with pytest.raises(NonFiniteError):
        omnimerge.merge(bad, out, overwrite=True)
    assert (out / "model.safetensors").read_bytes() == before
    assert leftovers(tmp_path) == ["out"]


UP = "language_model.model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_donors_are_refused(recipe, tmp_path, value):
    bad = with_donor(recipe, tmp_path, lambda t: t[UP][5, 3].fill_(value))
    with pytest.raises(NonFiniteError, match=r"layers.1.mlp.up_proj.weight.* holds NaN or inf"):
        omnimerge.merge(bad, tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_nan_in_a_kept_tensor_is_refused_and_can_be_forced(recipe, checkpoints, tmp_path):
    target = tmp_path / "target"
    shutil.copytree(recipe["target"], target)
    tensors = load_file(target / "model.safetensors")
    tensors["visual.patch_embed.proj.weight"].flatten()[0] = math.nan
    save_file(tensors, target / "model.safetensors")
    bad = {**recipe, "target": str(target)}
    with pytest.raises(NonFiniteError, match=r"visual.patch_embed.proj.weight.*--force finite"):
        omnimerge.merge(bad, tmp_path / "out")
    omnimerge.merge(bad, tmp_path / "out", force=["finite"])
    got = Checkpoint.open(tmp_path / "out").read_tensor("visual.patch_embed.proj.weight")
    assert torch.isnan(got).sum() == 1


def test_float16_overflow_in_a_kept_tensor_is_refused(recipe, tmp_path):
    target = tmp_path / "target"
    shutil.copytree(recipe["target"], target)
    tensors = load_file(target / "model.safetensors")
    tensors["visual.patch_embed.proj.weight"].flatten()[0] = 1e5
    save_file(tensors, target / "model.safetensors")
    with pytest.raises(NonFiniteError, match=r"patch_embed.proj.weight' overflows float16"):
        omnimerge.merge({**recipe, "target": str(target), "dtype": "float16"}, tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_float16_overflow_is_refused(recipe, tmp_path):
    big = with_donor(recipe, tmp_path, lambda t: t[UP][0, 0].fill_(1e6))
    with pytest.raises(NonFiniteError, match="overflows float16"):
        omnimerge.merge({**big, "dtype": "float16"}, tmp_path / "out", force=["ancestor"])
    assert leftovers(tmp_path) == []


def test_a_foreign_ancestor_is_refused(recipe, checkpoints, tmp_path):
    foreign = {**recipe, "models": [str(checkpoints("llava_onevision", ancestor="foreign"))]}
    with pytest.raises(NotMergeableError, match="share no ancestor"):
        omnimerge.merge(foreign, tmp_path / "out")
    assert leftovers(tmp_path) == []
    omnimerge.merge(foreign, tmp_path / "out", force=["ancestor"])
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_plan_reads_no_tensor_data(recipe, monkeypatch):
    def refuse(*_):
        raise AssertionError("tensor data was read")

    monkeypatch.setattr(Checkpoint, "_read_into", refuse)
    plan = omnimerge.plan(recipe)
    target = Checkpoint.open(recipe["target"])
    assert plan.bytes_to_write == target.total_bytes()
    merged = sum(target.meta(job.output.name).nbytes for job in plan.merged)
    assert plan.bytes_to_read == target.total_bytes() + merged
    assert len(plan.jobs) == len(target.tensors)


def test_all_missing_checkpoints_are_reported_at_once(recipe, tmp_path):
    wrong = {**recipe, "target": str(tmp_path / "no1"), "models": [str(tmp_path / "no2")]}
    with pytest.raises(OmnimergeError) as error:
        omnimerge.merge(wrong, tmp_path / "out")
    assert "no1" in str(error.value) and "no2" in str(error.value)
    assert leftovers(tmp_path) == []


def test_a_truncated_shard_is_refused(recipe, tmp_path):
    copy = tmp_path / "donor"
    shutil.copytree(recipe["models"][0], copy)
    with (copy / "model.safetensors").open("r+b") as stream:
        stream.truncate(5000)
    with pytest.raises(CheckpointError, match="truncated"):
        omnimerge.merge({**recipe, "models": [str(copy)]}, tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_too_little_disk_is_seen_before_the_work(recipe, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match=r"no space left.*1,000 are free"):
        omnimerge.merge(recipe, tmp_path / "out")
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
def test_a_disk_that_fills_up_leaves_nothing(recipe, tmp_path, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OutputError, match="no space left"):
        omnimerge.merge(recipe, tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_a_file_size_limit_is_met_with_one_line(recipe, tmp_path):
    """A real limit of the kernel, on the real command."""
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe))
    size = Checkpoint.open(recipe["target"]).total_bytes()

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

    command = [sys.executable, "-m", "omnimerge", "merge", str(file), "-o", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, check=False)
    assert done.returncode == 1
    assert "would be larger than this process or file system allows" in done.stderr
    assert "raise the limit (`ulimit -f`), or give a smaller max_shard_size" in done.stderr
    assert done.stderr.count("\n") == 1
    assert leftovers(tmp_path) == []


def test_an_interrupt_keeps_what_is_done(recipe, tmp_path):
    sent = []

    def interrupt(done, total):
        if done and not sent:
            sent.append(done)
            os.kill(os.getpid(), signal.SIGINT)

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        omnimerge.merge(recipe, out, on_progress=interrupt)
    assert leftovers(tmp_path) == [".out.omnimerge"]
    with pytest.raises(OutputError, match=r"an interrupted merge left .*--resume, .*clean"):
        omnimerge.merge(recipe, out)
    seen = []
    omnimerge.merge(recipe, out, resume=True, on_progress=lambda done, total: seen.append(done))
    assert seen[0] >= sent[0] and leftovers(tmp_path) == ["out"]
    omnimerge.merge(recipe, tmp_path / "again")
    assert files(out) == files(tmp_path / "again")


def test_an_interrupt_before_anything_is_done_leaves_nothing(recipe, tmp_path):
    def interrupt(done, total):
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        omnimerge.merge(recipe, tmp_path / "out", on_progress=interrupt)
    assert leftovers(tmp_path) == []


def test_a_second_interrupt_while_tidying_up_leaves_nothing(recipe, tmp_path, monkeypatch):
    rmtree, calls = shutil.rmtree, []

    def interrupted(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 1:
            raise KeyboardInterrupt
        rmtree(*arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    bad = with_donor(recipe, tmp_path, lambda t: t[UP].fill_(math.nan))
    with pytest.raises(NonFiniteError):
        omnimerge.merge(bad, tmp_path / "out")
    assert len(calls) == 2 and leftovers(tmp_path) == []


def test_methods_that_need_them_get_whole_tensors(recipe, tmp_path, monkeypatch):
    seen = []
    plan = build_plan(load_recipe(recipe))
    method = plan.method

    def fn(models, base=None, *, alpha):
        seen.append(tuple(models[0].shape))
        return method.fn(models, base, alpha=alpha)

    from dataclasses import replace

    whole = replace(method, fn=fn, slices="whole")
    monkeypatch.setattr(plan_module.Recipe, "merge_method", property(lambda _: whole))
    tensors = dict(merged_tensors(plan))
    assert (64, 32) in seen and len(seen) == 27
    monkeypatch.undo()
    assert all(torch.equal(tensors[k], v) for k, v in merged_tensors(plan))


def test_scalars_and_empty_tensors_are_merged_and_kept(checkpoints, tmp_path):
    def extended(own):
        folder = tmp_path / own
        shutil.copytree(checkpoints("qwen2", own=own), folder)
        tensors = load_file(folder / "model.safetensors")
        tensors["gate"] = torch.tensor(2.0 if own == "a" else 4.0)
        tensors["none"] = torch.zeros(0, 3)
        tensors["steps"] = torch.tensor([1, 2, 3])
        save_file(tensors, folder / "model.safetensors")
        return str(folder)

    recipe = {"method": "average", "models": [extended("a"), extended("b")]}
    plan = omnimerge.merge(recipe, tmp_path / "out")
    out = Checkpoint.open(tmp_path / "out")
    assert out.read_tensor("gate").item() == 3.0
    assert out.read_tensor("none").shape == (0, 3)
    assert out.read_tensor("steps").tolist() == [1, 2, 3]
    assert plan.kept_reasons() == {f"I64 is not merged ({recipe['models'][0]})": 1}

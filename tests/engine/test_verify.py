"""`omnimerge verify`: what is right passes, and each fault is named."""

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import omnimerge
from omnimerge.cli import main
from omnimerge.errors import OutputError

CHECKS = [
    "checksums of the files",
    "names, shapes and dtypes",
    "finite numbers",
    "tied tensors",
    "unmerged tensors are the target's",
]


@pytest.fixture
def merged(checkpoints, tmp_path):
    """An output, with inputs of its own."""
    for name in ("qwen2_vl", "llava_onevision"):
        shutil.copytree(checkpoints(name), tmp_path / name)
    recipe = {
        "method": "adamms",
        "target": str(tmp_path / "qwen2_vl"),
        "models": [str(tmp_path / "llava_onevision")],
        "parameters": {"alpha": 0.3},
    }
    omnimerge.merge(recipe, tmp_path / "out")
    return tmp_path / "out"


def states(out, **options):
    return {check.name: check.state for check in omnimerge.verify(out, **options)}


def failed(out, **options):
    return {c.name: c.details for c in omnimerge.verify(out, **options) if c.state == "failed"}


def change(out, do):
    tensors = load_file(out / "model.safetensors")
    do(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def test_a_merge_passes(merged):
    expected = dict.fromkeys([*CHECKS, "20 merged tensors computed again"], "ok")
    assert states(merged, deep=True) == expected
    assert states(merged) == dict.fromkeys(CHECKS, "ok")


def test_the_checksums_are_those_of_the_files(merged):
    import hashlib

    files = json.loads((merged / "merge_manifest.json").read_text())["files"]
    assert {"model.safetensors", "config.json"} <= files.keys()
    for name, digest in files.items():
        assert hashlib.sha256((merged / name).read_bytes()).hexdigest() == digest


def test_a_changed_file_and_a_missing_one(merged):
    (merged / "config.json").write_text((merged / "config.json").read_text() + " ")
    (merged / "chat_template.json").unlink(missing_ok=True)
    found = failed(merged)["checksums of the files"]
    assert "config.json is not what was written" in found


def test_one_bit_of_a_merged_tensor(merged):
    name = "model.layers.1.mlp.up_proj.weight"
    change(merged, lambda t: t[name].view(torch.int32)[0, 0].bitwise_xor_(1))
    assert set(failed(merged)) == {"checksums of the files"}
    found = failed(merged, deep=True, tensors=1000)
    again = found["1000 merged tensors computed again"]
    assert again == (f"tensor {name!r} is not what the recipe gives (elements 0:2048)",)


def test_one_bit_of_a_kept_tensor(merged):
    name = "visual.patch_embed.proj.weight"
    change(merged, lambda t: t[name].view(torch.int32).view(-1)[3].bitwise_xor_(1))
    found = failed(merged)
    assert found["unmerged tensors are the target's"] == (f"tensor {name!r} is not the target's",)


def test_nan_a_missing_tensor_and_one_too_many(merged):
    def spoil(tensors):
        tensors["model.norm.weight"][0] = float("nan")
        tensors["mine"] = torch.zeros(2)
        del tensors["visual.patch_embed.proj.weight"]

    change(merged, spoil)
    found = failed(merged)
    assert found["finite numbers"] == ("tensor 'model.norm.weight' holds NaN or infinity",)
    assert set(found["names, shapes and dtypes"]) == {
        "tensor 'visual.patch_embed.proj.weight' is missing",
        "tensor 'mine' should not be there",
    }


def test_another_dtype(merged):
    change(merged, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].half()}))
    (line,) = failed(merged)["names, shapes and dtypes"]
    assert line.startswith("tensor 'model.norm.weight' is F16 [") and "instead of F32 [" in line


def test_inputs_that_are_gone_or_changed_are_said(merged, tmp_path):
    donor = tmp_path / "llava_onevision" / "model.safetensors"
    tensors = load_file(donor)
    save_file({**tensors, "more": torch.zeros(1)}, donor)
    checks = {c.name: c for c in omnimerge.verify(merged, deep=True)}
    assert [checks[name].state for name in CHECKS] == ["ok", "skipped", "ok", "ok", "skipped"]
    assert "model.safetensors has changed since" in checks[CHECKS[1]].details[0]
    shutil.rmtree(tmp_path / "llava_onevision")
    checks = {c.name: c for c in omnimerge.verify(merged)}
    assert checks[CHECKS[1]].state == "skipped"
    assert "cannot be planned again" in checks[CHECKS[1]].details[0]


def test_a_tied_head_that_differs(checkpoints, tmp_path):
    folder = checkpoints("qwen2", own="base")
    out = tmp_path / "out"
    omnimerge.merge({"method": "linear", "models": [str(folder), str(folder)]}, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assert failed(out)["tied tensors"] == (
        "'lm_head.weight' is tied to 'model.embed_tokens.weight' by config.json and differs "
        "from it",
    )


def test_folders_that_are_no_merge(checkpoints, tmp_path):
    with pytest.raises(OutputError, match=r"is no merged checkpoint: merge_manifest.json: No such"):
        omnimerge.verify(checkpoints("qwen2_vl"))
    (tmp_path / "merge_manifest.json").write_text("[]")
    with pytest.raises(OutputError, match="it holds no merge"):
        omnimerge.verify(tmp_path)


def test_the_command(merged):
    done = CliRunner().invoke(main, ["verify", str(merged), "--deep", "--tensors", "3"])
    assert done.exit_code == 0
    assert done.output.splitlines()[0] == "ok      checksums of the files"
    assert done.output.splitlines()[-1] == "ok      3 merged tensors computed again"
    change(merged, lambda t: t["model.norm.weight"].fill_(float("inf")))
    done = CliRunner().invoke(main, ["verify", str(merged), "--json"])
    assert done.exit_code == 1
    checks = {c["name"]: c["state"] for c in json.loads(done.output)["checks"]}
    assert checks["finite numbers"] == "failed"

"""`omnimerge verify`: what is right passes, and each fault is named."""

import hashlib
import json
import math
import shutil
import sys

import llm_layouts as families
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
    "other files are the target's",
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


@pytest.mark.parametrize(("value", "force"), [(-math.inf, ()), (math.nan, ("finite",))])
def test_what_a_merge_lets_through_in_kept_tensors_passes(merged, tmp_path, value, force):
    """Infinity, such as of a mask; and NaN where it was asked to."""
    name = "visual.patch_embed.proj.weight"
    change(tmp_path / "qwen2_vl", lambda t: t[name].view(-1)[0].fill_(value))
    recipe = json.loads((merged / "merge_manifest.json").read_text())["recipe"]
    omnimerge.merge(recipe, merged, overwrite=True, force=force)
    assert states(merged) == dict.fromkeys(CHECKS, "ok")
    change(merged, lambda t: t["model.norm.weight"][0].fill_(math.inf))
    (line,) = failed(merged)["finite numbers"]
    assert line == "tensor 'model.norm.weight' holds NaN or infinity"


@pytest.fixture
def own_rows(tmp_path):
    """Merge where the donor lacks the last tokens; the target has infinity in a row of one."""
    ours = {f"t{row}": row for row in range(families.VOCAB)}
    ancestor, target, donor = (families.decoder(own) for own in ("base", "a", "b"))
    for name in ("embed", "head"):
        target[name][45, 3] = math.inf
        donor[name] = donor[name][:40]
    families.write(tmp_path / "base", families.llama(ancestor), tokens=ours)
    families.write(tmp_path / "target", families.phi3(target), tokens=ours)
    theirs = dict(list(ours.items())[:40])
    families.write(tmp_path / "donor", families.llama(donor), tokens=theirs)
    recipe = {
        "method": "nearswap",  # moves every entry by 0.1 at most, whatever the model's is
        "base": str(tmp_path / "base"),
        "target": str(tmp_path / "target"),
        "models": [str(tmp_path / "donor")],
        "parameters": {"t": 0.1},
        "vocabulary": "overlap",
    }
    omnimerge.merge(recipe, tmp_path / "out")
    return tmp_path / "out"


def test_infinity_in_rows_that_stay_the_targets_passes(own_rows):
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert load_file(own_rows / "model.safetensors")[name].isinf().nonzero().tolist() == [
            [45, 3]
        ]
    assert states(own_rows) == dict.fromkeys(CHECKS, "ok")


@pytest.mark.parametrize(
    ("row", "value", "finite", "kept"),
    [(39, math.inf, True, False), (40, math.nan, True, True), (40, math.inf, False, True)],
)
def test_what_is_not_finite_elsewhere_in_such_a_tensor_fails(own_rows, row, value, finite, kept):
    change(own_rows, lambda t: t["lm_head.weight"][row, 0].fill_(value))
    found = failed(own_rows)
    assert ("finite numbers" in found) == finite
    assert ("unmerged tensors are the target's" in found) == kept
    if finite:
        (line,) = found["finite numbers"]
        assert line == "tensor 'lm_head.weight' holds NaN or infinity"
    if kept:
        (line,) = found["unmerged tensors are the target's"]
        assert line == "tensor 'lm_head.weight': rows of no common token are not the target's"


def test_without_the_inputs_nobody_knows_whose_infinity_it_is(own_rows, tmp_path):
    (tmp_path / "donor").rename(tmp_path / "gone")
    found = {check.name: check for check in omnimerge.verify(own_rows)}["finite numbers"]
    assert found.state == "skipped"
    (line,) = found.details
    assert line.startswith("tensor 'lm_head.weight' holds NaN or infinity, where it may be the ")
    change(own_rows, lambda t: t["model.norm.weight"][0].fill_(math.inf))
    (line,) = failed(own_rows)["finite numbers"]
    assert line == "tensor 'model.norm.weight' holds NaN or infinity"


def test_nan_in_a_kept_tensor_that_nobody_asked_for(merged):
    name = "visual.patch_embed.proj.weight"
    change(merged, lambda t: t[name].view(-1)[0].fill_(math.nan))
    assert failed(merged)["finite numbers"] == (f"tensor {name!r} holds NaN",)


def test_another_dtype(merged):
    change(merged, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].half()}))
    (line,) = failed(merged)["names, shapes and dtypes"]
    assert line.startswith("tensor 'model.norm.weight' is F16 [") and "instead of F32 [" in line


def test_inputs_that_are_gone_or_changed_are_said(merged, tmp_path):
    donor = tmp_path / "llava_onevision" / "model.safetensors"
    tensors = load_file(donor)
    save_file({**tensors, "more": torch.zeros(1)}, donor)
    checks = {c.name: c for c in omnimerge.verify(merged, deep=True)}
    assert [checks[name].state for name in CHECKS] == [*["ok"] * 4, "skipped", "skipped"]
    assert "model.safetensors has changed since" in checks[CHECKS[4]].details[0]
    shutil.rmtree(tmp_path / "llava_onevision")
    checks = {c.name: c for c in omnimerge.verify(merged)}
    assert [checks[name].state for name in CHECKS] == [*["ok"] * 4, "skipped", "skipped"]
    assert "is not here; run it in the folder where the merge ran" in checks[CHECKS[4]].details[0]


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
    with pytest.raises(
        OutputError, match=r"is no merged checkpoint: cannot .*_manifest.json: No such"
    ):
        omnimerge.verify(checkpoints("qwen2_vl"))
    for text, why in (("[]", "does not hold a JSON object"), ("{}", "it holds no merge")):
        (tmp_path / "merge_manifest.json").write_text(text)
        with pytest.raises(OutputError, match=why):
            omnimerge.verify(tmp_path)


def test_the_command(merged):
    done = CliRunner().invoke(main, ["verify", str(merged), "--deep", "--tensors", "3"])
    assert done.exit_code == 0
    assert done.output.splitlines()[0] == "ok      checksums of the files"
    assert done.output.splitlines()[-2:] == [
        "ok      3 merged tensors computed again",
        "all 7 checks passed",
    ]
    change(merged, lambda t: t["model.norm.weight"].fill_(float("inf")))
    done = CliRunner().invoke(main, ["verify", str(merged), "--json"])
    assert done.exit_code == 1
    checks = {c["name"]: c["state"] for c in json.loads(done.output)["checks"]}
    assert checks["finite numbers"] == "failed"


# --- files -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def untouched(checkpoints, tmp_path_factory):
    """An output of several shards; tests work on copies."""
    out = tmp_path_factory.mktemp("sharded") / "out"
    recipe = {
        "method": "adamms",
        "target": str(checkpoints("qwen2_vl")),
        "models": [str(checkpoints("llava_onevision"))],
        "parameters": {"alpha": 0.3},
        "max_shard_size": "60KB",
    }
    omnimerge.merge(recipe, out)
    return out


@pytest.fixture
def sharded(untouched, tmp_path):
    shutil.copytree(untouched, tmp_path / "sharded")
    return tmp_path / "sharded"


INDEX = "model.safetensors.index.json"
FILES = CHECKS[0]


def edit(file, do):
    described = json.loads(file.read_text())
    do(described)
    file.write_text(json.dumps(described))


def test_every_file_is_in_the_manifest_but_itself_and_the_card(sharded):
    files = json.loads((sharded / "merge_manifest.json").read_text())["files"]
    there = {file.name for file in sharded.iterdir()}
    assert INDEX in files and files.keys() == there - {"merge_manifest.json", "README.md"}


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "consolidated.00.pth",
        "model.gguf",
        "modeling_x.py",
        "adapter_config.json",
        "tokenizer.json",
        "sub/modeling_x.py",
        "sub/README.md",
        "omnimerge.journal",
    ],
)
def test_a_file_that_was_added(sharded, name):
    assert not (sharded / name).exists()
    (sharded / name).parent.mkdir(exist_ok=True)
    weights = {"model.norm.weight": torch.zeros(64)}
    if name.endswith(".safetensors"):
        save_file(weights, sharded / name)
    else:
        (sharded / name).write_text("{}")
    assert failed(sharded)[FILES] == (f"{name} was added: the manifest does not name it",)


def test_a_folder_that_is_a_link(sharded, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (sharded / "code").symlink_to(tmp_path / "elsewhere")
    assert failed(sharded)[FILES] == ("code was added: the manifest does not name it",)


def test_the_card_may_be_edited_and_hidden_files_are_nobodys(sharded):
    (sharded / "README.md").write_text("mine")
    (sharded / ".gitattributes").write_text("mine")
    (sharded / ".cache").mkdir()
    (sharded / ".cache" / "x").write_text("mine")
    assert set(states(sharded).values()) == {"ok"}


def test_an_index_that_was_edited(sharded):
    edit(sharded / INDEX, lambda index: index["metadata"].update(total_size=1))
    assert failed(sharded) == {FILES: (f"{INDEX} is not what was written",)}


def test_an_index_that_leads_elsewhere(sharded):
    name = "model.norm.weight"
    index = json.loads((sharded / INDEX).read_text())
    other = next(file for file in index["weight_map"].values() if file != index["weight_map"][name])
    edit(sharded / INDEX, lambda index: index["weight_map"].update({name: other}))
    found = failed(sharded)
    assert found[FILES] == (f"{INDEX} is not what was written",)
    assert f"places tensor '{name}' in {other}" in found["names, shapes and dtypes"][0]
    assert states(sharded)["finite numbers"] == "skipped"


def test_hidden_weights_that_the_index_names(sharded):
    first = json.loads((sharded / INDEX).read_text())["weight_map"]["model.norm.weight"]
    shutil.copy(sharded / first, sharded / f".{first}")

    def redirect(index):
        for name, file in index["weight_map"].items():
            index["weight_map"][name] = f".{first}" if file == first else file

    edit(sharded / INDEX, redirect)
    digest = hashlib.sha256((sharded / INDEX).read_bytes()).hexdigest()
    edit(sharded / "merge_manifest.json", lambda made: made["files"].update({INDEX: digest}))
    assert failed(sharded)[FILES] == (f".{first} was added: the manifest does not name it",)


def test_a_shard_that_the_manifest_lost(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    edit(sharded / "merge_manifest.json", lambda made: made["files"].pop(shard.name))
    assert failed(sharded)[FILES] == (f"{shard.name} was added: the manifest does not name it",)


@pytest.mark.parametrize(
    "lose", [lambda made: made.update(files={}), lambda made: made.pop("files")]
)
def test_a_manifest_that_lost_all_checksums(sharded, lose):
    edit(sharded / "merge_manifest.json", lose)
    found = failed(sharded)[FILES]
    assert found[0] == "the manifest has lost the checksums of the files"
    assert "config.json was added: the manifest does not name it" in found


def test_an_older_manifest(merged, monkeypatch, tmp_path):
    def older(made):
        del made["files"], made["key"]
        for entry in made["tensors"].values():
            del entry["stored"]

    edit(merged / "merge_manifest.json", older)
    checks = {check.name: check for check in omnimerge.verify(merged)}
    assert [check.state for check in checks.values()] == ["skipped", *["ok"] * 5]
    assert "merge again to have them" in checks[FILES].details[0]
    change(merged, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].half()}))
    (line,) = failed(merged)["names, shapes and dtypes"]
    assert line.startswith("tensor 'model.norm.weight' is F16 [")
    shutil.rmtree(tmp_path / "qwen2_vl")
    checks = {check.name: check for check in omnimerge.verify(merged)}
    assert checks["names, shapes and dtypes"].state == "skipped"
    assert "has no shapes, it is of an older version" in checks[CHECKS[1]].details[0]


def test_a_manifest_that_was_edited_to_match_is_found_by_the_inputs(merged):
    """Names by the plan; what was copied, and what was kept, by the target."""

    def spoil(tensors):
        tensors["mine"] = torch.zeros(2)
        tensors["visual.patch_embed.proj.weight"][0] = 0

    change(merged, spoil)
    (merged / "config.json").write_text((merged / "config.json").read_text() + " ")

    def match(made):
        made["tensors"]["mine"] = {"stored": "F32 [2]", "kept": "so"}
        for name in ("model.safetensors", "config.json"):
            made["files"][name] = hashlib.sha256((merged / name).read_bytes()).hexdigest()

    edit(merged / "merge_manifest.json", match)
    assert failed(merged) == {
        "names, shapes and dtypes": ("tensor 'mine' is in the manifest and not in the recipe",),
        "unmerged tensors are the target's": (
            "tensor 'visual.patch_embed.proj.weight' is not the target's",
        ),
        "other files are the target's": ("config.json is not the target's",),
    }


@pytest.mark.parametrize("dtype", ["float16", "auto"])
def test_a_config_with_another_dtype_passes(checkpoints, tmp_path, dtype):
    recipe = {"method": "linear", "models": [str(checkpoints("qwen2"))] * 2, "dtype": dtype}
    omnimerge.merge(recipe, tmp_path / "out")
    assert set(states(tmp_path / "out", deep=True).values()) == {"ok"}


# --- places ----------------------------------------------------------------------------------


@pytest.fixture
def no_hub(monkeypatch):
    def refuse(reference):
        raise AssertionError(f"the Hub was asked for {reference}")

    module = sys.modules["omnimerge.checkpoint.locate"]  # the package has a function of that name
    monkeypatch.setattr(module, "download", refuse)


def test_from_another_folder_nobody_asks_the_hub(checkpoints, tmp_path, monkeypatch, no_hub):
    for name in ("qwen2_vl", "llava_onevision"):
        shutil.copytree(checkpoints(name), tmp_path / "in" / name)
    recipe = {"method": "adamms", "target": "in/qwen2_vl", "models": ["in/llava_onevision"]}
    recipe["parameters"] = {"alpha": 0.3}
    monkeypatch.chdir(tmp_path)
    omnimerge.merge(recipe, "out")
    assert str(tmp_path) not in (tmp_path / "out" / "merge_manifest.json").read_text()
    assert set(states("out", deep=True).values()) == {"ok"}

    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    checks = {check.name: check for check in omnimerge.verify(tmp_path / "out", deep=True)}
    assert [check.state for check in checks.values()] == [*["ok"] * 4, *["skipped"] * 3]
    for check in list(checks.values())[4:]:
        assert check.details[0].startswith("'in/qwen2_vl' is not here; run it in the folder where")
    done = CliRunner().invoke(main, ["verify", str(tmp_path / "out")])
    assert done.exit_code == 0
    last = done.output.splitlines()[-1]
    assert last == "nothing wrong in what was looked at; 2 of 6 checks skipped"
    change(tmp_path / "out", lambda tensors: tensors.pop("model.norm.weight"))
    done = CliRunner().invoke(main, ["verify", str(tmp_path / "out")])
    assert done.exit_code == 1 and "tensor 'model.norm.weight' is missing" in done.output
    assert done.output.splitlines()[-1] == "3 of 6 checks failed, 2 of 6 checks skipped"


@pytest.mark.parametrize("reference", ["owner/name", "owner/name@main", "owner/name@v1"])
def test_what_moves_on_the_hub_is_not_asked_for(sharded, no_hub, reference):
    edit(sharded / "merge_manifest.json", lambda made: made["recipe"].update(target=reference))
    assert list(states(sharded).values()) == [*["ok"] * 4, *["skipped"] * 2]


# --- outputs as inputs -----------------------------------------------------------------------


def test_a_merge_of_a_merge(merged, tmp_path):
    (merged / "README.md").write_text("the target's")
    (merged / "README.target.md").write_text("the target's target's")
    recipe = {
        "method": "adamms",
        "target": str(merged),
        "models": [str(tmp_path / "llava_onevision")],
        "parameters": {"alpha": 0.3},
    }
    omnimerge.merge(recipe, tmp_path / "again")
    assert set(states(tmp_path / "again", deep=True).values()) == {"ok"}
    assert (tmp_path / "again" / "README.target.md").read_text() == "the target's"
    (merged / "README.md").unlink()
    omnimerge.merge(recipe, tmp_path / "third")
    assert set(states(tmp_path / "third", deep=True).values()) == {"ok"}
    assert (tmp_path / "third" / "README.target.md").read_text() == "the target's target's"

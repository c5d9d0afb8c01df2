"""8-bit storage: read as numbers, written where a recipe asks for it, scaled forms refused."""

import json
import shutil
import warnings

import pytest
import tiny_models
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import omnimerge
from omnimerge.checkpoint import Checkpoint
from omnimerge.cli import main
from omnimerge.errors import NonFiniteError, NotMergeableError, RecipeError

TYPES = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def folders(checkpoints, tmp_path):
    """A base and two experts of this test's own."""
    found = []
    for name in ("base", "e0", "e1"):
        shutil.copytree(checkpoints("qwen2_vl", own=name), tmp_path / name)
        found.append(tmp_path / name)
    return found


def edit(folder, do):
    tensors = load_file(folder / "model.safetensors")
    do(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def stored_as(dtype):
    def change(tensors):
        for name, tensor in tensors.items():
            tensors[name] = tensor.to(dtype) if tensor.ndim > 1 else tensor

    return change


def linear(folders, **more):
    base, *models = map(str, folders)
    return {"method": "linear", "target": base, "models": models, "select": "all", **more}


@pytest.mark.parametrize("dtype", TYPES.values(), ids=str)
def test_inputs_in_8_bits_are_read_as_numbers(folders, tmp_path, dtype):
    one, two = (edit(folder, stored_as(dtype)) for folder in folders[1:])
    omnimerge.merge(linear(folders, dtype="float32"), tmp_path / "out")
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert one[UP].dtype == dtype and out[UP].dtype == torch.float32
    for name, tensor in out.items():
        assert torch.equal(tensor, 0.5 * (one[name].float() + two[name].float())), name


@pytest.mark.parametrize("name", TYPES)
def test_matrices_are_written_in_8_bits(folders, tmp_path, name):
    omnimerge.merge(linear(folders, dtype="float32"), tmp_path / "exact")
    omnimerge.merge(linear(folders, dtype=name), tmp_path / "out")
    exact = load_file(tmp_path / "exact" / "model.safetensors")
    written = load_file(tmp_path / "out" / "model.safetensors")
    for key, tensor in exact.items():
        expected = tensor.to(TYPES[name]) if tensor.ndim > 1 else tensor
        assert written[key].dtype == expected.dtype
        assert torch.equal(written[key].float(), expected.float()), key
    assert {c.state for c in omnimerge.verify(tmp_path / "out", deep=True)} == {"ok"}


def test_a_model_computes_in_the_dtype_of_its_config(folders, tmp_path):
    omnimerge.merge(linear(folders, dtype="float8_e4m3fn"), tmp_path / "out")
    before = json.loads((folders[0] / "config.json").read_text())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == before
    written = load_file(tmp_path / "out" / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = tiny_models.load("qwen2_vl", tmp_path / "out")
    loaded = next(
        p for n, p in model.named_parameters() if n.endswith("layers.0.mlp.up_proj.weight")
    )
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded.data, written[UP].float())


def test_8_bit_targets_keep_their_types(folders, tmp_path):
    for folder in folders:
        edit(folder, stored_as(torch.float8_e4m3fn))
    omnimerge.merge(linear(folders), tmp_path / "out")
    before, after = (Checkpoint.open(f).tensors for f in (folders[0], tmp_path / "out"))
    assert {n: m.dtype for n, m in before.items()} == {n: m.dtype for n, m in after.items()}
    assert {m.dtype for m in after.values()} == {"F8_E4M3", "F32"}


@pytest.mark.parametrize(
    ("dtype", "most", "beyond"),
    [("float8_e4m3fn", 464.0, 464.1), ("float8_e5m2", 61439.0, 61441.0)],
)
def test_what_8_bits_do_not_hold_is_refused(folders, tmp_path, dtype, most, beyond):
    for value in (most, -most, beyond, -beyond):
        for folder in folders[1:]:
            edit(folder, lambda t, value=value: t[UP][3, 1].fill_(value))
        recipe, out = linear(folders, dtype=dtype), tmp_path / f"out{value}"
        if abs(value) == most:
            omnimerge.merge(recipe, out, force=["ancestor"])
            kept = float(load_file(out / "model.safetensors")[UP][3, 1])
            assert kept == (value / most) * torch.finfo(TYPES[dtype]).max
        else:
            with pytest.raises(NonFiniteError, match=f"up_proj.weight' overflows {dtype}; set"):
                omnimerge.merge(recipe, out, force=["ancestor"])


@pytest.mark.parametrize("scaled", [0, 1])
def test_block_scaled_weights_are_refused_in_one_line(folders, tmp_path, scaled):
    def scale(tensors):
        tensors[UP] = tensors[UP].to(torch.float8_e4m3fn)
        tensors[f"{UP}_scale_inv"] = torch.ones(1, 1)

    edit(folders[scaled], scale)
    role = "target" if scaled == 0 else "donor"
    words = f"the {role}'s weights are quantised (tensor '{UP}_scale_inv'); merge the original"
    with pytest.raises(NotMergeableError) as error:
        omnimerge.merge(linear(folders), tmp_path / "out")
    assert words in str(error.value)
    (tmp_path / "recipe.yaml").write_text(json.dumps(linear(folders)))
    said = CliRunner().invoke(
        main, ["merge", str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "out")]
    )
    assert said.exit_code == 1 and words in said.output and said.output.count("\n") == 1


def test_a_composed_model_is_not_stored_in_8_bits(folders, tmp_path):
    from omnimerge.compose import compose

    base, *models = map(str, folders)
    recipe = {"method": "linear", "target": base, "models": models, "dtype": "float8_e4m3fn"}
    with pytest.raises(RecipeError, match="dtype: a composed model computes in its dtype"):
        compose(recipe, tmp_path / "out")

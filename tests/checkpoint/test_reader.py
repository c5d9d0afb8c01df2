"""Opening and reading checkpoints, whole and broken."""

import contextlib
import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from omnimerge.checkpoint import Checkpoint
from omnimerge.checkpoint.headers import read_safetensors_header
from omnimerge.errors import CheckpointError

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "c": torch.tensor(7, dtype=torch.int64),
    "empty": torch.zeros(0, 3, dtype=torch.float16),
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    return tmp_path


def shard(folder, *, suffix="safetensors"):
    """Two shards with an index, as `save_pretrained` writes them."""
    names = {"a": 1, "b": 2, "c": 2, "empty": 1}
    files = {n: f"model-0000{n}-of-00002.{suffix}" for n in (1, 2)}
    for number, file in files.items():
        part = {name: TENSORS[name] for name, n in names.items() if n == number}
        if suffix == "bin":
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file)
    prefix = "model.safetensors" if suffix == "safetensors" else "pytorch_model.bin"
    weight_map = {name: files[n] for name, n in names.items()}
    (folder / f"{prefix}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def assert_reads_back(checkpoint):
    assert set(checkpoint.tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(checkpoint.read_tensor(name), tensor)
        assert checkpoint.read_tensor(name).dtype == tensor.dtype
    assert checkpoint.read("a", 2, 5).tolist() == [2.0, 3.0, 4.0]


def test_single_safetensors(folder):
    save_file(TENSORS, folder / "model.safetensors")
    assert_reads_back(Checkpoint.open(folder))


def test_sharded_safetensors(folder):
    shard(folder)
    assert_reads_back(Checkpoint.open(folder))


def test_single_pickle(folder):
    torch.save(TENSORS, folder / "pytorch_model.bin")
    assert_reads_back(Checkpoint.open(folder))


def test_sharded_pickle(folder):
    shard(folder, suffix="bin")
    assert_reads_back(Checkpoint.open(folder))


def test_pickle_with_shared_and_offset_storage(folder):
    big = torch.arange(10.0)
    torch.save({"head": big[:4], "tail": big[4:], "again": big}, folder / "pytorch_model.bin")
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.read("tail").tolist() == [4, 5, 6, 7, 8, 9]
    assert checkpoint.read("head").tolist() == [0, 1, 2, 3]
    assert torch.equal(checkpoint.read("again"), big)


def test_pickle_with_code_is_refused(folder):
    class Evil:
        def __reduce__(self):
            return (print, ("code ran",))

    torch.save({"a": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot be read as torch weights"):
        Checkpoint.open(folder)


def test_big_endian_pickles_are_refused(folder):
    import zipfile

    torch.save({"a": TENSORS["a"]}, folder / "little.bin")
    with (
        zipfile.ZipFile(folder / "little.bin") as little,
        zipfile.ZipFile(folder / "pytorch_model.bin", "w") as big,
    ):
        for info in little.infolist():
            big.writestr(info.filename, little.read(info).replace(b"little", b"big"))
    with pytest.raises(CheckpointError, match="big-endian"):
        Checkpoint.open(folder)


def test_views_in_pickles_are_refused(folder):
    torch.save({"a": TENSORS["a"].T}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="'a' is a view; load and save"):
        Checkpoint.open(folder)


def test_the_file_that_transformers_loads_is_read(folder):
    shard(folder)
    save_file({"new": torch.ones(2)}, folder / "model.safetensors")
    assert list(Checkpoint.open(folder).tensors) == ["new"]


@pytest.mark.parametrize("name", ["models/foo--bar", "models/foo.", "a/" + "b" * 120, "~nouser/x"])
def test_names_that_no_folder_and_no_hub_has(name):
    with pytest.raises(CheckpointError, match=r"is no local folder|there is no folder|cannot use"):
        Checkpoint.open(name)


def test_a_path_that_is_too_long():
    with pytest.raises(CheckpointError, match="cannot use"):
        Checkpoint.open("/" + "x" * 5000)


def test_reading_is_safe_from_many_threads(folder):
    from concurrent.futures import ThreadPoolExecutor

    big = torch.arange(100_000, dtype=torch.float32)
    save_file({"big": big}, folder / "model.safetensors")
    checkpoint = Checkpoint.open(folder)
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda i: checkpoint.read("big", i, i + 100), range(0, 100_000, 100)))
    assert torch.equal(torch.cat(parts), big)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "is not valid JSON"),
        (lambda f: (f / "model-00001-of-00002.safetensors").unlink(), "which is missing"),
        (lambda f: _truncate(f / "model-00001-of-00002.safetensors", -4), "is truncated"),
        (lambda f: _truncate(f / "model-00001-of-00002.safetensors", 5), "is truncated"),
        (
            lambda f: _index(f, {"ghost": "model-00001-of-00002.safetensors"}),
            "places tensor 'ghost'",
        ),
        (lambda f: _index(f, {"x": "../model.safetensors"}), "points outside its folder"),
        (lambda f: _index(f, {}), "has no weight_map"),
        (lambda f: _index(f, {"x": ["a"]}), "points outside its folder"),
        (lambda f: (f / "model.safetensors.index.json").unlink(), "and no model.safetensors.index"),
    ],
    ids=range(10),
)
def test_damage_is_named(folder, damage, message):
    shard(folder)
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(folder)


def test_missing_folder_suggests_the_nearest(folder):
    (folder / "qwen2-vl").mkdir()
    with pytest.raises(CheckpointError, match="did you mean 'qwen2-vl'"):
        Checkpoint.open(folder / "qwen2-vI")


def test_a_tensor_in_two_shards_is_refused(folder):
    save_file(TENSORS, folder / "one.safetensors")
    save_file({"a": TENSORS["a"]}, folder / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "one.safetensors", "x": "two.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is both in"):
        Checkpoint.open(folder)


def test_a_file_that_shrinks_while_it_is_read(folder):
    save_file(TENSORS, folder / "model.safetensors")
    checkpoint = Checkpoint.open(folder)
    meta = checkpoint.meta("a")
    _truncate(folder / "model.safetensors", meta.offset + 8)
    with pytest.raises(CheckpointError, match=r"ended while tensor 'a' was read"):
        checkpoint.read("a")


def _header_file(path, header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (b'{"a": {"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a": 1}', bytes(4)),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, bytes(4)),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, bytes(4)),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, bytes(8)),
        ({"a": {"dtype": "F32", "shape": [10**30], "data_offsets": [0, 4 * 10**30]}}, bytes(4)),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, bytes(4)),
        ({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
        ({"a": 5}, b""),
        (b"[1]", b""),
        (b"\xff\xfe", b""),
        (b"[" * 100_000, b""),
    ],
    ids=range(11),
)
def test_hostile_headers_are_refused(tmp_path, header, data):
    file = _header_file(tmp_path / "x.safetensors", header, data)
    with pytest.raises(CheckpointError, match=r"corrupt|truncated"):
        read_safetensors_header(file)


@settings(max_examples=200, deadline=None)
@given(raw=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(raw, tmp_path_factory):
    file = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    file.write_bytes(raw)
    with contextlib.suppress(CheckpointError):
        read_safetensors_header(file)


def _truncate(file, size):
    with file.open("r+b") as stream:
        stream.truncate(size if size >= 0 else file.stat().st_size + size)


def _index(folder, extra):
    file = folder / "model.safetensors.index.json"
    weight_map = json.loads(file.read_text())["weight_map"] if extra else {}
    file.write_text(json.dumps({"weight_map": {**weight_map, **extra}}))

"""Attacks by name: each is a file that somebody could send, and what becomes of it."""

import io
import json
import os
import subprocess
import sys
import time
import tracemalloc
import zipfile
from pathlib import Path

import hostile
import pytest
import torch
import yaml
from safetensors.torch import save_file

import omnimerge
from omnimerge.arch.hf_tables import language_model_names
from omnimerge.arch.layout import slot_map
from omnimerge.arch.summary import summarize
from omnimerge.arch.vocabulary import token_ids
from omnimerge.checkpoint import Adapter, Checkpoint
from omnimerge.checkpoint.headers import read_safetensors_header
from omnimerge.checkpoint.pickle import read_pickle_header
from omnimerge.engine.loading import load_recipe
from omnimerge.engine.mergekit import convert_file
from omnimerge.engine.verify import verify
from omnimerge.errors import (
    CheckpointError,
    ConversionError,
    LayoutError,
    OutputError,
    RecipeError,
)

SUPPORT = Path(hostile.__file__).parent
FINE = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}


def header(tmp_path, content, body=b"\x00" * 8, length=None):
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(hostile.with_header(raw, body, length))
    return file


def entry(**changes):
    return {"a": {**FINE, **changes}}


# --- safetensors ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": FINE, "b": {**FINE, "data_offsets": [2, 6]}}, "overlap or gap"),
        ({"a": FINE, "b": FINE}, "overlap or gap"),
        ({"a": FINE, "b": {**FINE, "data_offsets": [5, 9]}}, "overlap or gap"),
        (entry(data_offsets=[4, 8]), "overlap or gap"),
        (entry(data_offsets=[4, 0]), "does not take -4 bytes"),
        (entry(data_offsets=[-4, 0]), "corrupt safetensors header at tensor 'a'"),
        (entry(shape=[2**60], data_offsets=[0, 2**60]), "is truncated"),
        (entry(shape=[2**64], data_offsets=[0, 2**64]), "corrupt safetensors header at"),
        (entry(shape=[-4]), "corrupt safetensors header at"),
        (entry(shape=[True, 4]), "corrupt safetensors header at"),
        (entry(shape=[0, 2**63], data_offsets=[0, 0]), "corrupt safetensors header at"),
        (entry(shape=[1] * 65, data_offsets=[0, 1]), "corrupt safetensors header at"),
        (entry(shape=[float("nan")]), "corrupt safetensors header at"),
        (entry(shape=[float("inf")]), "corrupt safetensors header at"),
        (entry(shape=4), "corrupt safetensors header at"),
        (entry(shape=[2, 4]), "does not take 4 bytes"),
        (entry(dtype="F64"), "does not take 4 bytes"),
        (entry(dtype=["F64"]), "corrupt safetensors header at"),
        (entry(dtype="F4", data_offsets=[0, 99]), "is truncated"),
        ({"a": 1}, "corrupt safetensors header at"),
        ([1], "not a JSON object"),
        (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{}}', "'a' appears twice"),
        (b'{"a":' * 100_000, "corrupt safetensors header"),
        (b"[" * 100_000, "corrupt safetensors header"),
        (b'{"\xff":1}', "corrupt safetensors header"),
        (b"\xef\xbb\xbf{}", "corrupt safetensors header"),
        ("{}".encode("utf-16"), "corrupt safetensors header"),
        (b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b"]}}", "corrupt safetensors header"),
        (b"", "corrupt safetensors header"),
    ],
)
def test_headers(tmp_path, content, message):
    with pytest.raises(CheckpointError, match=message):
        read_safetensors_header(header(tmp_path, content))


@pytest.mark.parametrize("length", [2**64 - 1, 2**60, 10**8 + 1, 1000, 9])
def test_a_header_that_claims_more_than_there_is(tmp_path, length):
    file = header(tmp_path, b"", b"", length)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="is truncated or no safetensors file"):
        read_safetensors_header(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_many_names_and_one_twice(tmp_path):
    """Looking for the name that is there twice takes no longer than reading."""
    names = [f'"{i}":0' for i in range(200_000)]
    raw = "{" + ",".join([*names, names[-1]]) + "}"
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match="'199999' appears twice"):
        read_safetensors_header(header(tmp_path, raw.encode()))
    assert time.perf_counter() - start < 10


def test_a_config_of_half_a_gigabyte(tmp_path):
    """As a sparse file: it takes no space, and would take the memory."""
    with (tmp_path / "config.json").open("wb") as stream:
        stream.truncate(10 << 30)
    done = limited(
        "from omnimerge.checkpoint.small_file import read_json; from pathlib import Path",
        f"read_json(Path({str(tmp_path / 'config.json')!r}))",
    )
    assert "CheckpointError" in done and "has more than 500,000,000 bytes" in done


def limited(setup, call, memory=6 << 30):
    """What a call raises in a process that may not have more than some memory."""
    code = f"""
import resource
{setup}
resource.setrlimit(resource.RLIMIT_AS, ({memory}, {memory}))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    {call}
    print("no error")
except Exception as error:
    print(type(error).__name__, error)
print("grew", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, "PYTHONPATH": f"{Path(omnimerge.__path__[0]).parent}:{SUPPORT}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- paths ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["../model-0.safetensors", "/etc/passwd", "sub/model-0.safetensors", "..", "", ".", "a\x00b",
     "x" * 300, "\ud800", "model-0.safetensors/", "~/x"],
)  # fmt: skip
def test_an_index_stays_in_its_folder(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for place in (folder, tmp_path):
        save_file({"a": torch.ones(2)}, place / "model-0.safetensors")
    index = {"weight_map": {"a": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    hostile.check_message(caught.value)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "notes.txt"])
def test_links_that_leave_the_folder(tmp_path, file):
    secret = tmp_path / "secret"
    secret.mkdir()
    hostile.write_model(secret)
    (secret / "notes.txt").write_text("a key")
    folder = hostile.write_model(tmp_path / "model")
    (folder / file).unlink(missing_ok=True)
    (folder / file).symlink_to(secret / file)
    with pytest.raises(CheckpointError, match="is a link that leaves its folder"):
        Checkpoint.open(folder).other_files()


def test_links_that_stay(tmp_path):
    """In the folder itself, and in the Hub's cache, whose snapshots are links to blobs."""
    folder = hostile.write_model(tmp_path / "plain")
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    cache = tmp_path / "models--me--model"
    snapshot, blobs = cache / "snapshots" / "0a1b", cache / "blobs"
    snapshot.mkdir(parents=True)
    hostile.write_model(blobs)
    (blobs / "tokenizer.json").write_text("{}")
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    (tmp_path / "link").symlink_to(snapshot)
    for place in (folder, snapshot, tmp_path / "link"):
        with Checkpoint.open(place) as checkpoint:
            assert checkpoint.read("model.norm.weight").numel() == 8
            assert checkpoint.other_files()
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(folder / "config.json")
    with pytest.raises(CheckpointError, match="leaves its folder"):
        Checkpoint.open(snapshot)


def test_pipes_and_devices_are_not_waited_for(tmp_path):
    folder = hostile.write_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with hostile.deadline(10), pytest.raises(CheckpointError):
        Checkpoint.open(folder)


def test_a_manifest_names_files_of_its_folder(tmp_path):
    folder = hostile.write_model(tmp_path / "out")
    (tmp_path / "secret").write_text("x")
    for name in ("../secret", str(tmp_path / "secret"), "x" * 300, "a\x00b"):
        manifest = {**hostile.MANIFEST, "files": {name: "00"}}
        (folder / "merge_manifest.json").write_text(json.dumps(manifest))
        with hostile.watched(tmp_path / "out"):
            first = verify(folder)[0]
        assert first.state == "failed"


# --- pickles -------------------------------------------------------------------------------


def pickled(tmp_path, raw, *, compression=0, comment=b"", extra=()):
    """A torch file with another pickle in it."""
    stream = io.BytesIO()
    torch.save({"a": torch.ones(3)}, stream)
    file = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(stream) as old, zipfile.ZipFile(file, "w", compression) as new:
        for info in old.infolist():
            data = old.read(info)
            new.writestr(info.filename, raw if raw and info.filename.endswith("data.pkl") else data)
        for name, data in extra:
            new.writestr(name, data)
        new.comment = comment
    return file


def refused(file, why):
    with pytest.raises(CheckpointError, match=why) as caught:
        read_pickle_header(file)
    hostile.check_message(caught.value)


@pytest.mark.parametrize(
    "call",
    [
        b"cos\nsystem\n",
        b"cposix\nsystem\n",
        b"cbuiltins\neval\n",
        b"cbuiltins\nexec\n",
        b"csubprocess\nPopen\n",
        b"ctorch.hub\nload\n",
        b"ctorch\nload\n",
        b"ctorch.jit\nload\n",
        b"cnumpy\nload\n",
        b"cbuiltins\nbytearray\n",
        b"\x8c\x02os\x8c\x06system\x93",
    ],
)
def test_pickles_with_code(tmp_path, call):
    marker = tmp_path / "ran"
    text = f"touch {marker}".encode()
    raw = b"\x80\x02}(X\x01\x00\x00\x00a" + call + b"X" + len(text).to_bytes(4, "little") + text
    with hostile.watched(tmp_path):
        refused(pickled(tmp_path, raw + b"\x85Ru."), "cannot be read as torch weights")
    assert not marker.exists()


def test_a_pickle_that_claims_memory(tmp_path):
    size = b"\x8a\x06" + (2**33).to_bytes(6, "little")
    raw = b"\x80\x02}(X\x01\x00\x00\x00acbuiltins\nbytearray\n" + size + b"\x85Ru."
    file = pickled(tmp_path, raw)
    done = limited(
        "from omnimerge.checkpoint.pickle import read_pickle_header; from pathlib import Path",
        f"read_pickle_header(Path({str(file)!r}))",
        memory=64 << 30,
    )
    assert "CheckpointError" in done and "it calls builtins.bytearray" in done
    assert int(done.split("grew")[1]) < 200


def test_a_pickle_that_ends_the_process(tmp_path):
    """A key of nested tuples is hashed to its depth, in C, without a look at the stack."""
    raw = b"\x80\x02}()" + b"\x85" * 300_000 + b"K\x01u."
    done = limited(
        "from omnimerge.checkpoint.pickle import read_pickle_header; from pathlib import Path",
        f"read_pickle_header(Path({str(pickled(tmp_path, raw))!r}))",
    )
    assert "CheckpointError" in done and "it nests too deeply" in done


def test_what_else_a_bin_may_hold(tmp_path):
    bomb = b"\x80\x02}" + b"0" * 1000
    refused(pickled(tmp_path, bomb, compression=8), "it is compressed")
    refused(pickled(tmp_path, None, compression=8), "it is compressed")
    refused(pickled(tmp_path, None, comment=b"x" * 30), "it has a comment")
    refused(pickled(tmp_path, b"\x80\x02]."), "does not hold a mapping")
    refused(pickled(tmp_path, b"\x80\x02}(K\x01K\x02u."), "entry of type int is no named tensor")
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(zipfile_of(constants=True))
    refused(file, "cannot be read as torch weights")
    for state, why in (
        ({"a": torch.eye(3).to_sparse()}, "_rebuild_sparse_tensor"),
        ({"a": torch.ones(3, device="meta")}, "_rebuild_meta_tensor_no_storage"),
        ({"a": torch.ones(3), "n": {1, 2}}, "cannot be read|no named tensor"),
    ):
        torch.save(state, file)
        refused(file, why)
    torch.save({"a": torch.ones(3)}, file, _use_new_zipfile_serialization=False)
    refused(file, "older than torch 1.6")


def zipfile_of(*, constants):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}.")
        if constants:  # TorchScript, which is code
            archive.writestr("a/constants.pkl", b"\x80\x02).")
        archive.writestr("a/version", b"3\n")
    return stream.getvalue()


def test_what_torch_saves_is_read(tmp_path):
    state = {
        "parameter": torch.nn.Parameter(torch.ones(2)),
        **{str(d): torch.zeros(3).to(d) for d in (torch.float8_e4m3fn, torch.bfloat16)},
        **{str(d): torch.ones(3, dtype=d) for d in (torch.uint16, torch.int64, torch.bool)},
        "empty": torch.zeros(0, 2),
    }
    torch.save(torch.nn.Linear(2, 2).state_dict() | state, tmp_path / "pytorch_model.bin")
    found = {meta.name: meta.dtype for meta in read_pickle_header(tmp_path / "pytorch_model.bin")}
    assert found == {
        "weight": "F32", "bias": "F32", "parameter": "F32", "empty": "F32", "torch.bool": "BOOL",
        "torch.float8_e4m3fn": "F8_E4M3", "torch.bfloat16": "BF16", "torch.uint16": "U16",
        "torch.int64": "I64",
    }  # fmt: skip


# --- YAML ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"method: !!python/object/apply:os.system ['touch ran']", "could not determine a constr"),
        (b"method: !!python/name:os.system", "could not determine a constructor"),
        (b"!!python/module:os {}", "could not determine a constructor"),
        (hostile.BOMB, "more than 100,000 values where aliases are written out"),
        (b"a: &a [*a]", "an alias of what it is in"),
        (b"&a {a: *a}", "an alias of what it is in"),
        (b"[" * 100_000, "nests too deeply"),
        (b"- " * 100_000, "recursion"),
        (b"seed: " + b"1:" * 500 + b"1.5", "a number that is too long"),
        (b"seed: 0x" + b"f" * 6000, "a number that is too long"),
        (b"seed: " + b"9" * 6000, "a number that is too long"),
        (b'method: "\\ud800"', "half a character"),
        (b"a: 1\na: 2", "given twice"),
        (b"<<: {a: 1}", "."),
        (b"#" + b"x" * 300_000, "more than 200,000 bytes"),
        (b"method: \x1b[2J", "special characters are not allowed"),
        (b"a: 2001-99-99", "month must be in 1..12"),
        (b"", "it holds no keys"),
    ],
)
def test_recipes(tmp_path, text, message):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(text)
    with (
        hostile.watched(tmp_path),
        hostile.deadline(10),
        pytest.raises(RecipeError, match=message) as caught,
    ):
        load_recipe(file)
    hostile.check_message(caught.value)
    assert len(str(caught.value)) < 3000


@pytest.mark.parametrize(
    "match",
    [{"name": "(" * 5000 + ")" * 5000}, {"slot": "a{99999999999999999999}"}, {"name": "["}],
)
def test_patterns_of_a_recipe(match):
    recipe = {
        "method": "linear",
        "models": ["a", "b"],
        "overrides": [{"match": match, "keep": "target"}],
    }
    with pytest.raises(RecipeError, match="is no regular expression"):
        load_recipe(recipe)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_none(number):
    recipe = {"method": "linear", "models": [{"model": "a", "weight": number}, "b"]}
    with pytest.raises(RecipeError, match="finite"):
        load_recipe(recipe)


def test_the_layers_that_a_configuration_claims(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = {
        "merge_method": "slerp",
        "base_model": "m",
        "slices": [
            {
                "sources": [{"model": m, "layer_range": [0, 10**9]} for m in ("m", "n")],
                "parameters": {"t": [0, 1]},
            }
        ],
    }
    file = tmp_path / "mergekit.yaml"
    for layers in (10**9, [1]):
        for source in config["slices"][0]["sources"]:
            source["layer_range"] = [0, layers]
        file.write_text(yaml.safe_dump(config))
        with hostile.deadline(10), pytest.raises(ConversionError, match="layer_range"):
            convert_file(file)
    model = {"model": {"model": {"path": ["x"]}}}
    file.write_text(
        yaml.safe_dump({"merge_method": "linear", "models": [model, {"model": "~no/x"}]})
    )
    with pytest.raises(ConversionError, match="give path"):
        convert_file(file)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps({"num_hidden_layers": 10**9}))
    linear = [{"model": m, "parameters": {"weight": [0, 1]}} for m in ("m", "~nobody/x")]
    file.write_text(yaml.safe_dump({"merge_method": "linear", "models": linear}))
    with hostile.deadline(10), pytest.raises(ConversionError, match="number of layers is needed"):
        convert_file(file)


# --- configs and names -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": [1]},
        {"tie_word_embeddings": {}},
        {"rope_theta": 10**400},
        {"rms_norm_eps": 10**400},
        {"num_attention_heads": "2"},
        {"head_dim": float("nan")},
        {"thinker_config": 3},
        {"text_config": []},
        {"hidden_act": {"a": 1}},
        {"model_type": ["qwen2"]},
        {"rope_scaling": {"rope_type": {}, "full_attention": 3}},
        {"architectures": {"a": 1}},
    ],
)
def test_configs_of_wrong_types(tmp_path, changes):
    folder = hostile.write_model(tmp_path / "m", {**hostile.CONFIG, **changes})
    try:
        summarize(Checkpoint.open(folder))
    except CheckpointError as error:
        hostile.check_message(error)


def test_a_config_that_claims_layers_is_not_built(tmp_path):
    config = {**hostile.CONFIG, "num_hidden_layers": 10**9}
    folder = hostile.write_model(tmp_path / "m", config)
    with hostile.deadline(60):
        assert language_model_names(folder, list(hostile.tensors())) is None


@pytest.mark.parametrize("number", ["99999999999", "9" * 5000, "999999999", "१"])
def test_layers_with_strange_numbers(number):
    names = [*hostile.tensors(), f"model.layers.{number}.mlp.up_proj.weight"]
    with hostile.deadline(10):
        try:
            slot_map(names, "x")
        except LayoutError as error:
            assert len(str(error)) < 20_000


def adapter(tmp_path, config, tensors=None):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    if tensors is None:
        (tmp_path / "adapter_model.safetensors").write_bytes(hostile.adapter_bytes())
    else:
        save_file(tensors, tmp_path / "adapter_model.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rank_pattern": [1]}, "rank_pattern is no mapping"),
        ({"rank_pattern": {"(": 2}}, "no pattern that can be used"),
        ({"rank_pattern": {"(?=x)": 2}}, "no pattern that can be used"),
        ({"lora_alpha": "x"}, "alpha of .* is 'x', which is no number"),
        ({"lora_alpha": None, "alpha_pattern": {}}, "is None, which is no number"),
        ({"lora_alpha": float("inf"), "alpha_pattern": {}}, "is inf, which is no number"),
        ({"lora_alpha": 10**400, "alpha_pattern": {}}, "which is no number"),
        ({"r": "2"}, "have rank 2, its config says 2"),
    ],
)
def test_adapter_configs(tmp_path, config, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        Adapter.open(adapter(tmp_path, config))
    hostile.check_message(caught.value)


@pytest.mark.parametrize("shape", [(), (2,), (0, 8)])
def test_factors_that_are_none(tmp_path, shape):
    tensors = {"x.q.lora_A.weight": torch.ones(shape), "x.q.lora_B.weight": torch.ones(8, 2)}
    with pytest.raises(CheckpointError, match="is no factor"):
        Adapter.open(adapter(tmp_path, {}, tensors))


def test_patterns_that_take_for_ever(tmp_path):
    """The same matches as PEFT's `re`, in a time that grows with the names alone."""
    name = "a" * 5000 + "!.q"
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 8), f"{name}.lora_B.weight": torch.ones(8, 2)}
    config = {"rank_pattern": {"(a+)+": 3, "(a|a)*b": 3, ".*.*.*.*.*x": 3}, "r": 2}
    with hostile.deadline(10):
        Adapter.open(adapter(tmp_path, config, tensors))
    fits = {"layers.0.self_attn.(q|k)_proj": 16, r"^model.*\.v_proj": 32}
    found = Adapter.open(adapter(tmp_path, {"alpha_pattern": fits, "lora_alpha": 2})).changes
    assert found["model.layers.0.self_attn.q_proj.weight"].scale == 8
    assert found["model.layers.1.self_attn.q_proj.weight"].scale == 1
    assert found["model.layers.1.self_attn.v_proj.weight"].scale == 16


# --- tokenizers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("tokenizer.model", b"\x80" * 1_000_000),
        ("tokenizer.model", b"\x0a" + b"\xff" * 9 + b"\x01"),
        ("tokenizer.model", b"\x0a\x03\x0a\x7fa"),
        ("tokenizer.json", b'{"model": {"vocab": [1]}}'),
        ("tokenizer.json", b'{"model": {"vocab": {"a": NaN}}}'),
        ("tokenizer.json", b'{"model": {"vocab": {"a": Infinity}}}'),
        ("vocab.json", b'{"a": {}}'),
        ("vocab.json", b"[" * 100_000),
    ],
)
def test_tokenizers(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with hostile.deadline(10), pytest.raises(CheckpointError) as caught:
        token_ids(tmp_path)
    hostile.check_message(caught.value)


# --- manifests -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"tensors": 3},
        {"recipe": []},
        {"files": "x"},
        {"inputs": [1]},
        {"forced": [1]},
        {"forced": 2},
    ],
)
def test_manifests(tmp_path, changes):
    folder = hostile.write_model(tmp_path / "out")
    manifest = {**hostile.MANIFEST, **changes}
    (folder / "merge_manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(OutputError, match="is no merged checkpoint"):
        verify(folder)

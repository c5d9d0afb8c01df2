"""Checkpoints at URLs: read by ranges, merged to the bytes of folders, never taken for a whole."""

import json
import os
import threading

import fsspec
import pytest
import safetensors
import tiny_adapters
import tiny_models
import torch
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.torch import save_file

import omnimerge
from omnimerge.checkpoint import Adapter, Checkpoint, locate, remote
from omnimerge.engine.inputs import InputFiles
from omnimerge.engine.loading import load_recipe
from omnimerge.engine.planning import build_plan
from omnimerge.errors import CheckpointError, GenerationError, InputChangedError, OutputError
from omnimerge.generate.loading import load_model


class Counting(MemoryFileSystem):
    """A storage in memory that notes what is asked of it, and can give something else."""

    protocol = "counting"
    store = {}  # noqa: RUF012 (as its parent's)
    asked: list[tuple[str, int | None, int | None]] = []  # noqa: RUF012
    answer = None
    listed = False

    def find(self, path, **options):
        type(self).listed = True
        return super().find(path, **options)

    def invalidate_cache(self, path=None):
        type(self).listed = False

    def info(self, path, **options):
        """As S3: what is known from a listing lacks what a question about one file would tell."""
        found = super().info(path, **options)
        return found if self.listed else {**found, "VersionId": None}

    def cat_file(self, path, start=None, end=None, **options):
        type(self).asked.append((path.rpartition("/")[2], start, end))
        raw = super().cat_file(path, start=start, end=end, **options)
        return type(self).answer(raw) if type(self).answer else raw


fsspec.register_implementation("counting", Counting)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OMNIMERGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Counting, "asked", [])
    monkeypatch.setattr(Counting, "answer", None)
    monkeypatch.setattr(Counting, "store", {})


def put(folder, url):
    """Copy a folder to a URL in memory."""
    fs, root = fsspec.core.url_to_fs(url)
    for file in folder.rglob("*"):
        if file.is_file():
            fs.pipe_file(f"{root}/{file.relative_to(folder).as_posix()}", file.read_bytes())
    return url


def large(folder, elements=3_000_000):
    """A checkpoint of two tensors, 12 MB each."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    numbers = torch.arange(elements, dtype=torch.float32)
    save_file({"a": numbers, "b": -numbers}, folder / "model.safetensors")
    return folder


def files(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.name != "merge_manifest.json"}


@pytest.mark.parametrize("method", ["ties", "wudi", "task_arithmetic"])
def test_a_merge_from_urls_has_the_bytes_of_one_from_folders(checkpoints, tmp_path, method):
    base, one, two = (checkpoints("qwen2_vl", own=own, shard="60KB") for own in ("base", "1", "2"))
    put(base, "counting://bucket/base")
    plain = {"method": method, "base": str(base), "models": [str(one), str(two)]}
    distant = {
        "method": method,
        "base": "counting://bucket/base",
        "models": [one.as_uri(), f"{two.as_uri()}/"],
    }
    omnimerge.merge(plain, tmp_path / "plain", force=["ancestor"])
    omnimerge.merge(distant, tmp_path / "distant", force=["ancestor"])
    assert {**files(tmp_path / "distant"), "README.md": b""} == {
        **files(tmp_path / "plain"),
        "README.md": b"",
    }
    written = json.loads((tmp_path / "distant" / "merge_manifest.json").read_text())
    assert written["recipe"]["base"] == "counting://bucket/base"
    before = json.loads((tmp_path / "plain" / "merge_manifest.json").read_text())
    assert written["inputs"]["base"]["files"] == before["inputs"]["base"]["files"]
    checks = omnimerge.verify(tmp_path / "distant", deep=1.0)
    assert len(checks) > 5 and {check.state for check in checks} == {"ok"}


def test_what_is_shown_of_a_url_is_the_url(tmp_path):
    url = put(large(tmp_path / "m"), "counting://bucket/m")
    assert omnimerge.inspect(url)["path"] == url


def test_weights_are_read_by_ranges_and_each_block_once(tmp_path):
    url = put(large(tmp_path / "m"), "counting://bucket/m")
    with Checkpoint.open(url) as checkpoint:
        opened = [ask for ask in Counting.asked if ask[0] == "model.safetensors"]
        header = opened[1][2]
        assert opened == [("model.safetensors", 0, 8), ("model.safetensors", 8, header)]
        assert (checkpoint.folder / "model.safetensors").stat().st_size == header
        Counting.asked.clear()
        step = 1 << 18
        for name, sign in (("a", 1), ("b", -1)):
            for start in range(0, 3_000_000, step):
                stop = min(start + step, 3_000_000)
                expected = sign * torch.arange(start, stop, dtype=torch.float32)
                assert torch.equal(checkpoint.read(name, start, stop), expected)
    block = 8 << 20
    size = header + 24_000_000
    edges = [(at, min(at + block, size)) for at in range(0, size, block)]
    assert sorted((start, end) for _, start, end in Counting.asked) == edges


def test_threads_share_blocks(tmp_path):
    url = put(large(tmp_path / "m"), "counting://bucket/m")
    checkpoint = Checkpoint.open(url)
    Counting.asked.clear()
    wrong = []

    def read(number):
        for start in range(number * 1000, 3_000_000 - 1000, 40_000):
            if checkpoint.read("b", start, start + 1000).tolist()[-1] != -(start + 999):
                wrong.append(start)

    threads = [threading.Thread(target=read, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    checkpoint.close()
    assert not wrong
    assert len(Counting.asked) == len(set(Counting.asked)) == 2  # of three blocks, "b" is in two


def test_no_more_blocks_are_held_than_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_BLOCK_BYTES", 100_000)
    url = put(large(tmp_path / "m"), "counting://bucket/m")
    checkpoint = Checkpoint.open(url)
    for start in range(0, 2_900_000, 50_000):
        assert checkpoint.read("a", start, start + 50_000)[7] == start + 7
        assert len(checkpoint._remote._blocks) <= 8
    checkpoint.close()
    assert not checkpoint._remote._blocks
    assert checkpoint.read("a", 5, 6) == 5  # reading opens again


def test_what_stands_in_the_cache_is_no_checkpoint_to_others(checkpoints):
    folder = locate(checkpoints("qwen2_vl").as_uri())
    with pytest.raises(safetensors.SafetensorError):
        safetensors.safe_open(folder / "model.safetensors", "pt")
    with pytest.raises(GenerationError, match=r"file://.* can be merged .* not run; download it"):
        load_model(folder, device="cpu", dtype="auto", trust_remote_code=False)


def test_the_cache_holds_one_folder_for_each_state(checkpoints, tmp_path):
    url = put(checkpoints("qwen2_vl"), "counting://bucket/m")
    first = locate(url)
    Counting.asked.clear()
    assert locate(url) == locate(url + "/") == first
    assert Counting.asked == []
    fs, root = fsspec.core.url_to_fs(url)
    fs.pipe_file(f"{root}/config.json", fs.cat_file(f"{root}/config.json"))  # written again
    assert locate(url) != first
    assert sorted(each.name for each in first.iterdir()) == sorted(
        [*(each.name for each in checkpoints("qwen2_vl").iterdir()), remote.MARK]
    )
    assert not list((tmp_path / "cache").rglob("tmp*"))


def test_a_change_during_the_merge_is_seen(checkpoints, tmp_path):
    one, two = (put(checkpoints("qwen2_vl", own=own), f"counting://b/{own}") for own in "12")
    recipe = load_recipe({"method": "linear", "target": one, "models": [two]})
    plan = build_plan(recipe, force=["ancestor"])
    seen = InputFiles(plan)
    seen.check()
    fs, root = fsspec.core.url_to_fs(two)
    fs.pipe_file(f"{root}/model.safetensors", fs.cat_file(f"{root}/model.safetensors"))
    with pytest.raises(InputChangedError, match=r"^counting://b/2/model\.safetensors changed"):
        seen.check()


def test_a_change_between_header_and_opening_is_seen(checkpoints):
    one, two = (put(checkpoints("qwen2_vl", own=own), f"counting://b/{own}") for own in "12")
    locate(one)
    fs, root = fsspec.core.url_to_fs(two)
    whole = fs.cat_file(f"{root}/model.safetensors")

    def write_again(raw):
        if raw == whole[8 : 8 + len(raw)]:  # the header was just read
            fs.pipe_file(f"{root}/model.safetensors", whole)
        return raw

    Counting.answer = staticmethod(write_again)
    recipe = load_recipe({"method": "linear", "target": one, "models": [two]})
    plan = build_plan(recipe, force=["ancestor"])
    with pytest.raises(InputChangedError, match=r"model\.safetensors changed .*modified_ns"):
        InputFiles(plan).check()


def test_an_adapter_is_copied_whole(checkpoints, tmp_path):
    model = tiny_models.build("qwen2_vl")
    tiny_adapters.save(model, tmp_path / "adapter")
    url = put(tmp_path / "adapter", "counting://bucket/adapter")
    fs, root = fsspec.core.url_to_fs(url)
    fs.pipe_file(f"{root}/optimizer.safetensors", b"what training left")
    near, far = Adapter.open(tmp_path / "adapter"), Adapter.open(url)
    assert set(near.changes) == set(far.changes)
    assert all(
        torch.equal(near.store.read_tensor(n), far.store.read_tensor(n)) for n in near.store.tensors
    )
    assert "optimizer.safetensors" not in [name for name, _, _ in Counting.asked]


def test_a_server_that_gives_other_ranges_is_found_out(tmp_path):
    checkpoint = Checkpoint.open(put(large(tmp_path / "m"), "counting://bucket/m"))
    Counting.answer = staticmethod(lambda raw: raw + b"more")
    for _ in range(2):  # what failed is not kept
        with pytest.raises(CheckpointError, match=r"8,388,612 came; it changed, or its server"):
            checkpoint.read("a", 0, 10)
    Counting.answer = None
    assert checkpoint.read("a", 0, 10).tolist() == list(range(10))


def test_a_failing_client_is_one_line(tmp_path):
    checkpoint = Checkpoint.open(put(large(tmp_path / "m"), "counting://bucket/m"))

    def fail(raw):
        raise PermissionError("403 Forbidden\nmore of it")

    Counting.answer = staticmethod(fail)
    with pytest.raises(CheckpointError) as found:
        checkpoint.read("a", 0, 10)
    assert str(found.value) == (
        "cannot read counting://bucket/m/model.safetensors (PermissionError: 403 Forbidden); check "
        "the address, the credentials, and that the protocol's package is installed"
    )


def test_a_truncated_file_is_refused(tmp_path):
    folder = large(tmp_path / "m")
    os.truncate(folder / "model.safetensors", 20_000_000)
    with pytest.raises(CheckpointError, match=r"truncated: it has 20,000,000 bytes .* 24,000,"):
        Checkpoint.open(folder.as_uri())
    (folder / "model.safetensors").write_bytes((10**12).to_bytes(8, "little") + bytes(100))
    with pytest.raises(CheckpointError, match=r"claims a header of 1,000,000,000,000"):
        Checkpoint.open(folder.as_uri())


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://me:secret@host/model", "give the credentials as the storage's own settings"),
        ("https://host/model?token=secret", "would be written into manifests"),
        ("counting://bucket/nothing", "holds no config.json, or cannot be listed"),
        ("counting://bucket/pickled", r"holds no \*\.safetensors; other formats"),
        ("nonsense://bucket/m", r"read nonsense://bucket/m \(ValueError: Protocol not known"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused(url, message):
    fs, root = fsspec.core.url_to_fs("counting://bucket/pickled")
    fs.pipe_file(f"{root}/config.json", b"{}")
    fs.pipe_file(f"{root}/pytorch_model.bin", b"PK")
    with pytest.raises(CheckpointError, match=message) as found:
        Checkpoint.open(url)
    assert "secret" not in str(found.value)


def test_names_that_leave_the_folder_are_not_written(tmp_path):
    url = put(large(tmp_path / "m"), "counting://bucket/m")
    fs, root = fsspec.core.url_to_fs(url)
    listed = fs.find(root, detail=True)
    outside = {f"{root}/../../evil.json": {"size": 2}, f"{root}/.hidden.json": {"size": 2}}
    found = dict(remote._listing(type("F", (), {"find": lambda *_, **__: listed | outside}), root))
    assert sorted(found) == ["config.json", "model.safetensors"]


def test_a_mark_in_a_strangers_folder_means_nothing(checkpoints, tmp_path):
    folder = large(tmp_path / "m")
    mark = {"url": "counting://bucket/elsewhere", "files": {"model.safetensors": 24_000_200}}
    (folder / remote.MARK).write_text(json.dumps(mark))
    assert Checkpoint.open(folder).read("a", 3, 4) == 3
    assert Counting.asked == []


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    url = put(large(tmp_path / "m"), "counting://bucket/m")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OMNIMERGE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(CheckpointError, match="set OMNIMERGE_CACHE to a folder that can be writ"):
        locate(url)


def test_an_output_at_a_url_is_refused(checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, two = (str(checkpoints("qwen2_vl", own=own)) for own in "12")
    recipe = {"method": "linear", "target": one, "models": [two]}
    with pytest.raises(OutputError, match=r"cannot write to a URL \(s3://\.\.\.\); give a folder"):
        omnimerge.merge(recipe, "s3://bucket/merged", force=["ancestor"])
    assert list(tmp_path.iterdir()) == []

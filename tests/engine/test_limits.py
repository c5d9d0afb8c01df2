"""What a merge takes of its machine: open files, and memory as it was announced."""

import errno
import json
import os
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_merge import run

import omnimerge
from omnimerge.checkpoint import Checkpoint, OutputTensor, openfile
from omnimerge.checkpoint.dtypes import dtype_name
from omnimerge.checkpoint.openfile import OpenFile
from omnimerge.checkpoint.shard import ShardFile, safetensors_header
from omnimerge.engine import knowledge
from omnimerge.engine.local import Room

MERGE = """
import json, resource, sys
recipe, out, files = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3])
import omnimerge
import omnimerge.engine.execute  # what is imported later may need files of its own
resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
omnimerge.merge(recipe, out, force=["ancestor"])
"""


def python(code, *arguments):
    """Run Python code in a process of its own; return what it prints."""
    command = [sys.executable, "-c", code, *(str(each) for each in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_more_shards_than_files_that_may_be_open(method, checkpoints, tmp_path):
    base, *models = (
        str(checkpoints("qwen2", shard="1KB", own=own, num_hidden_layers=8))
        for own in ("base", "one", "two", "three")
    )
    recipe = {"method": method, "models": models, "max_shard_size": "1KB"}
    recipe |= {"target": base} if method == "linear" else {"base": base}
    out = tmp_path / "out"
    python(MERGE, json.dumps(recipe), out, 64)
    assert len(list(out.glob("*.safetensors"))) >= 60
    omnimerge.merge(recipe, tmp_path / "free", force=["ancestor"])
    for file in out.glob("model*"):
        assert file.read_bytes() == (tmp_path / "free" / file.name).read_bytes(), file.name


@pytest.fixture
def few(monkeypatch):
    """Three files may stay open."""
    monkeypatch.setattr(openfile, "_MOST", 3)


def open_descriptors(folder):
    links = [each for each in Path("/proc/self/fd").iterdir() if each.is_symlink()]
    return sorted(p.name for p in (each.readlink() for each in links) if p.parent == folder)


def test_the_file_that_was_used_longest_ago_is_closed(tmp_path, few):
    files = []
    for name in "abcde":
        (tmp_path / name).write_text(name)
        files.append(OpenFile(tmp_path / name))
    with files[0].used() as held:
        for each in files[1:]:
            with each.used() as descriptor:
                assert os.pread(descriptor, 9, 0).decode() == each._path.name
        assert open_descriptors(tmp_path) == ["a", "d", "e"]
        assert os.pread(held, 9, 0) == b"a"
        with files[3].used(), files[1].used():
            assert open_descriptors(tmp_path) == ["a", "b", "d"]
    for each in files:
        each.close()
        each.close()
    assert not open_descriptors(tmp_path)


def test_threads_read_while_files_are_closed_for_others(tmp_path, few):
    files = []
    for number in range(8):
        (tmp_path / str(number)).write_bytes(bytes([number]) * 100)
        files.append(OpenFile(tmp_path / str(number)))

    def read(seed):
        drawn = random.Random(seed)
        for _ in range(3000):
            number = drawn.randrange(8)
            with files[number].used() as descriptor:
                assert os.pread(descriptor, 1, drawn.randrange(100)) == bytes([number])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, range(4)))
    assert len(open_descriptors(tmp_path)) <= 3
    for each in files:
        each.close()


def test_what_the_disk_loses_before_a_file_is_closed_for_others_is_told(tmp_path, few, monkeypatch):
    """A sync through the descriptor that is opened afterwards would know nothing of it."""
    shard = ShardFile(tmp_path / "s", [OutputTensor("t", "U8", (8,))], begin_anew=True)
    shard.write(memoryview(bytes(8)), shard.places["t"])
    fsync, failed = os.fsync, []

    def once(descriptor):
        if not failed:
            failed.append(descriptor)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", once)
    others = [OpenFile(Path(__file__).with_name(n)) for n in ("test_ray.py", "test_execute.py")]
    others.append(OpenFile(Path(__file__)))
    for each in others:
        with each.used():
            pass
    assert failed and not open_descriptors(tmp_path)
    with pytest.raises(OSError, match="Input/output error"):
        shard.sync()
    for each in (*others, shard):
        each.close()


LARGE = 60_000_000  # elements of one tensor, in bfloat16
MEMORY = 40_000_000
SLACK = 10_000_000  # what the allocator keeps of what was let go, and the plan itself

# Not `ru_maxrss`: a process has that of the one that started it.
PEAK = """
import json, sys
from pathlib import Path
small, large, memory = json.loads(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
import omnimerge

def resident(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(what))

omnimerge.merge(small, sys.argv[4] + "-small", force=["ancestor"])  # all that is imported, compiled
Path("/proc/self/clear_refs").write_text("5")  # the peak of compiling does not count
before = resident("VmRSS:")
omnimerge.merge(large, sys.argv[4], force=["ancestor"], memory=memory)
print(resident("VmHWM:") - before)
"""


@pytest.fixture(scope="module")
def large(checkpoints, tmp_path_factory):
    """A base and two models, each with an embedding of 120 MB, and the small ones they are from."""
    small = [checkpoints("qwen2", own=own, tie_word_embeddings=True) for own in ("a", "b", "c")]
    root, folders = tmp_path_factory.mktemp("large"), []
    for number, source in enumerate(small):
        folder = root / str(number)
        folder.mkdir()
        tensors = load_file(source / "model.safetensors")
        config = json.loads((source / "config.json").read_text())
        vocabulary = LARGE // config["hidden_size"]
        config |= {"vocab_size": vocabulary}
        (folder / "config.json").write_text(json.dumps(config))
        del tensors["model.embed_tokens.weight"]
        outputs = [OutputTensor(n, dtype_name(t.dtype), tuple(t.shape)) for n, t in tensors.items()]
        embedding = (vocabulary, config["hidden_size"])
        outputs.append(OutputTensor("model.embed_tokens.weight", "BF16", embedding))
        random_ = torch.Generator().manual_seed(number)
        block = torch.randn(LARGE // 100, generator=random_).bfloat16().view(torch.uint8).numpy()
        with (folder / "model.safetensors").open("wb") as stream:
            stream.write(safetensors_header(outputs)[0])
            for tensor in tensors.values():
                stream.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
            for _ in range(100):
                stream.write(block.data)
        folders.append(folder)
    return small, folders


def recipe_for(method, folders, **more):
    base, *models = map(str, folders)
    return {"method": method, "models": models, "base": base, **more}


@pytest.fixture(scope="module")
def dora(large, tmp_path_factory):
    """A DoRA adapter on the embedding, of rank 8, for the small base and for the large one."""
    folders = []
    for base in (large[0][0], large[1][0]):
        folder = tmp_path_factory.mktemp("dora")
        tensor = Checkpoint.open(base).meta("model.embed_tokens.weight")
        rows, columns = tensor.shape
        key = "base_model.model.model.embed_tokens.lora_"
        random_ = torch.Generator().manual_seed(1)
        factors = {
            f"{key}embedding_A": torch.randn(8, rows, generator=random_).bfloat16() / 100,
            f"{key}embedding_B": torch.randn(columns, 8, generator=random_) / 100,
            f"{key}magnitude_vector": torch.rand(columns, generator=random_) + 0.5,
        }
        save_file(factors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "use_dora": True}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        folders.append(folder)
    return folders


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("method", ["linear", "ties", "linear of an adapter"])
def test_a_tensor_much_larger_than_the_memory(method, large, dora, tmp_path):
    if method == "linear of an adapter":
        recipes = [
            {
                "method": "linear",
                "models": [str(base), {"model": str(base), "adapter": str(adapter)}],
            }
            for (base, *_), adapter in zip(large, dora, strict=True)
        ]
    else:
        recipes = [recipe_for(method, each) for each in large]
    plan = omnimerge.plan(recipes[1], force=["ancestor"])
    assert plan.largest < MEMORY
    announced = min(MEMORY, plan.peak_memory)
    peak = int(python(PEAK, *map(json.dumps, recipes), MEMORY, tmp_path / "out"))
    print(f"{method}: {peak / 1e6:.0f} MB, announced {announced / 1e6:.0f} MB")
    assert peak < announced + SLACK


def test_room_is_waited_for_and_who_never_fits_is_alone():
    ended = threading.Event()
    room, used, most = Room(100, ended), [], []

    def work(cost):
        with room.taken(cost):
            used.append(cost)
            most.append(list(used))
            time.sleep(0.002)
            used.remove(cost)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, [60, 30, 40, 250, 10, 50, 100, 70, 20, 300, 5, 5] * 3))
    assert all(sum(each) <= 100 or len(each) == 1 for each in most)
    assert any(len(each) > 1 for each in most)
    with room.taken(100):  # the end is not waited for
        ended.set()
        with room.taken(1):
            pass


def test_measuring_threads_are_as_many_as_the_memory_allows(checkpoints, monkeypatch):
    folders = [checkpoints("qwen2", own=own, tie_word_embeddings=True) for own in ("a", "b", "c")]
    recipe = recipe_for("ties", folders, parameters={"threshold_scope": "model"})
    plan = omnimerge.plan(recipe, force=["ancestor"])
    counts, pool = [], knowledge.thread_pool
    monkeypatch.setattr(knowledge, "thread_pool", lambda n: counts.append(n) or pool(n))
    monkeypatch.setattr(knowledge, "worker_count", lambda: 4)
    cost = max(plan.memory_to_measure(job) for job in plan.merged)
    assert cost > 0
    found = [
        knowledge.model_statistics(plan, memory=memory) for memory in (None, 2 * cost, cost // 2)
    ]
    assert sorted(set(counts), reverse=True) == [4, 2, 1]
    assert all(torch.equal(each.thresholds, found[0].thresholds) for each in found)


def test_plan_announces_what_does_not_fit(checkpoints, tmp_path):
    folders = [checkpoints("qwen2", own=own) for own in ("base", "one", "two")]
    file = tmp_path / "recipe.yaml"

    def planned(method, *options):
        file.write_text(json.dumps(recipe_for(method, folders)))
        return run("plan", file, "--force", "ancestor", *options).output

    for method, whole in (("tsv", True), ("linear", False)):
        found = json.loads(planned(method, "--json"))
        assert found["whole_matrices"] is whole
        assert 0 < found["largest_memory"] <= found["peak_memory"]
    # 2^18 elements, 8 bytes for each of 2 models and 4 more
    assert "tsv takes matrices whole: the largest needs 12.6 MB\n" in planned("tsv")
    alone = planned("tsv", "--memory", "1MB")
    assert "whole: the largest needs 12.6 MB, more than --memory 1MB; such ones run alone" in alone
    assert "needs" not in planned("linear")
    small = planned("linear", "--memory", "1MB")
    assert "of the slices that linear takes, the largest needs 12.6 MB, more than" in small
    assert "whole" not in small


def test_memory_has_no_effect_with_as_adapter_and_is_refused(tmp_path):
    said = run("merge", "x.yaml", "-o", tmp_path / "out", "--as-adapter", "4", "--memory", "2GB")
    assert said.exit_code == 2
    assert "--as-adapter takes tensors whole, one at a time; leave --memory out" in said.output

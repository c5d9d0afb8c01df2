"""Inputs held in memory between merges: where they go, and that the numbers stay."""

import shutil

import llm_layouts as families
import pytest
import torch

from omnimerge.engine import Parents, build_plan, load_recipe, merged_tensors, parents
from omnimerge.errors import CheckpointError
from omnimerge.methods import all_methods


@pytest.fixture
def folders(checkpoints, tmp_path):
    """A target and a donor of this test's own."""
    for name in ("qwen2_vl", "llava_onevision"):
        shutil.copytree(checkpoints(name), tmp_path / name)
    return tmp_path / "qwen2_vl", tmp_path / "llava_onevision"


@pytest.fixture
def plan(folders):
    return build_plan(load_recipe(adamms(*folders)))


def adamms(target, donor, **more):
    recipe = {"method": "adamms", "target": str(target), "models": [str(donor)]}
    return {**recipe, "parameters": {"alpha": 0.3}, **more}


def room(**free):
    return lambda device: free[torch.device(device).type]


def same(plan, held, parameters=None):
    found = dict(merged_tensors(plan, parameters, (), held))
    expected = dict(merged_tensors(plan, parameters))
    assert found.keys() == expected.keys()
    return all(torch.equal(found[name], expected[name]) for name in expected)


def test_half_of_the_free_memory_is_taken_and_no_byte_more(plan):
    nbytes = Parents.hold(plan, free=room(cpu=1 << 40)).nbytes
    assert nbytes == sum(job.output.nbytes for job in plan.merged) * 2
    for free, place in ((2 * nbytes, "host"), (2 * nbytes - 1, "files"), (0, "files")):
        assert Parents.hold(plan, free=room(cpu=free)).place == place


def test_one_of_several_processes_leaves_the_hosts_memory_alone(plan):
    assert Parents.hold(plan, host=False, free=room(cpu=1 << 40)).place == "files"


def test_held_inputs_are_not_read_again(plan, folders):
    expected = dict(merged_tensors(plan, {"alpha": 0.1}))
    held = Parents.hold(plan, free=room(cpu=1 << 40))
    (folders[1] / "model.safetensors").write_bytes(b"")
    found = dict(merged_tensors(plan, {"alpha": 0.1}, (), held))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(CheckpointError):
        dict(merged_tensors(plan, {"alpha": 0.1}))


@pytest.mark.parametrize(
    "name", [n for n, m in all_methods().items() if m.models[0] <= 2 and not m.adapters_only]
)
def test_every_method_gives_the_same_bits(name, checkpoints):
    folder = str(checkpoints("qwen2_vl"))
    other = str(checkpoints("qwen2_vl", own="other"))
    one = all_methods()[name].models[1] == 1
    recipe = {"method": name, "base": folder, "models": [other] if one else [other, folder]}
    needed = {"adamms": {"alpha": 0.3}, "nearswap": {"t": 0.01}, "slerp": {"t": 0.3}}
    recipe["parameters"] = needed.get(name, {})
    plan = build_plan(load_recipe(recipe))
    held = Parents.hold(plan, free=room(cpu=1 << 40))
    assert held.place == "host"
    for _ in range(2):  # an input written to would show at the second merge
        assert same(plan, held)


def accelerator(monkeypatch, name="cuda"):
    """Let the CPU pass for an accelerator: what is computed on "cuda" is computed here."""
    real = Parents.__init__

    def on_the_cpu(self, place, device, nbytes):
        real(self, place, "cpu", nbytes)

    monkeypatch.setattr(Parents, "__init__", on_the_cpu)


def test_an_accelerator_is_used_where_they_fit(plan, monkeypatch):
    accelerator(monkeypatch)
    nbytes = Parents.hold(plan, free=room(cpu=1 << 40)).nbytes
    for cuda, cpu, place in (
        (2 * nbytes, 0, "accelerator"),
        (2 * nbytes - 1, 2 * nbytes, "host"),
        (0, 0, "files"),
    ):
        held = Parents.hold(plan, "cuda:0", free=room(cuda=cuda, cpu=cpu))
        assert held.place == place
        assert same(plan, held)


def test_an_accelerator_that_computes_otherwise_is_not_used(plan, monkeypatch):
    accelerator(monkeypatch)
    real = parents.SliceWorker.compute
    monkeypatch.setattr(
        parents.SliceWorker,
        "compute",
        lambda self, *where: real(self, *where) * (1.001 if self._held else 1),
    )
    assert Parents.hold(plan, "cuda", free=room(cuda=1 << 40, cpu=1 << 40)).place == "host"


def test_an_accelerator_without_an_operation_is_not_used(plan, monkeypatch):
    accelerator(monkeypatch)
    real = parents.SliceWorker.compute

    def fail(self, *where):
        if self._held:
            raise RuntimeError("not implemented for 'BFloat16'")
        return real(self, *where)

    monkeypatch.setattr(parents.SliceWorker, "compute", fail)
    assert Parents.hold(plan, "cuda", free=room(cuda=1 << 40, cpu=1 << 40)).place == "host"


def test_a_method_that_counts_stays_with_the_cpu(checkpoints, monkeypatch):
    accelerator(monkeypatch)
    folder = str(checkpoints("qwen2_vl"))
    recipe = {"method": "ties", "base": folder, "models": [folder, folder]}
    plan = build_plan(load_recipe(recipe))
    assert Parents.hold(plan, "cuda", free=room(cuda=1 << 40, cpu=1 << 40)).place == "host"


def test_rows_of_the_targets_own_vocabulary(tmp_path, monkeypatch):
    tokens = {f"t{i}": i for i in range(60)}
    fewer = {token: i for token, i in tokens.items() if i % 3}
    target = families.write(tmp_path / "t", families.llama(families.decoder("a")), tokens=tokens)
    donor = families.write(tmp_path / "d", families.llama(families.decoder("b")), tokens=fewer)
    plan = build_plan(load_recipe(adamms(target, donor, vocabulary="overlap")))
    assert any(job.own for job in plan.merged)
    accelerator(monkeypatch)
    assert same(plan, Parents.hold(plan, "cuda", free=room(cuda=1 << 40, cpu=0)))


def test_free_memory_of_a_container(tmp_path, monkeypatch):
    files = {
        "/proc/meminfo": ["MemTotal: 100 kB", "MemAvailable: 64 kB"],
        "/sys/fs/cgroup/memory.max": ["40000"],
        "/sys/fs/cgroup/memory.current": ["15000"],
        "/sys/fs/cgroup/memory.stat": ["anon 1", "inactive_file 5000"],
    }
    monkeypatch.setattr(parents, "_lines", lambda file: files.get(str(file), []))
    assert parents.free_bytes("cpu") == 30_000  # 40000 - 15000 + 5000
    files["/sys/fs/cgroup/memory.max"] = ["max"]
    assert parents.free_bytes("cpu") == 64 * 1024
    files.clear()
    assert parents.free_bytes("cpu") == 0
    assert parents.free_bytes("mps") == 0
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 << 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1 << 30)
    assert parents.free_bytes("cuda:0") == 8 << 30

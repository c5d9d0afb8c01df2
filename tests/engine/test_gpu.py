"""Merging on a real GPU: the same numbers as on the CPU, bounded memory, and how fast.

Where there is none, these are skipped and reported so; `test_device` runs the code without one.
They need neither transformers nor the fixtures of `conftest`:

    python -m pytest -q -s -m gpu --noconftest tests/engine/test_gpu.py
"""

import json
import math
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import omnimerge
from omnimerge.checkpoint import CheckpointWriter, OutputTensor
from omnimerge.checkpoint.dtypes import dtype_name
from omnimerge.engine import accelerated, build_plan, load_recipe, run_plan
from omnimerge.engine.accelerated import DeviceExecutor
from omnimerge.engine.lane import Lane
from omnimerge.errors import ExecutorError, NonFiniteError
from omnimerge.methods import all_methods

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not GPUS, reason="no CUDA GPU here"),
]
NEEDED = {"adamms": {"alpha": 0.3}, "nearswap": {"t": 0.01}, "slerp": {"t": 0.3}}
EXACT = [n for n, m in all_methods().items() if m.exact]
OTHER = [n for n, m in all_methods().items() if not m.exact and not m.adapters_only]
GIGABYTES = float(os.environ.get("OMNIMERGE_GPU_GB", "2"))


def shapes_of(hidden, inter, layers, vocabulary):
    kv = hidden // 2
    layer = {
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.q_proj.bias": (hidden,),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.k_proj.bias": (kv,),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.v_proj.bias": (kv,),
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (inter, hidden),
        "mlp.up_proj.weight": (inter, hidden),
        "mlp.down_proj.weight": (hidden, inter),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    names = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(layers):
        names |= {f"model.layers.{i}.{leaf}": shape for leaf, shape in layer.items()}
    return names | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def write(folder, number, dtype=torch.float32, hidden=192, inter=448, layers=2, vocabulary=600):
    """A checkpoint of the Qwen2 layout; number 0 is the base, others are experts of it."""
    shapes = shapes_of(hidden, inter, layers, vocabulary)
    outputs = [OutputTensor(name, dtype_name(dtype), shape) for name, shape in shapes.items()]
    config = {
        "model_type": "qwen2", "hidden_size": hidden, "intermediate_size": inter,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 1e6,
        "num_hidden_layers": layers, "hidden_act": "silu", "vocab_size": vocabulary,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip
    with CheckpointWriter(folder, [outputs]) as writer:
        for index, (name, shape) in enumerate(shapes.items()):
            values = torch.randn(shape, generator=torch.Generator().manual_seed(index)) * 0.02
            own = torch.Generator().manual_seed(1_000_003 * number + index)
            values += torch.randn(shape, generator=own) * (1e-3 if number else 0)
            writer.write(name, values.to(dtype).view(torch.uint8).flatten().numpy().data)
        (writer.folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base and three experts: dtype -> folders."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def get(dtype):
        if dtype not in made:
            made[dtype] = [write(root / f"{dtype}-{i}", i, dtype) for i in range(4)]
        return made[dtype]

    return get


@pytest.fixture
def small(monkeypatch):
    """Slices and pieces so small that every matrix takes several."""
    monkeypatch.setattr(accelerated, "CHUNK_ELEMENTS", 20_000)
    monkeypatch.setattr(accelerated, "_ELEMENTS", 20_000)
    monkeypatch.setattr(accelerated, "_SMALLEST_PIECE", 1 << 13)
    monkeypatch.setattr(accelerated, "_LARGEST_PIECE", 1 << 13)
    monkeypatch.setattr("omnimerge.engine.knowledge.MEASURED_ELEMENTS", 30_000)


def recipe_of(name, folders, **more):
    base, *experts = folders
    method = all_methods()[name]
    recipe = {"method": name, "base": base, "models": experts[: method.models[1] or 3], "seed": 3}
    parameters = NEEDED.get(name, {}) | more.pop("parameters", {})
    return {**recipe, "parameters": parameters, **more}


def both(recipe, root, device="cuda"):
    """Merge on the GPU and on the CPU."""
    for folder, where in (("gpu", device), ("cpu", "cpu")):
        shutil.rmtree(root / folder, ignore_errors=True)
        omnimerge.merge(recipe, root / folder, device=where)
    return [load_file(root / folder / "model.safetensors") for folder in ("gpu", "cpu")]


def same(recipe, root, device="cuda"):
    ours, theirs = both(recipe, root, device)
    return [n for n in theirs if not torch.equal(bits(ours[n]), bits(theirs[n]))] == []


def bits(tensor):
    return tensor.contiguous().flatten().view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", EXACT)
def test_the_same_bits(name, dtype, folders, tmp_path, small):
    assert same(recipe_of(name, folders(dtype)), tmp_path)
    manifest = json.loads((tmp_path / "gpu" / "merge_manifest.json").read_text())
    assert manifest["devices"] == {"cuda:0": torch.cuda.get_device_name(0)}


@pytest.mark.parametrize("name", ["ties", "consensus_ties"])
def test_the_same_bits_by_thresholds_of_the_model(name, folders, tmp_path, small):
    recipe = recipe_of(name, folders(torch.bfloat16), parameters={"threshold_scope": "model"})
    assert same(recipe, tmp_path)


def test_the_same_bits_with_lines_and_whole_slices(folders, tmp_path):
    recipe = recipe_of("ties", folders(torch.bfloat16), lines={"alpha": 0.5, "beta": 0.7})
    assert same(recipe, tmp_path)


@pytest.mark.parametrize("name", OTHER)
def test_the_same_numbers_up_to_rounding(name, folders, tmp_path, small):
    recipe = recipe_of(name, folders(torch.float32))
    ours, theirs = both(recipe, tmp_path)
    base = load_file(Path(recipe["base"]) / "model.safetensors")
    worst = 0.0
    for key, tensor in theirs.items():
        changed = (tensor - base[key]).double().norm()
        difference = (ours[key] - tensor).double().norm()
        worst = max(worst, float(difference / changed) if changed else float(difference))
    print(f"\n{name}: differs by {worst:.1e} of what the merge changes")
    assert worst <= 1e-2
    assert {check.state for check in omnimerge.verify(tmp_path / "gpu", deep=True)} == {"ok"}
    omnimerge.merge(recipe, tmp_path / "again", device="cuda")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert [n for n in ours if not torch.equal(bits(ours[n]), bits(again[n]))] == []


@pytest.mark.parametrize("name", [n for n, m in all_methods().items() if m.low_rank])
def test_adapters(name, folders, tmp_path):
    base = folders(torch.float32)[0]
    models = [{"adapter": lora(tmp_path / f"lora{i}", i)} for i in range(2)]
    recipe = {"method": name, "base": base, "models": models, "seed": 3}
    ours, theirs = both(recipe, tmp_path)
    before = load_file(Path(base) / "model.safetensors")
    for key, tensor in theirs.items():
        changed = float((tensor - before[key]).double().norm())
        difference = float((ours[key] - tensor).double().norm())
        assert difference <= 1e-2 * changed + 1e-6 * float(tensor.norm()), key


def lora(folder, seed):
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for i in range(2):
        for leaf, (rows, columns) in {
            "self_attn.q_proj": (192, 192),
            "mlp.up_proj": (448, 192),
            "mlp.down_proj": (192, 448),
        }.items():
            prefix = f"base_model.model.model.layers.{i}.{leaf}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(4, columns, generator=generator) * 0.1
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) * 0.1
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "base",
              "target_modules": ["q_proj", "up_proj", "down_proj"]}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float16"])
def test_narrow_types_are_rounded_and_refused_alike(dtype, folders, tmp_path, small):
    recipe = recipe_of("linear", folders(torch.float32), dtype=dtype)
    assert same(recipe, tmp_path)
    expert = tmp_path / "expert"
    shutil.copytree(recipe["models"][0], expert)
    key = "model.layers.1.mlp.down_proj.weight"
    for value, words in ((2e5, f"overflows {dtype}"), (math.nan, "holds NaN or infinity")):
        tensors = load_file(expert / "model.safetensors")
        tensors[key][100, 100] = value
        save_file(tensors, expert / "model.safetensors")
        bad = {**recipe, "models": [str(expert)] * 3}
        with pytest.raises(NonFiniteError, match=words):
            omnimerge.merge(bad, tmp_path / "bad", device="cuda", force=["ancestor"])


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_inputs_in_8_bits(stored, folders, tmp_path, small):
    recipe = recipe_of("task_arithmetic", folders(torch.float32), dtype="bfloat16")
    models = []
    for number, folder in enumerate(recipe["models"]):
        shutil.copytree(folder, tmp_path / f"e{number}")
        file = tmp_path / f"e{number}" / "model.safetensors"
        tensors = {k: v.to(stored) if v.ndim > 1 else v for k, v in load_file(file).items()}
        save_file(tensors, file)
        models.append(str(tmp_path / f"e{number}"))
    assert same({**recipe, "models": models}, tmp_path)


@pytest.mark.skipif(GPUS < 2, reason="one CUDA GPU only")
def test_several_gpus(folders, tmp_path, small):
    several = ",".join(f"cuda:{n}" for n in range(GPUS))
    assert same(recipe_of("ties", folders(torch.bfloat16)), tmp_path, several)
    manifest = json.loads((tmp_path / "gpu" / "merge_manifest.json").read_text())
    assert len(manifest["devices"]) == GPUS


def test_lanes_under_load():
    """Many pieces over several lanes at once: what comes back is what went there, plus one."""
    failures = []

    def work(seed):
        lane = Lane("cuda:0", 1 << 16)
        generator = torch.Generator().manual_seed(seed)
        with lane.active():
            for count in (1, 16_384, 16_385, 500_000, 3_000_017) * 4:
                sent = torch.randint(-(2**31), 2**31 - 2, (count,), generator=generator)
                sent = sent.to(torch.int32)
                there = lane.upload(
                    torch.int32,
                    count,
                    lambda part, at, sent=sent: part.copy_(sent[at:][: len(part)]),
                )
                got = torch.empty(4 * count, dtype=torch.uint8)
                for start, data in lane.download(there + 1):
                    got[start : start + len(data)] = data
                if not torch.equal(got.view(torch.int32), sent + 1):
                    failures.append((seed, count))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A base and two experts of about `GIGABYTES` each, in bfloat16."""
    root = tmp_path_factory.mktemp("large")
    layers = max(1, round(GIGABYTES * 1e9 / 2 / (2 * 2048**2 + 2048**2 + 3 * 2048 * 8192)))
    sizes = {"hidden": 2048, "inter": 8192, "layers": layers, "vocabulary": 1000}
    return [write(root / str(i), i, torch.bfloat16, **sizes) for i in range(3)]


@pytest.mark.parametrize("name", ["linear", "ties", "tsv"])
def test_memory_of_the_device_is_bounded(name, large, tmp_path):
    recipe = recipe_of(name, large, select="linear")
    if name == "tsv":
        match = {"name": r"layers\.(?!0\.)"}
        recipe["overrides"] = [{"match": match, "keep": "target"}] if GIGABYTES > 0.2 else []
    plan = build_plan(load_recipe(recipe), ancestor=False)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run_plan(plan, tmp_path / "out", executor=DeviceExecutor(["cuda:0"], 10**8))
    peak = torch.cuda.max_memory_allocated()
    lanes, per_element = 4, 2 * plan.memory_per_element
    elements = max(j.output.nbytes // 2 for j in plan.merged) if name == "tsv" else 1 << 22
    print(
        f"\n{name}: {peak / 1e6:.0f} MB at most, bound {lanes * per_element * elements / 1e6:.0f}"
    )
    assert 0 < peak <= lanes * per_element * elements


def test_a_gpu_without_memory(large, tmp_path):
    recipe = recipe_of("tsv", large)
    recipe["overrides"] = [{"match": {"name": r"layers\.(?!0\.)"}, "keep": "target"}]
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    try:
        torch.cuda.set_per_process_memory_fraction(6e7 / total)
        with pytest.raises(ExecutorError, match=r"cuda:0 has too little memory for tensor 'model"):
            omnimerge.merge(recipe, tmp_path / "out", device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["linear", "task_arithmetic", "ties", "dare_ties", "della"])
def test_speed(name, large, tmp_path):
    recipe = recipe_of(name, large)
    inputs = large if all_methods()[name].needs_base else large[1:]
    for _ in range(2):
        floor, nbytes = floor_of(inputs, tmp_path / "floor")
    times = {}
    for device in ("cuda", "cpu"):
        runs = []
        for _ in range(2):
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
            start = time.perf_counter()
            omnimerge.merge(recipe, tmp_path / "out", device=device)
            runs.append(time.perf_counter() - start)
        times[device] = min(runs)
    pcie = nbytes / bandwidth()
    bound = max(floor, pcie)
    print(
        f"\n{name}: {nbytes / 1e9:.1f} GB there; cuda {times['cuda']:.2f} s, "
        f"cpu {times['cpu']:.2f} s; floor of the disk {floor:.2f} s, of PCIe {pcie:.2f} s; "
        f"{times['cuda'] / bound:.2f} times the slower"
    )
    if name in ("linear", "task_arithmetic"):
        assert times["cuda"] <= 1.5 * bound + 0.5  # the card and its hashes come on top


def floor_of(inputs, out):
    """Seconds to read all inputs and to write one of their size, by one thread; bytes read."""
    block, total = bytearray(1 << 22), 0
    start = time.perf_counter()
    for folder in inputs:
        source = os.open(Path(folder) / "model.safetensors", os.O_RDONLY)
        while count := os.readv(source, [block]):
            total += count
        os.close(source)
    target = os.open(out, os.O_WRONLY | os.O_CREAT, 0o666)
    size = total // len(inputs)
    os.posix_fallocate(target, 0, size)
    for position in range(0, size, len(block)):
        os.pwrite(target, memoryview(block)[: min(len(block), size - position)], position)
    os.fsync(target)
    os.close(target)
    return time.perf_counter() - start, total


def bandwidth():
    """Bytes a second of pinned copies to the GPU."""
    host = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(host, device="cuda")
    there.copy_(host)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(8):
        there.copy_(host, non_blocking=True)
    torch.cuda.synchronize()
    return 8 * len(host) / (time.perf_counter() - start)

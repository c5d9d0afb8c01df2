"""Time and memory of `omnimerge merge` beside the floor: reading the inputs, writing the output.

    python benchmarks/merge.py                  # 1 GB a model, about 5 GB in benchmarks/scratch
    python benchmarks/merge.py --device cuda    # each method on the CPU and there
    python benchmarks/merge.py --size 0.25 --runs 5 --json benchmarks/results/merge.json

The checkpoints are synthetic: the Qwen2 layout in bfloat16, a base and three models of base plus
noise. Every run is a process of its own, start-up included; floor and methods take turns, so that a
change of the machine's speed meets all of them. Peak memory is the largest resident set of the
process, given above that of an interpreter with torch loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

HIDDEN, INTER, HEADS, KV_HEADS = 1024, 4096, 16, 4
NAMES = ("base", "model0", "model1", "model2")

_FLOOR = """
import os, sys
block = bytearray(1 << 22)
out = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT, 0o666)
size = int(sys.argv[2])
os.posix_fallocate(out, 0, size)
for path in sys.argv[3:]:
    source = os.open(path, os.O_RDONLY)
    while os.readv(source, [block]):
        pass
for position in range(0, size, len(block)):
    os.pwrite(out, memoryview(block)[: min(len(block), size - position)], position)
os.fsync(out)
"""


def tensors(size_gb: float) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Qwen2 checkpoint of about `size_gb` GB in bfloat16."""
    kv = HIDDEN // HEADS * KV_HEADS
    layer = {
        "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        "self_attn.q_proj.bias": (HIDDEN,),
        "self_attn.k_proj.weight": (kv, HIDDEN),
        "self_attn.k_proj.bias": (kv,),
        "self_attn.v_proj.weight": (kv, HIDDEN),
        "self_attn.v_proj.bias": (kv,),
        "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        "mlp.gate_proj.weight": (INTER, HIDDEN),
        "mlp.up_proj.weight": (INTER, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, INTER),
        "input_layernorm.weight": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
    }
    vocabulary = 64_000 if size_gb >= 0.5 else 16_000
    layer_bytes = 2 * sum(_numel(shape) for shape in layer.values())
    layers = max(1, round((size_gb * 1e9 - 4 * vocabulary * HIDDEN) / layer_bytes))
    names = {"model.embed_tokens.weight": (vocabulary, HIDDEN)}
    for i in range(layers):
        names |= {f"model.layers.{i}.{leaf}": shape for leaf, shape in layer.items()}
    return names | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (vocabulary, HIDDEN)}


def make_checkpoints(folder: Path, size_gb: float) -> None:
    """Write base, model0, model1, model2 into `folder`; done once, reused later."""
    import torch

    from omnimerge.checkpoint import CheckpointWriter, OutputTensor
    from omnimerge.checkpoint.writer import shard_by_size

    shapes = tensors(size_gb)
    outputs = [OutputTensor(name, "BF16", shape) for name, shape in shapes.items()]
    config = {
        "model_type": "qwen2", "hidden_size": HIDDEN, "intermediate_size": INTER,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "rope_theta": 1e6,
        "num_hidden_layers": sum("q_proj.weight" in n for n in shapes), "hidden_act": "silu",
        "vocab_size": shapes["lm_head.weight"][0], "torch_dtype": "bfloat16",
    }  # fmt: skip
    for number, target in enumerate(folder / name for name in NAMES):
        if target.is_dir():
            continue
        with CheckpointWriter(target, shard_by_size(outputs, 200_000_000)) as writer:
            for index, (name, shape) in enumerate(shapes.items()):
                ancestor = torch.Generator().manual_seed(index)
                values = torch.randn(shape, generator=ancestor) * 0.02
                own = torch.Generator().manual_seed(1_000_003 * number + index)
                values += torch.randn(shape, generator=own) * (1e-3 if number else 0)
                data = values.to(torch.bfloat16).view(torch.uint8).flatten().numpy().data
                writer.write(name, data)
            (writer.folder / "config.json").write_text(json.dumps(config))


def measure(command: list[str]) -> dict[str, float]:
    """Run a command; return wall seconds, CPU seconds and peak resident MB of that process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    stderr = process.stderr.read().decode() if process.stderr else ""
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} failed:\n{stderr}")
    return {"wall_s": wall, "cpu_s": usage.ru_utime + usage.ru_stime, "peak_mb": _mb(usage)}


def _mb(usage: resource.struct_rusage) -> float:
    return usage.ru_maxrss / (1024 if sys.platform != "darwin" else 1024**2)


def _numel(shape: tuple[int, ...]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total


def _commands(folders: list[Path], out: Path) -> dict[str, list[str]]:
    base, *models = (str(folder) for folder in folders)
    merge = [sys.executable, "-m", "omnimerge", "merge", "-o", str(out)]
    merge += [part for model in models for part in ("--model", model)]
    files = [str(f) for model in models for f in sorted(Path(model).glob("*.safetensors"))]
    base_files = [str(f) for f in sorted(Path(base).glob("*.safetensors"))]
    size = sum(Path(f).stat().st_size for f in base_files)
    floor = [sys.executable, "-c", _FLOOR, str(out), str(size)]
    sparse = {
        "ties": [], "ties, whole model": ["--param", "threshold_scope=model"],
        "dare_linear": [], "dare_ties": [], "della": [], "breadcrumbs": [],
    }  # fmt: skip
    return {
        "torch loaded": [sys.executable, "-c", "import torch"],
        "floor, 3 inputs": [*floor, *files],
        "linear": [*merge, "--method", "linear", "--param", "weights=[0.4,0.3,0.3]"],
        "floor, 4 inputs": [*floor, *base_files, *files],
        "task_arithmetic": [
            *merge, "--method", "task_arithmetic", "--base", base, "--param", "scale=0.4",
        ],
        **{
            name: [*merge, "--method", name.partition(",")[0], "--base", base, *more]
            for name, more in sparse.items()
        },
    }  # fmt: skip


def main() -> None:
    """Make the checkpoints, run everything in turns, print and save the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=float, default=1.05, help="GB a model")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--scratch", type=Path, default=Path(__file__).parent / "scratch")
    parser.add_argument("--json", type=Path, help="also save the table here")
    parser.add_argument("--only", default="", help="cases whose name holds this, and linear")
    parser.add_argument("--device", help="also every method with `merge --device` of this")
    parser.add_argument("--make-only", action="store_true", help="only write the checkpoints")
    options = parser.parse_args()
    folder = options.scratch / f"merge-{options.size:g}GB"
    if options.make_only:
        make_checkpoints(folder, options.size)
        return
    # In a process of its own: a child's peak memory would start at that of a parent with torch.
    subprocess.run([sys.executable, *sys.argv, "--make-only"], check=True)
    folders = [folder / name for name in NAMES]
    out = folder / "out"
    wanted = ("linear", "torch loaded", "floor, 3 inputs", "floor, 4 inputs")
    commands = {
        name: command
        for name, command in _commands(folders, out).items()
        if options.only in name or name in wanted
    }
    if options.device:
        there = {f"{n} there": [*c, "--device", options.device] for n, c in commands.items()}
        commands |= {n: c for n, c in there.items() if "omnimerge" in c}
    results: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for run in range(options.runs + 1):
        for name, command in commands.items():
            shutil.rmtree(out, ignore_errors=True)
            out.unlink(missing_ok=True)
            figures = measure(command)
            if run:  # the first round warms the page cache
                results[name].append(figures)
    _report(results, options)
    shutil.rmtree(out, ignore_errors=True)


def _report(results: dict[str, list[dict[str, float]]], options: argparse.Namespace) -> None:
    def median(name: str, figure: str) -> float:
        return statistics.median(run[figure] for run in results[name])

    def ratio(name: str, other: str) -> float:
        pairs = zip(results[name], results[other], strict=True)
        return statistics.median(a["wall_s"] / b["wall_s"] for a, b in pairs)

    floors = {"linear": "floor, 3 inputs", "task_arithmetic": "floor, 4 inputs"}
    floors |= {f"{name} there": floor for name, floor in floors.items()}
    rows = []
    for name in results:
        row = {"case": name, **{f: median(name, f) for f in ("wall_s", "cpu_s", "peak_mb")}}
        row["above_torch_mb"] = row["peak_mb"] - median("torch loaded", "peak_mb")
        if floor := floors.get(name):
            row["times_floor"] = ratio(name, floor)
        if name not in ("torch loaded", "linear") and "floor" not in name:
            row["times_linear"] = ratio(name, "linear")
        rows.append(row)
    machine = {
        "cores": os.cpu_count(), "processor": platform.machine(),
        "python": platform.python_version(),
        "size_gb": options.size, "runs": options.runs, "device": options.device or "cpu",
    }  # fmt: skip
    print(machine)
    print(
        f"{'case':24}{'wall s':>9}{'cpu s':>9}{'peak MB':>9}{'over torch':>12}{'x floor':>9}"
        f"{'x linear':>9}"
    )
    for row in rows:
        ratios = [f"{row[key]:9.2f}" if key in row else f"{'':>9}" for key in
                  ("times_floor", "times_linear")]  # fmt: skip
        print(
            f"{row['case']:24}{row['wall_s']:9.2f}{row['cpu_s']:9.2f}{row['peak_mb']:9.0f}"
            f"{row['above_torch_mb']:12.0f}{''.join(ratios)}"
        )
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What `benchmarks/merge.py` merges: checkpoints on disk, and one command per case."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEADS = 16

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

FAMILIES = {
    "linear": ("linear", "task_arithmetic"),
    "sparse": (
        "ties", "ties, whole model", "dare_linear", "dare_ties", "della", "breadcrumbs",
    ),
    "spectral": ("tsv", "iso_c", "knots"),
    "optimised": ("optmerge", "wudi", "swudi"),
}  # fmt: skip
# Times the floor: what is aimed at.
AIMS = {"linear": 1.5, "sparse": 2.5}
_NO_BASE = ("linear",)
# Ours -> mergekit's name, and its parameters for every model and for all.
PEERS = {
    "linear": ({"weight": 0.4}, {"normalize": False}),
    "task_arithmetic": ({"weight": 0.4}, {"normalize": False}),
    "ties": ({"weight": 0.4, "density": 0.2}, {"normalize": False}),
    "dare_linear": ({"weight": 0.4, "density": 0.5}, {"normalize": False}),
    "dare_ties": ({"weight": 0.4, "density": 0.5}, {"normalize": False}),
    "della": ({"weight": 0.4, "density": 0.5, "epsilon": 0.1}, {"normalize": False}),
    "breadcrumbs": ({"weight": 0.4, "density": 0.9}, {"normalize": False}),
}


@dataclass(frozen=True)
class Size:
    """How large a model is: GB in bfloat16 and the width, or `7B` for files of holes."""

    label: str
    hidden: int

    @property
    def sparse(self) -> bool:
        """Whether the files are holes."""
        return self.label == "7B"

    @property
    def folder(self) -> str:
        """Name of the folder that the checkpoints are in."""
        return "merge-7B" if self.sparse else f"merge-{float(self.label):g}GB-{self.hidden}"


def shapes_of(size: Size) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Qwen2 checkpoint of about so many GB."""
    hidden, inter = size.hidden, 4 * size.hidden
    kv = hidden // 4
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
    gb = float(size.label)
    vocabulary = 64_000 if gb >= 0.5 else 16_000
    layer_bytes = 2 * sum(math.prod(shape) for shape in layer.values())
    layers = max(1, round((gb * 1e9 - 4 * vocabulary * hidden) / layer_bytes))
    names = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(layers):
        names |= {f"model.layers.{i}.{leaf}": shape for leaf, shape in layer.items()}
    return names | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def make_checkpoints(folder: Path, size: Size, models: int) -> None:
    """Write the base and the models into `folder`, those that are not there yet."""
    if size.sparse:
        sys.path.insert(0, str(ROOT / "tests" / "support"))
        import published_headers

        config = {
            **published_headers.QWEN2_7B, "model_type": "qwen2", "vocab_size": 152064,
            "architectures": ["Qwen2ForCausalLM"], "torch_dtype": "bfloat16",
        }  # fmt: skip
        shapes = published_headers.decoder(published_headers.QWEN2_7B, 152064, bias=True)
        for each in names(models):
            if not (folder / each).is_dir():
                published_headers.save(folder / each, shapes, config)
        return
    for number, each in enumerate(names(models)):
        if not (folder / each).is_dir():
            _write(folder / each, number, size)


def _write(folder: Path, number: int, size: Size) -> None:
    import torch

    from omnimerge.checkpoint import CheckpointWriter, OutputTensor
    from omnimerge.checkpoint.shard import shard_by_size

    shapes = shapes_of(size)
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2",
        "hidden_size": size.hidden, "intermediate_size": 4 * size.hidden,
        "num_attention_heads": HEADS, "num_key_value_heads": HEADS // 4, "rope_theta": 1e6,
        "num_hidden_layers": sum("q_proj.weight" in name for name in shapes),
        "hidden_act": "silu", "vocab_size": shapes["lm_head.weight"][0],
        "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    outputs = [OutputTensor(name, "BF16", shape) for name, shape in shapes.items()]
    with CheckpointWriter(folder, shard_by_size(outputs, 200_000_000)) as writer:
        for index, (name, shape) in enumerate(shapes.items()):
            ancestor = torch.Generator().manual_seed(index)
            values = torch.randn(shape, generator=ancestor) * 0.02
            own = torch.Generator().manual_seed(1_000_003 * number + index)
            values += torch.randn(shape, generator=own) * (1e-3 if number else 0)
            writer.write(name, values.to(torch.bfloat16).view(torch.uint8).flatten().numpy().data)
        (writer.folder / "config.json").write_text(json.dumps(config))


def names(models: int) -> list[str]:
    """The folders of a base and so many models."""
    return ["base", *(f"model{number}" for number in range(models))]


def inputs_of(case: str, folder: Path, models: int) -> list[Path]:
    """The checkpoints that a case reads."""
    every = [folder / name for name in names(models)]
    return every[1:] if case in _NO_BASE else every


def floor_command(inputs: list[Path], out: Path) -> list[str]:
    """Read the inputs; write and sync an output as large as one of them."""
    files = [str(f) for folder in inputs for f in sorted(folder.glob("*.safetensors"))]
    size = sum(f.stat().st_size for f in inputs[0].glob("*.safetensors"))
    return [sys.executable, "-c", _FLOOR, str(out), str(size), *files]


def our_command(case: str, folder: Path, models: int, out: Path, size: Size) -> list[str]:
    """`omnimerge merge`."""
    base, *others = (str(folder / name) for name in names(models))
    command = [sys.executable, "-m", "omnimerge", "merge", "-o", str(out)]
    command += ["--method", case.partition(",")[0]]
    command += [part for model in others for part in ("--model", model)]
    if case in _NO_BASE:
        command += ["--param", f"weights={[1 / models] * models}"]
    else:
        command += ["--base", base]
    if case == "task_arithmetic":
        command += ["--param", "scale=0.4"]
    if case == "ties, whole model":
        command += ["--param", "threshold_scope=model"]
    return [*command, *(["--force", "ancestor"] if size.sparse else [])]


def peer_command(
    case: str, folder: Path, models: int, out: Path, mergekit: Path
) -> list[str] | None:
    """`mergekit-yaml` on the same inputs; None where it has no such method."""
    if case not in PEERS:
        return None
    each, shared = PEERS[case]
    base, *others = (str(folder / name) for name in names(models))
    config = {
        "merge_method": case, "dtype": "bfloat16", "parameters": shared,
        "models": [{"model": model, "parameters": each} for model in others],
    }  # fmt: skip
    if case not in _NO_BASE:
        config["base_model"] = base
    file = folder / f"mergekit-{case}-{models}.yaml"
    file.write_text(json.dumps(config))
    return [str(mergekit), str(file), str(out), "--no-copy-tokenizer"]

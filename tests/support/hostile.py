"""Hostile files: valid ones with something wrong, and what every reader promises about them.

A builder makes the content of one file out of choices; the choices come from hypothesis, from
atheris, or from a seeded generator. `examine` gives the content to a reader and holds the reader to
the promise: a result or an `OmnimergeError` of one printable line, in time, without a look at any
file outside of its folder, and without a process, a connection or a deletion.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import random
import signal
import struct
import sys
import sysconfig
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save as to_safetensors

import omnimerge
from omnimerge.arch.alignment import Alignment  # noqa: F401 - loaded before files are watched
from omnimerge.arch.layout import slot_map
from omnimerge.arch.layout_file import read_layouts
from omnimerge.arch.summary import summarize
from omnimerge.arch.vocabulary import shared_rows, token_ids, vocabulary_difference
from omnimerge.checkpoint import AdaptedCheckpoint, Adapter, Checkpoint
from omnimerge.checkpoint.dtypes import is_known
from omnimerge.checkpoint.headers import read_safetensors_header
from omnimerge.checkpoint.journal import read_journal
from omnimerge.checkpoint.pickle import read_pickle_header
from omnimerge.engine.loading import load_recipe
from omnimerge.engine.mergekit import convert_file
from omnimerge.engine.verify import verify
from omnimerge.errors import ConversionError, OmnimergeError
from omnimerge.generate.prompts import read_prompts
from omnimerge.search.logs import read_log

SECONDS = 10.0
"""A reader that takes longer on a file of some kilobytes hangs."""


# --- choices ---------------------------------------------------------------------------------


class Pick:
    """Choices out of a seeded generator; others have the same two methods."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def number(self, low: int, high: int) -> int:
        return self._random.randint(low, high)

    def raw(self, most: int) -> bytes:
        return self._random.randbytes(self._random.randint(0, most))


class Drawn:
    """Choices that hypothesis makes, and shrinks."""

    def __init__(self, draw: Callable[[Any], Any]) -> None:
        self._draw = draw

    def number(self, low: int, high: int) -> int:
        from hypothesis import strategies

        return self._draw(strategies.integers(low, high))

    def raw(self, most: int) -> bytes:
        from hypothesis import strategies

        return self._draw(strategies.binary(max_size=most))


class Fed:
    """Choices out of the bytes that atheris evolves."""

    def __init__(self, provider: Any) -> None:
        self._provider = provider

    def number(self, low: int, high: int) -> int:
        return self._provider.ConsumeIntInRange(low, high)

    def raw(self, most: int) -> bytes:
        return self._provider.ConsumeBytes(self.number(0, most))


def one_of(pick: Any, values: Any) -> Any:
    return values[pick.number(0, len(values) - 1)]


# --- what may be wrong -------------------------------------------------------------------------

TEXTS = (
    "", " ", ".", "..", "../x", "/etc/passwd", "a/b", "~nobody/x", "x" * 3000, "\x00", "a\nb", "\r",
    "\x1b[2J\x1b]0;owned\x07", "\u202e", "\u2028", "\ud800", "\x9b31m", "<script>", "{i}", "{{",
    "(a+)+$", "(" * 300, "[", "a{99999999999999999999}", "(?=x)", "*", "@", "+", "a+b+c", "null",
    "lora_A", "base_model.model.x.lora_A.weight", "layers.99999999999999999999.x", "é" * 50, "１２",
    "model.layers.0", "nan", "1e999", "torch.float16", "LORA", "none", "F32", "F4", "I64", "BOOL",
)  # fmt: skip
NUMBERS = (
    0, 1, -1, 2, 3, 7, 255, 2**31, 2**31 - 1, 2**32, 2**60, 2**63 - 1, 2**63, 2**64, -(2**63),
    10**30, 10**400, 0.5, -0.0, 1e308, 1e-320, float("nan"), float("inf"), float("-inf"),
)  # fmt: skip


def deep(depth: int, kind: int = 0) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value] if kind else {"thinker_config": value}
    return value


def odd(pick: Any) -> Any:
    """A value that does not belong where it is put."""
    kind = pick.number(0, 9)
    if kind <= 2:
        return one_of(pick, TEXTS)
    if kind <= 5:
        return one_of(pick, NUMBERS)
    if kind == 6:
        return one_of(pick, (None, True, False))
    if kind == 7:
        return one_of(pick, ([], {}, [[]], [None], {"": {}}, [{}], {"x": 1}, [0, [1]], ["a", 1]))
    if kind == 8:
        return deep(one_of(pick, (5, 200, 400)), pick.number(0, 1))
    return [one_of(pick, NUMBERS) for _ in range(pick.number(0, 5))]


def spoiled(pick: Any, value: Any) -> Any:
    """A copy of a JSON value with one to three changes."""
    value = copy.deepcopy(value)
    for _ in range(pick.number(1, 3)):
        value = _change(pick, value)
    return value


def _change(pick: Any, value: Any) -> Any:
    place = value
    for _ in range(8):
        if not isinstance(place, (dict, list)) or not place:
            break
        key = one_of(pick, list(place)) if isinstance(place, dict) else _index(pick, place)
        inner = place[key]
        if isinstance(inner, (dict, list)) and inner and pick.number(0, 3):
            place = inner
            continue
        return _alter(pick, value, place, key)
    return odd(pick)


def _index(pick: Any, values: list[Any]) -> int:
    return pick.number(0, len(values) - 1)


def _alter(pick: Any, value: Any, place: Any, key: Any) -> Any:
    kind = pick.number(0, 6)
    if kind <= 2:
        place[key] = odd(pick)
    elif kind == 3:
        del place[key]
    elif kind == 4 and isinstance(place, dict):
        place[one_of(pick, TEXTS)] = place.pop(key)
    elif kind == 5 and isinstance(place, dict):
        place[one_of(pick, TEXTS)] = copy.deepcopy(place[one_of(pick, list(place))])
    elif isinstance(place, list):
        place.extend(copy.deepcopy(place))
    elif isinstance(place[key], (int, float)) and not isinstance(place[key], bool):
        place[key] = place[key] + one_of(pick, (-1, 1, -4, 4, 1000))
    else:
        place[key] = [place[key]]
    return value


def scrambled(pick: Any, data: bytes, tokens: tuple[bytes, ...] = ()) -> bytes:
    """Bytes with some of them changed, lost, doubled, or with something put in."""
    found = bytearray(data)
    for _ in range(pick.number(1, 4)):
        at = pick.number(0, len(found))
        kind = pick.number(0, 5)
        if kind == 0 and at < len(found):
            found[at] = pick.number(0, 255)
        elif kind == 1:
            del found[at : at + one_of(pick, (1, 2, 8, 64, 10**6))]
        elif kind == 2:
            found[at:at] = found[at : at + 40] * one_of(pick, (1, 2, 50))
        elif kind == 3 and tokens:
            found[at:at] = one_of(pick, tokens)
        elif kind == 4:
            found[at:at] = pick.raw(12)
        else:
            found[at:at] = one_of(pick, (b"\x00", b"\xff", b"\xed\xa0\x80", b"\n", b'"', b"\x1b["))
    return bytes(found)


def as_json(pick: Any, value: Any, *, loose: int = 4) -> bytes:
    """JSON of a spoiled value, one time in `loose` scrambled too, or with a key twice."""
    data = json.dumps(spoiled(pick, value), ensure_ascii=bool(pick.number(0, 1)))
    raw = data.encode("utf-8", "surrogatepass")
    if pick.number(1, loose) == loose:
        raw = scrambled(pick, raw, _JSON)
    if pick.number(0, 30) == 30:
        raw = one_of(pick, (b"[" * 100_000, b'{"a":' * 50_000, b"", b"\xef\xbb\xbf{}", b"1" * 9000))
    return raw


_JSON = (b"{", b"}", b"[", b"]", b'"a":', b",", b"NaN", b"Infinity", b"1e999", b'"\\ud800"', b"-")
_YAML = (
    b"&a ", b"*a", b"!!python/object/apply:os.system ['x']", b"!!binary ", b"!!set {a}", b"? ",
    b"- ", b": ", b"\n", b"  ", b"<<: ", b"!!int ", b"!!float ", b"!!timestamp 2001-99-99", b"[",
    b"{", b"}", b"1:" * 400 + b"1.5", b"0x" + b"f" * 6000, b"9" * 5000, b"2001-01-01T99:00:00Z",
    b"'", b'"', b"|", b"!!omap ", b"!!pairs ", b"---\n", b"...\n", b"%YAML 9.9\n", b".nan",
    b".inf", b"!!str ", b"#", b'"\\ud800"', b'"\\x1b[2J"', b"=", b"y", b"~",
)  # fmt: skip


def as_yaml(pick: Any, value: Any) -> bytes:
    """YAML of a spoiled value, half of the time scrambled too."""
    changed = spoiled(pick, value)
    try:
        text = yaml.dump(changed, allow_unicode=False, sort_keys=False)
    except RecursionError:
        text = json.dumps(changed)  # most of JSON is YAML too
    raw = text.encode("utf-8", "surrogatepass")
    if pick.number(0, 1):
        raw = scrambled(pick, raw, _YAML)
    if pick.number(0, 30) == 30:
        raw = one_of(pick, (b"[" * 3000, b"- " * 20_000, b"a: " * 9_000, BOMB, b"&a [*a]"))
    return raw


BOMB = b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (new, new, b",".join([b"*%c" % old] * 9))
    for old, new in zip(b"abcdefghijkl", b"bcdefghijklm", strict=True)
)


# --- seeds ------------------------------------------------------------------------------------

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "intermediate_size": 12,
    "vocab_size": 10,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "rope_scaling": {"rope_type": "default", "factor": 2.0, "full_attention": {"rope_theta": 1.0}},
    "quantization_config": None,
}


@cache
def tensors() -> dict[str, torch.Tensor]:
    """A small language model's."""
    shapes = {"model.embed_tokens.weight": (10, 8), "model.norm.weight": (8,)}
    shapes["lm_head.weight"] = (10, 8)
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        for name, shape in {
            "self_attn.q_proj.weight": (8, 8),
            "self_attn.k_proj.weight": (4, 8),
            "self_attn.v_proj.weight": (4, 8),
            "self_attn.o_proj.weight": (8, 8),
            "mlp.gate_proj.weight": (12, 8),
            "mlp.up_proj.weight": (12, 8),
            "mlp.down_proj.weight": (8, 12),
            "input_layernorm.weight": (8,),
            "post_attention_layernorm.weight": (8,),
        }.items():
            shapes[prefix + name] = shape
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(s, generator=generator).bfloat16() for n, s in shapes.items()}


@cache
def model_bytes() -> bytes:
    return to_safetensors(tensors(), {"format": "pt"})


def write_model(folder: Path, config: dict[str, Any] | None = None) -> Path:
    """Write the small language model."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    (folder / "model.safetensors").write_bytes(model_bytes())
    return folder


def split_header(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header: bytes, body: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + body


def safetensors_file(pick: Any, seed: bytes) -> bytes:
    header, body = split_header(seed)
    few = dict(list(header.items())[: pick.number(1, 6)])
    raw = as_json(pick, few if pick.number(0, 1) else header)
    if pick.number(0, 4) == 4:
        body = body[: pick.number(0, len(body))]
    length = None
    if pick.number(0, 5) == 5:
        length = one_of(pick, (0, 1, len(raw) + 1, len(raw) - 1, 2**20, 10**8, 2**60, 2**64 - 1))
    data = with_header(raw, body, None if length is None else max(0, length))
    return scrambled(pick, data) if pick.number(0, 7) == 7 else data


@cache
def pickle_seeds() -> tuple[bytes, ...]:
    found = []
    big = torch.arange(12.0)
    sparse = torch.eye(3).to_sparse()
    states: list[Any] = [
        {"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)},
        {"head": big[:4], "tail": big[4:], "again": big},
        {"p": torch.nn.Parameter(torch.ones(3)), "f8": torch.zeros(2).to(torch.float8_e4m3fn)},
        {"s": sparse, "a": torch.ones(2)},
        {"m": torch.ones(3, device="meta"), "a": torch.ones(2)},
        {"a": torch.ones(2), "n": 3, "l": [torch.ones(1)]},
        {"e": torch.zeros(0, 3), "u": torch.zeros(3, dtype=torch.uint16), "t": torch.ones(2, 2).T},
    ]
    for state in states:
        stream = io.BytesIO()
        torch.save(state, stream)
        found.append(stream.getvalue())
    stream = io.BytesIO()
    torch.save(states[0], stream, _use_new_zipfile_serialization=False)
    return (*found, stream.getvalue())


_PICKLE = (
    b"\x85", b"\x85" * 3000, b"\x86", b"\x87", b"R", b"Q", b"(", b"t", b")", b"]", b"}", b"u",
    b"s", b"b", b"K\x00", b"N", b"0", b"2", b".", b"\x8a\x06" + (2**40).to_bytes(6, "little"),
    b"h\x00", b"cbuiltins\nbytearray\n", b"cbuiltins\nset\n", b"ctorch\nFloatStorage\n", b"q\x00",
    b"q\xff", b"cos\nsystem\n", b"X\x04\x00\x00\x00echo", b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"e", b"a", b"ctorch._utils\n_rebuild_sparse_tensor\n", b"ctorch._utils\n_rebuild_parameter\n",
    b"\x8c\x01a", b"ctorch\nfloat32\n", b"ccollections\nOrderedDict\n", b"X\xff\xff\xff\xff",
    b"\x95", b"J\xff\xff\xff\xff", b"M\xff\xff", b"\x89", b"\x88", b"G" + b"\xff" * 8, b"\x81",
    b"\x93", b"i", b"o", b"\x80\x05",
)  # fmt: skip


def pickle_file(pick: Any) -> bytes:
    seed = one_of(pick, pickle_seeds())
    if not zipfile.is_zipfile(io.BytesIO(seed)) or pick.number(0, 5) == 5:
        return scrambled(pick, seed, _PICKLE)
    stream = io.BytesIO()
    changed = 7 - pick.number(0, 7)  # 0: a name, 1: a record, 2: all deflated, else the pickle
    with (
        zipfile.ZipFile(io.BytesIO(seed)) as old,
        zipfile.ZipFile(stream, "w", 8 if changed == 2 else 0) as new,
    ):
        for info in old.infolist():
            name, data = info.filename, old.read(info)
            if changed == 0 and pick.number(0, 2) == 0:
                name = one_of(pick, ("../x", "/abs", "a/data.pkl", "archive/data/0", "x" * 300, ""))
            if changed == 1 and pick.number(0, 1) == 0:
                data = data[: pick.number(0, len(data))] + pick.raw(8)
            if changed > 2 and name.endswith("data.pkl"):
                data = scrambled(pick, data, _PICKLE)
            with contextlib.suppress(ValueError):
                new.writestr(name or "e", data)
    data = stream.getvalue()
    return (
        scrambled(pick, data, (b"PK\x05\x06", b"PK\x01\x02", b"PK\x03\x04"))
        if changed < 2
        else data
    )


ADAPTER: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "use_rslora": False,
    "fan_in_fan_out": False,
    "bias": "none",
    "init_lora_weights": True,
    "rank_pattern": {"layers.0.self_attn.q_proj": 2},
    "alpha_pattern": {"^model.*q_proj": 8, "v_proj": 4.5},
    "target_modules": ["q_proj"],
    "task_type": "CAUSAL_LM",
    "layer_replication": None,
}


@cache
def adapter_bytes() -> bytes:
    found = {}
    for layer in range(2):
        for module, (rows, columns) in {"q_proj": (8, 8), "v_proj": (4, 8)}.items():
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            found[f"{name}.lora_A.weight"] = torch.ones(2, columns)
            found[f"{name}.lora_B.weight"] = torch.ones(rows, 2)
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    found[f"{name}.lora_magnitude_vector"] = torch.ones(8)
    found[f"{name}.lora_B.bias"] = torch.ones(8, 8)
    found["base_model.model.lm_head.base_layer.weight"] = torch.ones(10, 8)
    found["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.ones(2, 10)
    found["base_model.model.model.embed_tokens.lora_embedding_B"] = torch.ones(8, 2)
    return to_safetensors(found)


RECIPE: dict[str, Any] = {
    "method": "ties",
    "target": "a",
    "base": "b",
    "models": ["one", {"model": "two", "weight": 0.5}, {"adapter": "three"}],
    "parameters": {"density": 0.5},
    "select": "all",
    "lines": {"alpha": 0.1, "beta": 0.9},
    "overrides": [
        {"match": {"component": "vision", "name": "x.*", "layers": "0-3"}, "keep": "target"},
        {"match": {"slot": "attn"}, "parameters": {"density": 0.1}},
    ],
    "vocabulary": "auto",
    "branches": {"shared": "text"},
    "layouts": ["layout.yaml"],
    "dtype": "bfloat16",
    "max_shard_size": "5GB",
    "seed": 3,
}

MERGEKIT: tuple[dict[str, Any], ...] = (
    {
        "merge_method": "ties",
        "base_model": "m",
        "models": [
            {"model": "one", "parameters": {"density": [0.1, 0.9], "weight": 0.5}},
            {
                "model": {"model": {"path": "two", "revision": "main"}, "lora": None},
                "parameters": {"weight": [{"filter": "mlp", "value": [0, 1]}, {"value": 0.3}]},
            },
        ],
        "parameters": {"normalize": True, "int8_mask": True, "density": 0.5},
        "dtype": "bfloat16",
        "out_dtype": "float16",
        "tokenizer": {"source": "base", "tokens": {}},
        "chat_template": "auto",
    },
    {
        "merge_method": "slerp",
        "base_model": {"model": "m"},
        "slices": [
            {
                "sources": [
                    {"model": "m", "layer_range": [0, 4]},
                    {"model": "two+lora", "layer_range": [0, 4]},
                ],
                "parameters": {"t": [{"filter": "self_attn", "value": [0, 0.5, 1]}, {"value": 0}]},
            }
        ],
        "tokenizer_source": "union",
    },
    {
        "merge_method": "linear",
        "models": [{"model": "m", "parameters": {"weight": 1}}, {"model": "two"}],
        "parameters": {"weight": 0.5, "normalize": False},
        "trust_remote_code": True,
    },
)

LAYOUT: dict[str, Any] = {
    "name": "mine",
    "about": "a layout",
    "prefix": "model.",
    "head": "lm_head",
    "layers": "layers.{i}.",
    "embed": "embed_tokens",
    "norm": "norm",
    "block": {
        "self_attn.q_proj": "attn.q",
        "self_attn.k_proj": "attn.k@vision",
        "qkv": {"grouped": ["attn.q", "attn.k", "attn.v"]},
        "mlp.gu": {"concat": ["mlp.gate", "mlp.up"], "branch": "text"},
    },
    "inserted": "cross_attn.",
    "own": ["own"],
    "components": {"visual.": "vision.", "mm.": "projector.mm."},
    "marker": "",
}
STACKS = {
    **{key: LAYOUT[key] for key in ("block", "own", "components")},
    "stacks": {"one": {"prefix": "model.", "head": "lm_head"}, "two": {"prefix": "", "head": "h"}},
}

TOKENIZER: dict[str, Any] = {
    "version": "1.0",
    "added_tokens": [{"id": 4, "content": "<s>", "special": True}],
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "é": 3}, "merges": ["a b"]},
}
UNIGRAM = {**TOKENIZER, "model": {"type": "Unigram", "vocab": [["a", 0.0], ["b", -1.5]]}}


def sentencepiece(pieces: tuple[str, ...] = ("<unk>", "a", "é", "ab")) -> bytes:
    found = b""
    for piece in pieces:
        text = piece.encode()
        body = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", -1.0)
        found += b"\x0a" + bytes([len(body)]) + body
    return found + b"\x12\x02\x18\x01"


LOGS: tuple[Any, ...] = (
    [{"doc_id": 0, "resps": [["yes"]], "input": "q", "doc_hash": "h"},
     {"doc_id": 1, "filtered_resps": ["no"], "target": "x"}],
    [{"id": "1", "response": "yes", "prompt": "p"}, {"id": "2", "response": None}],
    [{"index": 1.0, "prediction": "yes", "question": "q"}, {"index": 2, "prediction": 4}],
)  # fmt: skip
PROMPTS: tuple[Any, ...] = (
    {"id": "1", "prompt": "p", "image": ["a.png"], "answer": "x", "kind": "k"},
    {"id": "2", "prompt": "q"},
)


def lines_file(pick: Any, rows: Any) -> bytes:
    """JSON lines, a JSON list, or a table, of spoiled rows."""
    rows = spoiled(pick, list(rows))
    kind = pick.number(0, 3)
    if kind <= 1 and isinstance(rows, list):
        text = "\n".join(json.dumps(row) for row in rows)
    elif kind == 2 and isinstance(rows, list) and rows and isinstance(rows[0], dict):
        names = list(map(str, rows[0]))
        cells = [[str(v)[:300] for v in r.values()] for r in rows if isinstance(r, dict)]
        text = "\n".join("\t".join(row) for row in [names, *cells])
    else:
        text = json.dumps({"logs": rows} if pick.number(0, 1) else rows)
    raw = text.encode("utf-8", "surrogatepass")
    more = (*_JSON, b"\t", b"\n", b'"', b"[{[]:1}]", b"[" * 400, b"(" * 400)
    return scrambled(pick, raw, more) if pick.number(0, 1) else raw


# --- readers -----------------------------------------------------------------------------------


def _read_metas(metas: Any, file: Path) -> None:
    size = file.stat().st_size
    for meta in metas:
        assert meta.offset >= 0 and meta.offset + meta.nbytes <= size, "outside of the file"
    names = {meta.name: meta for meta in metas}
    with Checkpoint("x", file.parent, {}, names, (file,)) as checkpoint:
        for meta in metas[:4]:
            if is_known(meta.dtype):
                checkpoint.read_tensor(meta.name)


def run_safetensors(folder: Path, data: bytes) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(data)
    _read_metas(read_safetensors_header(file), file)


def run_pickle(folder: Path, data: bytes) -> None:
    file = folder / "pytorch_model.bin"
    file.write_bytes(data)
    _read_metas(read_pickle_header(file), file)


def run_index(folder: Path, data: bytes) -> None:
    half = len(tensors()) // 2
    if not (folder / "config.json").is_file():
        (folder / "config.json").write_text(json.dumps(CONFIG))
        for number, part in enumerate((slice(half), slice(half, None))):
            some = dict(list(tensors().items())[part])
            (folder / f"model-{number}.safetensors").write_bytes(to_safetensors(some))
    (folder / "model.safetensors.index.json").write_bytes(data)
    with Checkpoint.open(folder) as checkpoint:
        json.dumps(summarize(checkpoint))


def index() -> dict[str, Any]:
    half = len(tensors()) // 2
    files = {n: f"model-{int(i >= half)}.safetensors" for i, n in enumerate(tensors())}
    return {"metadata": {"total_size": 1}, "weight_map": files}


def run_config(folder: Path, data: bytes) -> None:
    if not (folder / "model.safetensors").is_file():
        (folder / "model.safetensors").write_bytes(model_bytes())
    (folder / "config.json").write_bytes(data)
    with Checkpoint.open(folder) as checkpoint:
        summarize(checkpoint)


def run_names(folder: Path, data: bytes) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, "architectures": None}))
    (folder / "model.safetensors").write_bytes(data)
    with Checkpoint.open(folder) as checkpoint:
        summarize(checkpoint)


def names_file(pick: Any) -> bytes:
    """A sound file with strange names."""
    header, body = split_header(model_bytes())
    for _ in range(pick.number(1, 4)):
        name = one_of(pick, list(header))
        new = one_of(
            pick, (*TEXTS, "model.layers.5.x", "model.layers.00.x", "visual.", "model.norm")
        )
        new = name.replace(one_of(pick, ("0", "model", "layers", ".", "weight")), new[:50])
        header[new or "x"] = header.pop(name)
    return with_header(json.dumps(header).encode(), body)


def run_adapter(folder: Path, data: bytes) -> None:
    base, adapter = folder / "base", folder / "adapter"
    if not base.is_dir():
        write_model(base)
        adapter.mkdir()
        (adapter / "adapter_model.safetensors").write_bytes(adapter_bytes())
    (adapter / "adapter_config.json").write_bytes(data)
    _adapted(base, adapter)


def run_adapter_weights(folder: Path, data: bytes) -> None:
    base, adapter = folder / "base", folder / "adapter"
    if not base.is_dir():
        write_model(base)
        adapter.mkdir()
        (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    (adapter / "adapter_model.safetensors").write_bytes(data)
    _adapted(base, adapter)


def _adapted(base: Path, adapter: Path) -> None:
    opened = Adapter.open(adapter)
    with Checkpoint.open(base) as under:
        names = {name: name for name in opened.changes if name in under.tensors}
        opened.changes = {name: opened.changes[name] for name in names}
        with AdaptedCheckpoint(under, opened, names) as adapted:
            for name in names:
                adapted.read_tensor(name)
                adapted.factors(name)


def run_recipe(folder: Path, data: bytes) -> None:
    file = folder / "recipe.yaml"
    file.write_bytes(data)
    json.dumps(load_recipe(file).model_dump(mode="json"))


def run_mergekit(folder: Path, data: bytes) -> None:
    file = folder / "mergekit.yaml"
    file.write_bytes(data)
    model = folder / "m"
    if not model.is_dir():
        write_model(model)
        for other in ("two", "one"):
            (folder / other).mkdir()
            (folder / other / "config.json").write_text('{"num_hidden_layers": 4}')
    here = Path.cwd()
    os.chdir(folder)
    try:
        yaml.safe_dump(convert_file(file).recipe)
    finally:
        os.chdir(here)


def run_layout(folder: Path, data: bytes) -> None:
    file = folder / "layout.yaml"
    file.write_bytes(data)
    slot_map(list(tensors()), "x", read_layouts(file))


def run_tokenizer(folder: Path, data: bytes) -> None:
    _tokens(folder, "tokenizer.json", data)


def run_vocabulary(folder: Path, data: bytes) -> None:
    _tokens(folder, "vocab.json", data)


def run_sentencepiece(folder: Path, data: bytes) -> None:
    _tokens(folder, "tokenizer.model", data)


def _tokens(folder: Path, name: str, data: bytes) -> None:
    sound, spoilt = folder / "sound", folder / "spoilt"
    if not sound.is_dir():
        sound.mkdir()
        spoilt.mkdir()
        (sound / "tokenizer.json").write_text(json.dumps(TOKENIZER))
        (spoilt / "added_tokens.json").write_text('{"<s>": 9}')
    (spoilt / name).write_bytes(data)
    token_ids(spoilt)
    shared_rows(sound, spoilt)
    vocabulary_difference(sound, spoilt)


def run_log(folder: Path, data: bytes) -> None:
    file = folder / "log.jsonl"
    file.write_bytes(data)
    read_log(file)


def run_prompts(folder: Path, data: bytes) -> None:
    file = folder / "prompts"
    file.write_bytes(data)
    read_prompts(file, media=folder / "media")


MANIFEST: dict[str, Any] = {
    "format": 1,
    "recipe": {"method": "linear", "models": ["one"], "parameters": {}},
    "seed": 0,
    "forced": [],
    "inputs": {"target": {"reference": "x", "files": [{"name": "f", "bytes": 1}]}},
    "counts": {"linear": 1, "kept": 0},
    "files": {"config.json": "00"},
    "key": "k",
    "tensors": {"a": {"sources": [["a"]]}},
}


def run_manifest(folder: Path, data: bytes) -> None:
    if not (folder / "config.json").is_file():
        write_model(folder)
    (folder / "merge_manifest.json").write_bytes(data)
    json.dumps([check.to_dict() for check in verify(folder, deep=True, tensors=1)])


def run_journal(folder: Path, data: bytes) -> None:
    file = folder / "journal"
    file.write_bytes(data)
    _, ranges = read_journal(file)
    for shard in ranges:
        for start, stop in shard:
            assert type(start) is type(stop) is int and 0 <= start <= stop


@dataclass(frozen=True)
class Target:
    """One reader and the files it is given.

    Those whose files name checkpoints may look for the config.json of each, wherever it is.
    """

    build: Callable[[Any], bytes]
    run: Callable[[Path, bytes], None]
    names_checkpoints: bool = False


TARGETS: dict[str, Target] = {
    "safetensors": Target(lambda p: safetensors_file(p, model_bytes()), run_safetensors),
    "index": Target(lambda p: as_json(p, index()), run_index),
    "config": Target(lambda p: as_json(p, CONFIG), run_config),
    "names": Target(names_file, run_names),
    "pickle": Target(pickle_file, run_pickle),
    "adapter_config": Target(lambda p: as_json(p, ADAPTER), run_adapter),
    "adapter_weights": Target(lambda p: safetensors_file(p, adapter_bytes()), run_adapter_weights),
    "recipe": Target(lambda p: as_yaml(p, RECIPE), run_recipe),
    "mergekit": Target(lambda p: as_yaml(p, one_of(p, MERGEKIT)), run_mergekit, True),
    "layout": Target(lambda p: as_yaml(p, one_of(p, (LAYOUT, STACKS))), run_layout),
    "tokenizer": Target(lambda p: as_json(p, one_of(p, (TOKENIZER, UNIGRAM))), run_tokenizer),
    "vocabulary": Target(lambda p: as_json(p, {"a": 0, "b": 1, "é": 2}), run_vocabulary),
    "sentencepiece": Target(lambda p: scrambled(p, sentencepiece()), run_sentencepiece),
    "log": Target(lambda p: lines_file(p, one_of(p, LOGS)), run_log),
    "prompts": Target(lambda p: lines_file(p, PROMPTS), run_prompts),
    "manifest": Target(lambda p: as_json(p, MANIFEST), run_manifest, True),
    "journal": Target(
        lambda p: scrambled(p, b'{"merge":"k"}\n[[[0,5]]]\n[[[0,9]]]\n', _JSON), run_journal
    ),
}


# --- the promise -------------------------------------------------------------------------------


class HangError(BaseException):
    """A reader took too long; not an Exception, so that no reader catches it."""


_FORBIDDEN = (
    "os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "socket.connect",
    "socket.bind", "os.remove", "os.rmdir", "shutil.rmtree", "os.chmod", "pty.spawn", "os.symlink",
)  # fmt: skip
_INSTALLED = tuple(
    {
        str(Path(place).resolve())
        for place in (
            *sysconfig.get_paths().values(), sys.prefix, sys.base_prefix, torch.__path__[0],
            str(Path(torch.__path__[0]).parent), omnimerge.__path__[0], "/proc", "/sys",
            "/dev/null", "/etc/localtime", "/usr/share/zoneinfo",
        )
    }
)  # fmt: skip
_watched: list[tuple[str, str]] | None = None
_hooked = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched is None:
        return
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        _watched.append((event, str(Path(os.fsdecode(arguments[0])).absolute())))
    elif event in _FORBIDDEN:
        _watched.append((event, repr(arguments)[:200]))


@contextlib.contextmanager
def watched(folder: Path, *, configs: bool = False) -> Iterator[None]:
    """Refuse, when the block is over, whatever it opened outside of a folder, ran or deleted."""
    global _watched, _hooked
    if not _hooked:
        sys.addaudithook(_hook)
        _hooked = True
    _watched = seen = []
    try:
        yield
    finally:
        _watched = None
    inside = str(folder.resolve())
    for event, where in seen:
        if event != "open":
            raise AssertionError(f"{event} {where}")
        if configs and where.endswith("/config.json"):
            continue
        real = str(Path(where).resolve())
        if not real.startswith((inside, *_INSTALLED)) and not _is_search(where):
            raise AssertionError(f"opened {where}, outside of {inside}")


def _is_search(where: str) -> bool:
    """Whether Python looked for a module or a line of its source."""
    return where.endswith((".py", ".pyc", ".so"))


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise `HangError` in the block when the time is over (main thread only)."""

    def ring(*_: object) -> None:
        raise HangError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check_message(error: OmnimergeError) -> None:
    """Refuse a message that is no printable line (of a conversion: several)."""
    lines = str(error).split("\n") if isinstance(error, ConversionError) else [str(error)]
    for line in lines:
        bad = [character for character in line if not character.isprintable()]
        assert not bad, f"{type(error).__name__} shows {bad[0]!r}"
    assert len(str(error)) < 200_000, "a message of that length is none"


def examine(name: str, folder: Path, data: bytes) -> str:
    """Hold a reader to the promise; return `read`, or the kind of the error that it raised."""
    target = TARGETS[name]
    try:
        with watched(folder, configs=target.names_checkpoints), deadline(SECONDS):
            target.run(folder, data)
    except OmnimergeError as error:
        check_message(error)
        return type(error).__name__
    return "read"


def timed(name: str, folder: Path, data: bytes) -> tuple[str, float]:
    start = time.perf_counter()
    return examine(name, folder, data), time.perf_counter() - start

"""Every reader, on files with something wrong: a result or an `OmnimergeError`, nothing else.

`soak.py` does the same for as long as one likes.
"""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import hostile
import pytest
import soaking
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

EXAMPLES = 30


@st.composite
def files(draw, name):
    return hostile.TARGETS[name].build(hostile.Drawn(draw))


def promise(name, folder, data):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch and zipfile warn of what is wrong
        hostile.examine(name, folder, data)


@pytest.mark.parametrize("name", hostile.TARGETS)
def test_spoiled_files(name, tmp_path):
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(files(name))
    def run(data):
        promise(name, tmp_path, data)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run()


@pytest.mark.parametrize("name", hostile.TARGETS)
def test_any_bytes(name, tmp_path):
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.binary(max_size=300))
    @example(b"")
    @example(b"[" * 50_000)
    @example(b"{" * 50_000)
    @example(b'{"a":' * 50_000)
    @example(b"\xff\xfe\x00")
    @example(b"\x00" * 4096)
    @example(b"9" * 5000)
    def run(data):
        promise(name, tmp_path, data)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run()


@pytest.mark.parametrize("name", hostile.TARGETS)
def test_spoiled_at_random(name, tmp_path):
    """Larger changes than those that hypothesis begins with."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(EXAMPLES):
            promise(name, tmp_path, hostile.TARGETS[name].build(hostile.Pick(seed)))


@soaking.campaign
def test_campaign():
    minutes, kept = os.environ.get("OMNIMERGE_MINUTES", "60"), soaking.results("fuzz.json")
    script = Path(__file__).with_name("soak.py")
    command = [sys.executable, script, "--minutes", minutes, "--out", kept]
    subprocess.run(command, check=True)
    found = json.loads(kept.read_text())
    assert found["targets"].keys() >= hostile.TARGETS.keys()
    assert found["findings"] == 0 and found["cases"] > 0


def test_the_harness_sees_what_it_is_there_to_see(tmp_path, monkeypatch):
    def target(run):
        monkeypatch.setitem(hostile.TARGETS, "probe", hostile.Target(lambda pick: b"", run))

    def examine():
        return hostile.examine("probe", tmp_path, b"")

    target(lambda folder, data: None)
    assert examine() == "read"
    outside = tmp_path.parent / "outside"
    outside.write_text("")
    target(lambda folder, data: outside.read_text())
    with pytest.raises(AssertionError, match="outside of"):
        examine()
    target(lambda folder, data: outside.unlink())
    with pytest.raises(AssertionError, match=r"os\.remove"):
        examine()

    def endless(folder, data):
        while True:
            pass

    target(endless)
    monkeypatch.setattr(hostile, "SECONDS", 0.1)
    with pytest.raises(hostile.HangError):
        examine()


def test_seeds_are_read(tmp_path):
    """What is spoiled is sound to begin with; else only first checks would be tried."""
    import yaml

    sound = {
        "safetensors": hostile.model_bytes(),
        "index": json.dumps(hostile.index()).encode(),
        "config": json.dumps(hostile.CONFIG).encode(),
        "names": hostile.model_bytes(),
        "pickle": hostile.pickle_seeds()[0],
        "adapter_config": json.dumps(hostile.ADAPTER).encode(),
        "adapter_weights": hostile.adapter_bytes(),
        "recipe": yaml.dump(hostile.RECIPE).encode(),
        "layout": yaml.dump(hostile.LAYOUT).encode(),
        "tokenizer": json.dumps(hostile.TOKENIZER).encode(),
        "vocabulary": b'{"a": 0}',
        "sentencepiece": hostile.sentencepiece(),
        "log": json.dumps(hostile.LOGS[0]).encode(),
        "prompts": json.dumps(hostile.PROMPTS[1]).encode(),
        "manifest": json.dumps(hostile.MANIFEST).encode(),
        "journal": b'{"merge":"k"}\n',
    }
    for name, data in sound.items():
        folder = tmp_path / name
        folder.mkdir()
        assert hostile.examine(name, folder, data) == "read", name
    for number, config in enumerate(hostile.MERGEKIT):
        (tmp_path / f"m{number}").mkdir()
        found = hostile.examine("mergekit", tmp_path / f"m{number}", yaml.dump(config).encode())
        assert found in ("read", "ConversionError")
    assert found == "read"

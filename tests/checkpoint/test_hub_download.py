"""Checkpoints from the Hub, through the real client, from a stand-in server."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from omnimerge.checkpoint import Checkpoint, locate
from omnimerge.checkpoint.hub import commit_of, license_of, pinned
from omnimerge.errors import CheckpointError

NAME = "acme/tiny"


@pytest.fixture
def sharded(checkpoints):
    """A checkpoint of several files."""
    return checkpoints("qwen2_vl", shard="60KB")


@pytest.fixture
def repo(hub, sharded):
    return hub.add(NAME, sharded)


def why(reference=NAME):
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(reference)
    message = str(error.value)
    assert "\n" not in message
    return message


def failing(text):
    return f"{NAME!r} is no local folder, and the Hub did not give it: {text}"


def shards(folder):
    return sorted(file.name for file in Path(folder).glob("*.safetensors"))


def test_a_sharded_checkpoint_is_the_same_as_its_folder(hub, repo, sharded):
    ours, theirs = Checkpoint.open(NAME), Checkpoint.open(sharded)
    assert len(ours.files) == len(shards(sharded)) >= 3
    assert ours.config == theirs.config and list(ours.tensors) == list(theirs.tensors)
    for name in theirs.tensors:
        assert torch.equal(ours.read_tensor(name), theirs.read_tensor(name))
    assert ours.reference == NAME and commit_of(ours.folder) == repo.refs["main"]
    asked = len(hub.requests)
    locate(f"{NAME}@{repo.refs['main']}")
    assert len(hub.requests) == asked  # a commit that is there needs no network


def test_only_what_is_read_is_downloaded(hub, sharded, tmp_path):
    repo = hub.add(NAME, sharded)
    extra = {
        "consolidated.safetensors": b"x",
        "optimizer.pt": b"x",
        "checkpoint-5/config.json": b"{}",
        "checkpoint-5/model.safetensors": b"x",
        "onnx/model.safetensors": b"x",
        "pytorch_model.bin": b"x",
        "LICENSE": b"as you like",
    }
    repo.commit(repo.files | extra)
    folder = locate(NAME)
    assert shards(folder) == shards(sharded)
    assert (folder / "LICENSE").read_text() == "as you like"
    assert not [name for name in extra if name != "LICENSE" and (folder / name).exists()]


def test_an_older_repository_gives_its_pickle(hub, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    torch.save({"a": torch.arange(3.0)}, tmp_path / "pytorch_model.bin")
    torch.save({}, tmp_path / "training_args.bin")
    hub.add(NAME, tmp_path)
    found = Checkpoint.open(NAME)
    assert found.read("a").tolist() == [0.0, 1.0, 2.0]
    assert not (found.folder / "training_args.bin").exists()


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub, repo):
    first = repo.refs["main"]
    repo.refs["v1"] = first
    second = repo.commit(repo.files | {"note.txt": b"2"})
    assert commit_of(locate(NAME)) == second
    for reference in (f"{NAME}@v1", f"{NAME}@{first}"):
        folder = locate(reference)
        assert commit_of(folder) == first and not (folder / "note.txt").exists()
        assert pinned(reference, folder) == f"{NAME}@{first}"
    assert pinned(str(folder), folder) == str(folder)
    assert pinned("other/name", folder) == "other/name"


def test_a_broken_download_goes_on_where_it_broke(hub, repo, sharded, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 250)  # what it keeps is whole chunks
    size = (sharded / shards(sharded)[0]).stat().st_size
    hub.fail("GET /cdn", cut_after=1000, times=3)
    ours, theirs = Checkpoint.open(NAME), Checkpoint.open(sharded)
    assert all(torch.equal(ours.read_tensor(n), theirs.read_tensor(n)) for n in theirs.tensors)
    assert size > 1000 and hub.count(r"GET /cdn.*bytes=1000-") >= 1
    assert hub.count(r"GET /cdn.*bytes=\d+-\]") == 3


def test_a_download_that_breaks_for_good_keeps_the_files_that_are_complete(hub, repo, sharded):
    last = (sharded / shards(sharded)[-1]).read_bytes()
    import hashlib

    broken = f"GET /cdn/{hashlib.sha256(last).hexdigest()}"
    hub.fail(broken, cut_after=0)
    message = why()
    assert message.startswith(failing("no answer from http://127.0.0.1:"))
    assert message.endswith("try again later: what is complete is kept")
    hub.failures.clear()
    hub.requests.clear()
    assert Checkpoint.open(NAME).total_bytes() == Checkpoint.open(sharded).total_bytes()
    assert hub.count("GET /cdn") == 1


def test_a_missing_repository_with_and_without_a_token(hub, monkeypatch):
    assert why() == failing(
        "there is no such repository, or it is private; check the name, or log in with "
        "`hf auth login`, or set HF_TOKEN"
    )
    hub.tokens["hf_x"] = {"name": "me", "role": "read"}
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    assert "check the name, or use a token that may (log in with" in why()


def test_a_gated_repository_with_and_without_a_token(hub, sharded, monkeypatch):
    hub.add(NAME, sharded, gated=True)
    page = f"{hub.url}/{NAME}"
    assert why() == failing(
        f"it is gated; ask for access on {page}, then log in with `hf auth login`, or set HF_TOKEN"
    )
    hub.tokens["hf_x"] = {"name": "me", "role": "read"}
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    assert f"it is gated; ask for access on {page}, then use a token that may" in why()
    hub.tokens["hf_x"]["granted"] = "yes"
    assert Checkpoint.open(NAME).tensors


def test_a_token_that_is_no_longer_valid(hub, repo):
    message = {"X-Error-Message": "Invalid credentials in Authorization header"}
    hub.fail("/api/models", 401, headers=message)
    assert why() == failing(
        "it does not accept the token; log in again with `hf auth login`, or renew HF_TOKEN"
    )


def test_a_revision_that_is_not_there(hub, repo):
    message = why(f"{NAME}@v9")
    assert f"it has no revision 'v9'; {hub.url}/{NAME}/branches lists its branches" in message
    assert "has no revision" in why(f"{NAME}@{'0' * 40}")


def test_a_file_that_is_not_there(hub, sharded):
    repo = hub.add(NAME, sharded)
    files = dict(repo.files)
    gone = shards(sharded)[1]
    repo.commit({name: data for name, data in files.items() if name != gone})
    assert why() == failing(
        f"its model.safetensors.index.json names {gone}, which it lacks; give another revision, or "
        "tell its owner"
    )
    repo.commit({name: data for name, data in files.items() if name != "config.json"})
    assert why() == failing(
        "it has neither config.json nor adapter_config.json; is it a checkpoint?"
    )
    repo.commit({"config.json": b"{}"})
    assert "holds no weights" in why()


@pytest.mark.parametrize(
    ("status", "headers", "expected"),
    [
        (429, {}, "it limits the rate of requests (429); try again later"),
        (429, {"Retry-After": "30"}, "it limits the rate of requests (429); wait 30 s; try"),
        (500, {}, "it fails (500); try again later"),
        (503, {}, "it fails (503); try again later"),
        (403, {"X-Error-Message": "not\x1b[2Jyou"}, r"the token may not do that (not\x1b[2Jyou)"),
    ],
)
@pytest.mark.parametrize("where", ["/api/models", "(GET|HEAD) /acme", "GET /cdn"])
def test_a_hub_that_refuses(hub, repo, status, headers, expected, where):
    hub.fail(where, status, headers=headers)
    assert why().startswith(failing(expected))


def test_a_hub_that_stumbles_is_asked_again(hub, repo):
    hub.fail("GET /cdn", 429, headers={"Retry-After": "7"}, times=2)
    assert Checkpoint.open(NAME).tensors
    assert hub.waits == [8.0, 8.0]


def test_no_connection(hub, repo, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    assert why().startswith(failing("no answer from http://127.0.0.1:9 (ConnectError: "))


def test_a_server_that_is_no_hub(hub, repo):
    hub.fail("/api/models", 200, body="<html>log in to the wireless network</html>")
    assert why().startswith(failing(f"what {hub.url} answers is not the Hub's; look for a proxy"))


def test_offline_without_a_copy(hub, repo, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert why() == failing(
        "it is not in the local cache as a whole, and HF_HUB_OFFLINE forbids to download it; "
        "unset HF_HUB_OFFLINE, or give a folder"
    )
    assert hub.requests == []


def test_offline_with_a_copy(hub, repo, monkeypatch):
    before = Checkpoint.open(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    for reference in (NAME, f"{NAME}@main", f"{NAME}@{repo.refs['main']}"):
        assert Checkpoint.open(reference).folder == before.folder
    assert "HF_HUB_OFFLINE forbids" in why(f"{NAME}@v1")
    assert hub.requests == []


def test_offline_with_half_a_copy(hub, repo, sharded, monkeypatch):
    folder = locate(NAME)
    (folder / shards(sharded)[0]).unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "it is not in the local cache as a whole, and HF_HUB_OFFLINE forbids" in why()


def test_a_copy_stands_in_for_a_hub_that_is_down(hub, repo):
    commit = commit_of(locate(NAME))
    hub.fail("/api/models", 503)
    assert commit_of(locate(NAME)) == commit


def test_a_slip_in_a_path_does_not_reach_the_hub(hub, repo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "acme").mkdir()
    (tmp_path / "acme" / "tinny").mkdir()
    assert why() == (
        "there is no folder acme/tiny, did you mean 'tinny'? write acme/tiny@main if you mean the "
        "Hub's"
    )
    (tmp_path / "acme" / "tinny").rmdir()
    assert why().startswith("there is no folder acme/tiny; write acme/tiny@main if")
    assert hub.requests == []
    assert Checkpoint.open(f"{NAME}@main").tensors


@pytest.mark.parametrize("reference", ["a/b--c", "a/b..c", "a/-b", "a/" + "b" * 120])
def test_names_that_the_hub_does_not_have(hub, reference):
    assert "is no local folder, and the Hub did not give it" in why(reference)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: apache-2.0\ntags: [a]\n---\n", {"license": "apache-2.0"}),
        (
            '---\nlicense: "other"\nlicense_name: qwen\nlicense_link: https://x.y/L\n---\nhello',
            {"license": "other", "license_name": "qwen", "license_link": "https://x.y/L"},
        ),
        ("---\nlicense: [mit, bsd]\n---\n", {}),
        ("---\nlicense: &a\n  *a\n---\n", {}),
        ("---\nlicense_name: qwen\n---\n", {}),
        ("---\ntext\n---\nlicense: mit\n", {}),
        ("license: mit\n", {}),
        ("", {}),
        ("\xff\x00---", {}),
    ],
)
def test_the_license_of_a_card(tmp_path, text, expected):
    (tmp_path / "README.md").write_text(text, encoding="latin-1")
    assert license_of(tmp_path) == expected


def test_no_card_says_no_license(tmp_path):
    assert license_of(tmp_path) == {}
    (tmp_path / "config.json").write_text(json.dumps({}))
    assert license_of(tmp_path) == {} and commit_of(tmp_path) == ""

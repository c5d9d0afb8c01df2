"""Merges of what the Hub gives, and merges given to the Hub: manifest, card, `--push`, `push`."""

import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_adapters
import tiny_models
import yaml
from click.testing import CliRunner
from hub_server import Repo
from huggingface_hub import HfApi, ModelCard, constants

import omnimerge
from omnimerge.checkpoint import Checkpoint
from omnimerge.checkpoint.hub import push
from omnimerge.cli import main
from omnimerge.engine.verify import verify
from omnimerge.errors import OutputError

# The client's own way to PUT a file, which its HTTP library warns of.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
DONE = "pushed to {url}/me/merged/tree/{commit}"


def run(*arguments, code=0):
    result = CliRunner().invoke(main, [str(each) for each in arguments])
    assert result.exit_code == code, result.output + str(result.exception)
    return result.output


@pytest.fixture
def token(hub, monkeypatch):
    hub.tokens["hf_x"] = {"name": "me", "role": "write"}
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    return hub.tokens["hf_x"]


@pytest.fixture
def pair(hub, checkpoints):
    """Two repositories of which a merge can be made."""
    return (
        hub.add("acme/target", checkpoints("qwen2_vl", shard="60KB")),
        hub.add("acme/donor", checkpoints("llava_onevision")),
    )


@pytest.fixture
def recipe(checkpoints):
    return {
        "method": "adamms",
        "target": str(checkpoints("qwen2_vl", shard="60KB")),
        "models": [str(checkpoints("llava_onevision"))],
        "parameters": {"alpha": 0.25},
    }


@pytest.fixture
def options(recipe):
    """The same for the command line."""
    inputs = ["--target", recipe["target"], "--model", recipe["models"][0]]
    return ["--method", "adamms", *inputs, "--param", "alpha=0.25"]


@pytest.fixture
def merged(recipe, tmp_path):
    omnimerge.merge(recipe, tmp_path / "merged")
    return tmp_path / "merged"


def contents(folder):
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def pushed(repo):
    """What is in a repository, besides the file that the Hub puts there."""
    return {name: data for name, data in repo.files.items() if name != ".gitattributes"}


def manifest_of(folder):
    return json.loads((folder / "merge_manifest.json").read_text())


def test_the_manifest_pins_what_came_from_the_hub(hub, pair, tmp_path):
    old = [repo.refs["main"] for repo in pair]
    recipe = {
        "method": "linear",
        "target": "acme/target",
        "models": ["acme/target", "acme/donor@main"],
    }
    recipe |= {"select": "language_model", "parameters": {"weights": [0.5, 0.5]}}
    omnimerge.merge(recipe, tmp_path / "one")
    described = manifest_of(tmp_path / "one")
    assert described["inputs"]["target"]["reference"] == "acme/target"
    assert [each["revision"] for each in described["inputs"].values()] == [old[0], *old]
    assert described["recipe"]["target"] == f"acme/target@{old[0]}"
    models = [f"acme/target@{old[0]}", f"acme/donor@{old[1]}"]
    assert [entry["model"] for entry in described["recipe"]["models"]] == models

    for repo in pair:  # both move on, to files that cannot be merged
        repo.commit({"config.json": b"{}"})
    assert {check.state for check in verify(tmp_path / "one", deep=True)} == {"ok"}
    omnimerge.merge(described["recipe"], tmp_path / "two")
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert [name for name in one if one[name] != two[name]] == [
        name for name in one if name in ("README.md", "merge_manifest.json")
    ]
    assert manifest_of(tmp_path / "two")["key"] == described["key"]


def test_an_adapter_is_pinned_too(hub, checkpoints, tmp_path):
    base = checkpoints("qwen2_vl")
    hub.add("acme/base", base)
    tiny_adapters.save(tiny_models.load("qwen2_vl", base), tmp_path / "lora")
    commit = hub.add("acme/lora", tmp_path / "lora").refs["main"]
    recipe = {
        "method": "task_arithmetic",
        "base": "acme/base",
        "models": [{"adapter": "acme/lora"}],
    }
    omnimerge.merge(recipe, tmp_path / "out")
    described = manifest_of(tmp_path / "out")
    assert described["recipe"]["models"][0]["adapter"] == f"acme/lora@{commit}"
    assert described["inputs"]["models.0"]["adapter"] == {"revision": commit}
    front = ModelCard.load(tmp_path / "out" / "README.md").data
    assert front.base_model == ["acme/base", "acme/lora"]
    omnimerge.merge_as_adapter(recipe, tmp_path / "one-lora", 4)
    card = ModelCard.load(tmp_path / "one-lora" / "README.md")
    assert card.data.to_dict() == {
        "library_name": "peft",
        "tags": ["lora", "merge", "omnimerge"],
        "base_model": "acme/base",
        "base_model_relation": "adapter",
    }
    assert "`acme/base`, merged by the method `task_arithmetic`\nwith [omnimerge]" in card.text
    assert f"- adapter: acme/lora@{commit}\n" in card.text and "\nrank: 4\n" in card.text


def test_a_search_pins_what_it_chose(hub, answering_pair, tmp_path):
    commits = [
        hub.add(f"acme/{name}", folder).refs["main"]
        for name, folder in zip(("target", "donor"), answering_pair, strict=True)
    ]
    (tmp_path / "prompts.jsonl").write_text(
        "".join(f'{{"id": "{n}", "prompt": "a b {n}"}}\n' for n in range(4))
    )
    recipe = {"method": "adamms", "target": "acme/target", "models": ["acme/donor@main"]}
    omnimerge.search(
        recipe, tmp_path / "prompts.jsonl", tmp_path / "out", grid="0:1:0.5", max_new_tokens=2
    )
    chosen = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert chosen["target"] == f"acme/target@{commits[0]}"
    assert chosen["models"] == [{"model": f"acme/donor@{commits[1]}"}]
    assert chosen["parameters"] == {"alpha": 0.5}


def test_a_merge_of_folders_needs_no_network(recipe, tmp_path, monkeypatch):
    def refuse(*arguments):
        raise AssertionError(f"the network was asked for: {arguments}")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    omnimerge.merge(recipe, tmp_path / "out")
    assert {check.state for check in verify(tmp_path / "out", deep=True)} == {"ok"}
    assert "revision" not in manifest_of(tmp_path / "out")["inputs"]["target"]


@pytest.mark.parametrize(
    ("licenses", "expected"),
    [(("mit", "mit"), "mit"), (("mit", "apache-2.0"), None), (("mit", ""), None)],
)
def test_the_card_is_what_the_hub_expects(hub, pair, tmp_path, licenses, expected):
    for repo, name in zip(pair, licenses, strict=True):
        card = f"---\nlicense: {name}\n---\n# A <b>model</b>\n".encode() if name else b"# A model\n"
        repo.commit(repo.files | {"README.md": card})
    recipe = {"method": "adamms", "target": "acme/target", "models": ["acme/donor"]}
    recipe["parameters"] = {"alpha": 0.5}
    omnimerge.merge(recipe, tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    data = card.data.to_dict()
    assert data.pop("license", None) == expected
    assert data == {
        "library_name": "transformers",
        "tags": ["merge", "omnimerge"],
        "base_model": ["acme/target", "acme/donor"],
        "base_model_relation": "merge",
    }
    commit = pair[1].refs["main"]
    assert f"| acme/donor | {commit} | {licenses[1] or '-'} |" in card.text
    assert f"model: acme/donor@{commit}" in card.text
    assert (tmp_path / "out" / "README.target.md").read_bytes() == pair[0].files["README.md"]


def test_push_gives_the_hub_the_folder(hub, token, merged):
    said = run("push", merged, "me/merged")
    repo = hub.repos["me/merged"]
    assert said.strip() == DONE.format(url=hub.url, commit=repo.refs["main"])
    assert pushed(repo) == contents(merged) and not repo.private
    assert repo.messages == ["initial", "Merged with omnimerge"]
    assert Checkpoint.open("me/merged").total_bytes() == Checkpoint.open(merged).total_bytes()

    hub.requests.clear()
    run("push", merged, "me/merged")  # nothing has changed
    assert hub.count("PUT /lfs") == 0 and len(repo.commits) == 2


def test_merge_and_push(hub, token, options, tmp_path):
    out = tmp_path / "out"
    said = run("merge", *options, "-o", out, "--push", "me/merged", "--private")
    repo = hub.repos["me/merged"]
    assert repo.private and pushed(repo) == contents(out)
    assert said.splitlines()[-1] == DONE.format(url=hub.url, commit=repo.refs["main"])
    hub.repos.clear()
    again = run("merge", *options, "-o", out, "--resume", "--push", "me/merged")
    assert "is complete already" in again and pushed(hub.repos["me/merged"]) == contents(out)


def test_an_adapter_is_pushed_too(hub, token, checkpoints, tmp_path):
    base = checkpoints("qwen2_vl")
    commit = hub.add("acme/base", base).refs["main"]
    tiny_adapters.save(tiny_models.load("qwen2_vl", base), tmp_path / "lora")
    options = ["--method", "task_arithmetic", "--base", "acme/base", "--adapter", tmp_path / "lora"]
    run("merge", *options, "--as-adapter", 8, "-o", tmp_path / "out", "--push", "me/lora")
    assert pushed(hub.repos["me/lora"]) == contents(tmp_path / "out")
    assert "adapter_model.safetensors" in hub.repos["me/lora"].files
    config = json.loads(hub.repos["me/lora"].files["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("acme/base", commit)


def test_weights_of_an_earlier_model_are_gone_after_a_push(hub, token, merged):
    hub.repos["me/merged"] = Repo()
    stale = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    kept = {"notes.txt": b"mine", "other/model.safetensors": b"mine"}
    hub.repos["me/merged"].commit(dict.fromkeys(stale, b"old") | kept)
    push(merged, "me/merged")
    assert pushed(hub.repos["me/merged"]) == contents(merged) | kept
    assert len(hub.repos["me/merged"].commits) == 2


@pytest.mark.parametrize(
    ("pattern", "status", "reason"),
    [
        ("POST /api/repos/create", 503, "it fails (503); try again later"),
        ("GET .*tree", 500, "it fails (500); try again later"),
        ("POST /api/validate-yaml", 500, "what http://127.0.0.1"),
        ("POST .*preupload", 504, "it fails (504); try again later"),
        ("POST .*batch", 429, "it limits the rate of requests (429); try again later"),
        ("PUT /lfs", 503, "it fails (503); try again later"),
        ("POST .*/commit/", 500, "it fails (500); try again later"),
    ],
)
def test_a_push_that_fails_in_the_middle(hub, token, options, tmp_path, pattern, status, reason):
    out = tmp_path / "out"
    hub.fail(pattern, status)
    said = run("merge", *options, "-o", out, "--push", "me/merged", "--private", code=1)
    assert f"Error: {out} is complete, and was not pushed to 'me/merged': {reason}" in said
    again = f"omnimerge push {out} me/merged --private"
    assert said.endswith(f"; push it again with `{again}`\n")
    assert {check.state for check in verify(out)} == {"ok"}
    assert not any(pushed(repo) for repo in hub.repos.values())

    hub.failures.clear()
    run(*shlex.split(again)[1:])
    assert pushed(hub.repos["me/merged"]) == contents(out) and hub.repos["me/merged"].private


def test_what_was_uploaded_before_a_failure_is_not_uploaded_again(hub, token, merged):
    weights = [name for name in contents(merged) if name.endswith(".safetensors")]
    assert len(weights) >= 3
    hub.fail("POST .*/commit/", 500, times=1)
    with pytest.raises(OutputError):
        push(merged, "me/merged")
    assert hub.count("PUT /lfs") == len(weights)
    push(merged, "me/merged")
    assert hub.count("PUT /lfs") == len(weights)


def test_a_repository_without_a_name_is_refused_before_the_merge(options, tmp_path):
    said = run("merge", *options, "-o", tmp_path / "out", "--push", "", code=1)
    assert "cannot push to '': give owner/name" in said
    assert not (tmp_path / "out").exists()


def test_a_push_that_is_interrupted(hub, token, options, tmp_path, monkeypatch):
    def interrupt(*arguments, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(HfApi, "create_commit", interrupt)
    out = tmp_path / "out"
    said = run("merge", *options, "-o", out, "--push", "me/merged", code=130)
    again = f"The folder is complete; push it again with `omnimerge push {out} me/merged`."
    assert said.endswith(f"Interrupted. {again}\n")


@pytest.mark.parametrize(
    ("role", "offline", "repo", "reason"),
    [
        ("", False, "me/merged", "there is no token; log in with `hf auth login`, or set HF_TOKEN"),
        ("read", False, "me/merged", "the token may only read; log in with one that may write"),
        ("wrong", False, "me/merged", "it does not accept the token; log in again with"),
        ("write", True, "me/merged", "HF_HUB_OFFLINE forbids the network; unset it"),
        ("write", False, "merged", "give owner/name, without a revision"),
        ("write", False, "me/merged@main", "give owner/name, without a revision"),
    ],
)
def test_what_cannot_be_pushed_is_refused_before_the_merge(
    hub, options, tmp_path, monkeypatch, role, offline, repo, reason
):
    if role:
        monkeypatch.setenv("HF_TOKEN", "hf_x")
    if role != "wrong":
        hub.tokens["hf_x"] = {"name": "me", "role": role}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    said = run("merge", *options, "-o", tmp_path / "out", "--push", repo, code=1)
    assert said.startswith(f"Error: cannot push to {repo!r}: {reason}") and said.count("\n") == 1
    assert not (tmp_path / "out").exists() and not hub.repos


def test_private_is_for_push(options, tmp_path):
    said = run("merge", *options, "-o", tmp_path / "out", "--private", code=2)
    assert "--private is for --push REPO" in said


def test_no_permission(hub, token, merged):
    said = run("push", merged, "them/merged", code=1)
    assert "was not pushed to 'them/merged': the token may not do that (You don't have the " in said
    assert 'under the namespace "them"' in said and "them/merged" not in hub.repos


def test_private_refuses_a_public_repository(hub, token, merged):
    hub.repos["me/merged"] = Repo()
    hub.repos["me/merged"].commit({})
    said = run("push", merged, "me/merged", "--private", code=1)
    assert said == (
        f"Error: {merged} is complete, and was not pushed to 'me/merged': it exists and is public; "
        "make it private in its settings, or give another name\n"
    )
    assert hub.repos["me/merged"].files == {}


def test_only_a_complete_merge_is_pushed(hub, token, merged, tmp_path):
    assert "is no merged checkpoint" in run("push", tmp_path, "me/merged", code=1)
    shard = next(merged.glob("*.safetensors"))
    shard.unlink()
    said = run("push", merged, "me/merged", code=1)
    assert said == f"Error: {merged} lacks {shard.name}, which its manifest names; merge again\n"
    assert hub.requests == []


def test_a_link_out_of_the_folder_is_not_pushed(hub, token, merged, tmp_path):
    (tmp_path / "key").write_text("secret")
    (merged / "notes.txt").symlink_to(tmp_path / "key")
    said = run("push", merged, "me/merged", code=1)
    assert "notes.txt is a link that leaves its folder" in said and hub.requests == []


def test_the_command_itself_with_the_environment_a_user_sets(hub, pair, token, tmp_path):
    """A process of its own: HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE, nothing patched."""
    kept = ("PATH", "PYTHONPATH", "LANG", "OMP_NUM_THREADS", "VIRTUAL_ENV", "HF_TOKEN", "NO_PROXY")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    environment |= {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",  # the stand-in has no chunk store
        "PYTHONPATH": str(Path(omnimerge.__file__).parents[1]),
    }

    def call(*command, **more):
        command = [sys.executable, "-m", "omnimerge", *command]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=environment | more
        )

    inputs = ["--target", "acme/target", "--model", "acme/donor", "--param", "alpha=0.5"]
    done = call("merge", "--method", "adamms", *inputs, "-o", "out", "--push", "me/merged")
    assert done.returncode == 0, done.stderr
    assert f"pushed to {hub.url}/me/merged/tree/" in done.stdout
    assert pushed(hub.repos["me/merged"]) == contents(tmp_path / "out")
    done = call("inspect", "acme/other", HF_HUB_OFFLINE="1")
    assert done.returncode == 1 and "HF_HUB_OFFLINE forbids to download it" in done.stderr
    assert done.stderr.count("\n") == 1

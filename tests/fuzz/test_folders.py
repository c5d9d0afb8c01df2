"""A pipe, a link that leads away, or a file without end, where a folder has a small file."""

import contextlib
import json
import os
import shutil

import hostile
import pytest
from small_merge import recipe_of

import omnimerge
from omnimerge.arch.vocabulary import token_ids
from omnimerge.checkpoint import hub
from omnimerge.checkpoint.small_file import check_small_files
from omnimerge.checkpoint.staging import manifest_key
from omnimerge.engine.manifest import manifest
from omnimerge.engine.verify import verify
from omnimerge.errors import CheckpointError, OutputError, PromptError
from omnimerge.generate.loading import load_model
from omnimerge.generate.prompts import read_prompts

CARD = "---\nlicense: mit\n---\n"


@pytest.fixture
def recipe(checkpoints, tmp_path):
    """The small pair; the donor is a copy that a test may spoil."""
    donor = tmp_path / "donor"
    shutil.copytree(checkpoints("llava_onevision"), donor)
    return {**recipe_of(checkpoints), "models": [str(donor)]}


def spoil(file, how, secret="x", outside=None):
    """Put something odd in a file's place, and where a link leads what it is to keep."""
    outside = outside or file.parent.parent / "outside"
    file.unlink(missing_ok=True)
    if how == "pipe":
        os.mkfifo(file)
    elif how == "link":
        outside.write_text(secret)
        file.symlink_to(outside)
    else:
        with file.open("wb") as stream:
            stream.truncate(500_000_001)  # takes nothing on the disk


@pytest.mark.parametrize("how", ["pipe", "link"])
def test_the_card_of_an_input(recipe, tmp_path, how):
    spoil(tmp_path / "donor" / "README.md", how, CARD)
    with hostile.deadline(60):
        omnimerge.merge(recipe, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "merge_manifest.json").read_text())
    assert "license" not in written["inputs"]["models.0"]


def test_cards_that_are_read(recipe, tmp_path):
    card = tmp_path / "donor" / "README.md"
    card.write_bytes(CARD.replace("\n", "\r\n").encode())
    assert manifest(omnimerge.plan(recipe))["inputs"]["models.0"]["license"] == {"license": "mit"}
    card.rename(card.with_name("card"))
    card.symlink_to("card")
    assert hub.license_of(card.parent) == {"license": "mit"}


@pytest.mark.parametrize("how", ["pipe", "link", "large"])
def test_the_manifest_of_an_output(tmp_path, recipe, how):
    out = hostile.write_model(tmp_path / "out")
    spoil(out / "merge_manifest.json", how, json.dumps({**hostile.MANIFEST, "key": "k"}))
    with hostile.deadline(20):
        assert manifest_key(out) == ""
        with pytest.raises(OutputError, match="is no merged checkpoint"):
            verify(out)
        with pytest.raises(OutputError, match="is no merged checkpoint"):
            hub.push(out, "me/model")
        with pytest.raises(OutputError, match="exists"):
            omnimerge.merge(recipe, out, resume=True)


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "tokenizer.model"])
@pytest.mark.parametrize(
    ("how", "why"),
    [("link", "is a link that leaves"), ("large", "more than 500,000,000 bytes"), ("pipe", "")],
)
def test_tokenizers(tmp_path, name, how, why):
    folder = tmp_path / "model"
    folder.mkdir()
    spoil(folder / name, how, "{}")
    refused = pytest.raises(CheckpointError, match=why) if why else contextlib.nullcontext()
    with hostile.deadline(20), refused:
        assert token_ids(folder) is None


def test_added_tokens(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "vocab.json").write_text('{"a": 0}')
    spoil(folder / "added_tokens.json", "link", '{"b": 1}')
    with pytest.raises(CheckpointError, match="is a link that leaves"):
        token_ids(folder)


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("link", "is a link that leaves its folder"),
        ("large", "more than 500,000,000 bytes"),
        ("pipe", "is no regular file"),
    ],
)
def test_files_in_subfolders_before_another_library_opens_them(tmp_path, how, why):
    folder = tmp_path / "model"
    file = folder / "additional_chat_templates" / "x.jinja"
    file.parent.mkdir(parents=True)
    (folder / "chat_template.jinja").write_text("hello")
    file.symlink_to("../chat_template.jinja")  # leaves the subfolder alone
    check_small_files(folder)
    spoil(file, how, outside=tmp_path / "outside")
    with hostile.deadline(20), pytest.raises(CheckpointError, match=f"x.jinja.* {why}"):
        check_small_files(folder)


def test_subfolders_that_are_links(tmp_path):
    folder, outside = tmp_path / "model", tmp_path / "outside"
    (folder / "templates").mkdir(parents=True)
    outside.mkdir()
    (folder / "within").symlink_to("templates")
    check_small_files(folder)
    (folder / "additional_chat_templates").symlink_to(outside)
    with pytest.raises(CheckpointError, match="_templates is a link that leaves its folder"):
        check_small_files(folder)


def test_the_templates_of_a_target(recipe, tmp_path):
    """A pipe among files that are copied is refused, and so is a link that leads away."""
    target = tmp_path / "target"
    shutil.copytree(recipe["target"], target)
    templates = target / "additional_chat_templates"
    templates.mkdir()
    (templates / "a.jinja").write_text("hello")
    recipe = {**recipe, "target": str(target)}
    with hostile.deadline(60):
        omnimerge.merge(recipe, tmp_path / "out")
        written = tmp_path / "out" / "additional_chat_templates"
        assert [file.name for file in written.iterdir()] == ["a.jinja"]
        assert {check.state for check in verify(tmp_path / "out")} == {"ok"}
        spoil(templates / "x.jinja", "pipe")
        with pytest.raises(CheckpointError, match=r"x\.jinja is no regular file and cannot be"):
            omnimerge.merge(recipe, tmp_path / "again")
        (templates / "x.jinja").unlink()
        spoil(templates / "x.jinja", "link", outside=tmp_path / "outside")
        with pytest.raises(CheckpointError, match=r"x\.jinja is a link that leaves its folder"):
            omnimerge.merge(recipe, tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("to", "why"),
    [
        ("templates", "is a link to another folder, which is not followed; put a copy of"),
        ("../outside", "is a link that leaves its folder, to .*outside; put the file itself there"),
    ],
)
def test_no_subfolder_of_a_target_is_lost(recipe, tmp_path, to, why):
    target = tmp_path / "target"
    shutil.copytree(recipe["target"], target)
    for folder in ("templates", "checkpoint-500", "../outside"):
        (target / folder).mkdir()
        (target / folder / "a.jinja").write_text("hello")
    (target / "latest").symlink_to("checkpoint-500")  # what training left
    recipe = {**recipe, "target": str(target)}
    omnimerge.merge(recipe, tmp_path / "out")
    assert [each.name for each in (tmp_path / "out").iterdir() if each.is_dir()] == ["templates"]
    (target / "additional_chat_templates").symlink_to(to)
    with pytest.raises(CheckpointError, match=rf"additional_chat_templates {why}"):
        omnimerge.merge(recipe, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_pipe_in_a_subfolder_of_a_model_that_answers(recipe, tmp_path):
    target = tmp_path / "target"
    shutil.copytree(recipe["target"], target)
    (target / "additional_chat_templates").mkdir()
    os.mkfifo(target / "additional_chat_templates" / "x.jinja")
    with hostile.deadline(60), pytest.raises(CheckpointError, match=r"x\.jinja: it is no regular"):
        load_model(target, device="cpu", dtype="auto", trust_remote_code=False)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"splits": ["a"]}'])
def test_the_splits_of_a_data_set(tmp_path, content):
    folder = tmp_path / "data"
    folder.mkdir()
    spoil(folder / "dataset_dict.json", "link", content)
    with pytest.raises(PromptError, match="cannot be read"):
        read_prompts(folder)

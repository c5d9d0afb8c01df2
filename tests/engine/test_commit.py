"""The last steps of a merge: what is on disk before the output gets its name, and what is kept."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_merge import files, recipe_of, run

import omnimerge
from omnimerge.checkpoint import CheckpointWriter, OutputTensor, journal, staging, writer
from omnimerge.engine.slices import SliceWorker
from omnimerge.errors import CheckpointError, InputChangedError, OutputError


@pytest.fixture
def recipe(checkpoints):
    return recipe_of(checkpoints, max_shard_size="60KB")


def failing(code):
    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    return fail


def test_every_file_is_on_disk_before_the_folder_gets_its_name(recipe, tmp_path, monkeypatch):
    seen, synced, fsync = [], set(), os.fsync
    rename = Path.rename

    def note(descriptor):
        synced.add(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    def renamed(self, to):
        inside = {str(p) for p in self.rglob("*")} | {str(self)}
        seen.append((self.name, inside - synced))
        return rename(self, to)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(Path, "rename", renamed)
    omnimerge.merge(recipe, tmp_path / "out")
    assert seen == [(".out.omnimerge", set())]
    assert str(tmp_path) in synced
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"config.json", "merge_manifest.json", "model.safetensors.index.json"} <= names


def test_every_file_is_on_disk_before_the_folder_takes_the_place_of_another(
    recipe, tmp_path, monkeypatch
):
    out, seen, synced, fsync, exchange = tmp_path / "out", [], set(), os.fsync, staging._renameat2
    omnimerge.merge({**recipe, "parameters": {"alpha": 0.1}}, out)

    def note(descriptor):
        synced.add(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    def exchanged(new, old):
        seen.append({str(p) for p in new.rglob("*")} | {str(new)})
        assert seen[0] <= synced
        synced.clear()
        exchange(new, old)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(staging, "_renameat2", exchanged)
    monkeypatch.setattr(staging, "_remove", lambda _: seen.append(set(synced)))
    omnimerge.merge(recipe, out, overwrite=True)
    assert len(seen[0]) > 5 and str(tmp_path) in seen[1]  # its name, before the other is removed


def test_a_mount_point_is_refused_before_any_work(recipe, tmp_path, monkeypatch):
    """Nothing can take its place, empty or not."""
    monkeypatch.setattr(SliceWorker, "compute", failing(errno.EPERM))
    monkeypatch.setattr("omnimerge.engine.build_plan", failing(errno.EPERM))
    with pytest.raises(OutputError, match=r"mounted at /proc, .*; give a folder in it, as /proc/"):
        omnimerge.merge(recipe, "/proc")
    (tmp_path / "link").symlink_to("/proc")
    for resume in (False, True):
        with pytest.raises(OutputError, match="a file system is mounted at"):
            omnimerge.merge(recipe, tmp_path / "link", resume=resume, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["link"]


def test_bytes_that_the_disk_lost_are_no_output(recipe, tmp_path, monkeypatch):
    """It says so once a descriptor: the sync of the commit succeeds after that of the journal."""
    monkeypatch.setattr(journal, "INTERVAL", 0.01)
    note, failed = journal.Journal.note, []

    def lossy(self):
        if (
            failed
            or len(self._written) == 0
            or not any(s.nbytes_done > 20_000 for s in self._shards)
        ):
            return note(self)
        failed.append(1)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", failing(errno.EIO))
            return note(self)

    monkeypatch.setattr(journal.Journal, "note", lossy)
    compute = SliceWorker.compute

    def slow(*arguments):
        omnimerge.engine.execute.threading.Event().wait(0.01)
        return compute(*arguments)

    monkeypatch.setattr(SliceWorker, "compute", slow)
    with pytest.raises(OutputError, match=r"cannot write .*Input/output error"):
        omnimerge.merge(recipe, tmp_path / "out")
    assert failed and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("place", "name", "code"),
    [
        (writer.CheckpointWriter, "write_index", errno.ENOSPC),
        (Path, "rename", errno.EACCES),
        (staging, "_sync_tree", errno.EIO),
    ],
)
def test_trouble_at_the_end_costs_nothing(recipe, tmp_path, monkeypatch, place, name, code):
    omnimerge.merge(recipe, tmp_path / "whole")
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(place, name, failing(code))
        with pytest.raises(OutputError, match=r"what is done is kept: go on with --resume"):
            omnimerge.merge(recipe, out)
    assert not out.exists()
    assert [each.resumable for each in staging.leftovers(out)] == [True]
    monkeypatch.setattr(SliceWorker, "compute", failing(errno.EPERM))  # nothing is left to do
    omnimerge.merge(recipe, out, resume=True)
    assert files(out) == files(tmp_path / "whole")
    assert staging.leftovers(out) == []


def test_a_kill_just_before_the_folder_gets_its_name(recipe, tmp_path, monkeypatch):
    """The journal is gone then, and the manifest says that all is there."""
    omnimerge.merge(recipe, tmp_path / "whole")
    out = tmp_path / "out"
    child = os.fork()
    if not child:
        Path.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        omnimerge.merge(recipe, out)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    hidden = tmp_path / ".out.omnimerge"
    assert not (hidden / "omnimerge.journal").exists() and not out.exists()
    with pytest.raises(OutputError, match="an interrupted merge left"):
        omnimerge.merge(recipe, out)
    monkeypatch.setattr(SliceWorker, "compute", failing(errno.EPERM))
    omnimerge.merge(recipe, out, resume=True)
    assert files(out) == files(tmp_path / "whole")


def test_a_kill_before_the_earlier_output_is_removed(recipe, tmp_path, monkeypatch):
    """It has taken the hidden name then, and looks like a merge that lacks but its name."""
    out = tmp_path / "out"
    omnimerge.merge({**recipe, "parameters": {"alpha": 0.1}}, out)
    omnimerge.merge(recipe, tmp_path / "whole")
    child = os.fork()
    if not child:
        shutil.rmtree = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
        omnimerge.merge(recipe, out, overwrite=True)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert files(out) == files(tmp_path / "whole") and (tmp_path / ".out.omnimerge").is_dir()
    omnimerge.merge(recipe, out, overwrite=True, resume=True)
    assert files(out) == files(tmp_path / "whole") and staging.leftovers(out) == []


def killed(what, merge):
    """Merge in a child that calls `what` and dies, instead of exchanging two folders."""
    child = os.fork()
    if not child:
        exchange = staging._renameat2

        def dies(*folders):
            what(exchange, *folders)
            os.kill(os.getpid(), signal.SIGKILL)

        staging._renameat2 = dies
        merge()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("how", ["fails", "is killed"])
def test_resuming_does_not_remove_another_merge_that_is_done(recipe, tmp_path, monkeypatch, how):
    """One that was to take the place of the output which is there, and lacks but its name."""
    out, file = tmp_path / "out", tmp_path / "recipe.yaml"
    other = {**recipe, "parameters": {"alpha": 0.1}}
    file.write_text(json.dumps(recipe))
    omnimerge.merge(other, tmp_path / "other")
    omnimerge.merge(recipe, out)
    before = files(out)
    if how == "fails":
        with monkeypatch.context() as patch, pytest.raises(OutputError, match="is kept"):
            patch.setattr(staging, "_exchange", failing(errno.EIO))
            omnimerge.merge(other, out, overwrite=True)
    else:
        killed(lambda *_: None, lambda: omnimerge.merge(other, out, overwrite=True))
    for options in ((), ("--overwrite",)):
        done = run("merge", file, "-o", out, "--resume", *options)
        first, second = done.output.splitlines()
        assert done.exit_code == 0 and first == f"{out} is complete already"
        assert second.startswith(f"{tmp_path / '.out.omnimerge'} is of another merge: go on with")
        assert files(out) == before
    monkeypatch.setattr(SliceWorker, "compute", failing(errno.EPERM))
    omnimerge.merge(other, out, overwrite=True, resume=True)
    assert files(out) == files(tmp_path / "other") and staging.leftovers(tmp_path) == []


@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize("tidy", ["resume", "clean"])
def test_a_kill_just_after_two_outputs_were_exchanged(recipe, tmp_path, link, tidy):
    """The earlier one is whole, at the hidden place, and known for what it is."""
    out = asked = tmp_path / "out"
    omnimerge.merge({**recipe, "parameters": {"alpha": 0.1}}, out)
    if link:
        asked = tmp_path / "link"
        asked.symlink_to(out)
    killed(
        lambda exchange, *folders: exchange(*folders),
        lambda: omnimerge.merge(recipe, asked, overwrite=True),
    )
    (left,) = staging.leftovers(asked)
    assert (left.replaced, left.resumable) == (True, False)
    if tidy == "resume":
        omnimerge.merge(recipe, asked, overwrite=True, resume=True)
    else:
        assert "(an earlier output of" in run("clean", asked).output
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"out", asked.name}
    done = omnimerge.merge(recipe, tmp_path / "whole")
    assert done and files(out) == files(tmp_path / "whole")


@pytest.mark.parametrize("after", range(1, 11, 3))
def test_a_kill_while_an_earlier_output_is_removed(recipe, tmp_path, after):
    """Whatever is gone of it by then, what is left is known for ours."""
    out, left = tmp_path / "out", [after]
    omnimerge.merge({**recipe, "parameters": {"alpha": 0.1}}, out)
    child = os.fork()
    if not child:
        unlink, commit = os.unlink, staging.Staging.commit

        def dies(*arguments, **options):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            unlink(*arguments, **options)

        def counted(self):
            exchange = staging._exchange

            def then(*folders):
                found = exchange(*folders)
                os.unlink = dies
                return found

            staging._exchange = then
            commit(self)

        staging.Staging.commit = counted
        omnimerge.merge(recipe, out, overwrite=True)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert (tmp_path / ".out.omnimerge").is_dir()
    omnimerge.merge(recipe, out, overwrite=True, resume=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_out_of_memory_is_one_line_and_keeps_what_is_done(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "INTERVAL", 0.01)
    compute, calls = SliceWorker.compute, []

    def short(*arguments):
        calls.append(1)
        if len(calls) > 40:
            raise torch.OutOfMemoryError("tried to allocate 9 GB")
        omnimerge.engine.execute.threading.Event().wait(0.01)
        return compute(*arguments)

    monkeypatch.setattr(SliceWorker, "compute", short)
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe))
    done = run("merge", file, "-o", tmp_path / "out")
    assert done.exit_code == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("Error: out of memory (tried to allocate 9 GB)")
    assert "--resume" in done.stderr
    monkeypatch.setattr(SliceWorker, "compute", compute)
    assert "of it before" in run("merge", file, "-o", tmp_path / "out", "--resume").output


def test_an_earlier_run_outlives_a_disk_that_is_full_at_the_next_start(
    recipe, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing(errno.EACCES))
        with pytest.raises(OutputError):
            omnimerge.merge(recipe, out)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", failing(errno.ENOSPC))
        with pytest.raises(OutputError, match="no space left"):
            omnimerge.merge(recipe, out, resume=True)
    assert [each.resumable for each in staging.leftovers(out)] == [True]


def test_resuming_looks_at_more_than_weights(recipe, tmp_path):
    """The target's other files are in the output as well."""
    target = tmp_path / "target"
    shutil.copytree(recipe["target"], target)
    recipe = {**recipe, "target": str(target)}
    omnimerge.merge(recipe, tmp_path / "out")
    seen = []
    omnimerge.merge(recipe, tmp_path / "out", resume=True, on_progress=lambda *n: seen.append(n))
    assert seen and seen[0][0] == seen[0][1]  # complete already
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"note": "new"}))
    with pytest.raises(OutputError, match="exists and is not empty"):
        omnimerge.merge(recipe, tmp_path / "out", resume=True)


def test_a_recipe_spelt_otherwise_is_the_same_merge(recipe, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing(errno.EACCES))
        with pytest.raises(OutputError):
            omnimerge.merge(recipe, tmp_path / "out")
    monkeypatch.chdir(Path(recipe["target"]).parent)
    relative = {**recipe, "target": Path(recipe["target"]).name}
    omnimerge.merge(relative, tmp_path / "out", resume=True)
    assert (tmp_path / "out" / "merge_manifest.json").is_file()


def test_a_copied_file_that_changes_during_the_merge(recipe, tmp_path):
    target = tmp_path / "target"
    shutil.copytree(recipe["target"], target)

    def change(*_):
        os.utime(target / "config.json", (1, 1))

    with pytest.raises(omnimerge.OmnimergeError, match=r"config.json changed while it was merged"):
        omnimerge.merge({**recipe, "target": str(target)}, tmp_path / "out", on_progress=change)


def test_a_source_of_another_header_and_the_same_size_and_time(recipe, tmp_path):
    donor = tmp_path / "donor"
    shutil.copytree(recipe["models"][0], donor)
    file = donor / "model.safetensors"
    before = file.stat()

    def change(*_):
        with file.open("r+b") as stream:
            start = stream.read(2000).index(b'"pt"')
            stream.seek(start)
            stream.write(b'"tp"')
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))

    changed = []
    with pytest.raises(InputChangedError, match=r"changed while it was merged \(header_sha256\)"):
        omnimerge.merge(
            {**recipe, "models": [str(donor)]}, tmp_path / "out",
            on_progress=lambda *_: changed or changed.append(change()),
        )  # fmt: skip
    now = file.stat()
    assert (now.st_size, now.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert list(tmp_path.iterdir()) == [donor]


def test_a_pipe_among_a_targets_files_is_named(recipe, tmp_path):
    target = tmp_path / "target"
    shutil.copytree(recipe["target"], target)
    os.mkfifo(target / "extra.json")
    with pytest.raises(CheckpointError, match=r"extra.json is no regular file and cannot be cop"):
        omnimerge.merge({**recipe, "target": str(target)}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_the_target_lost_since_is_not_in_the_output(recipe, tmp_path, monkeypatch):
    target = tmp_path / "target"
    shutil.copytree(recipe["target"], target)
    recipe = {**recipe, "target": str(target)}
    (target / "notes.txt").write_text("old")
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing(errno.EACCES))
        with pytest.raises(OutputError):
            omnimerge.merge(recipe, out)
    (tmp_path / ".out.omnimerge" / "left.txt").write_text("from a version before")
    omnimerge.merge(recipe, out, resume=True)
    assert (out / "notes.txt").exists() and not (out / "left.txt").exists()


def test_another_vocabulary_is_another_merge(recipe, tmp_path):
    """Tokenizers decide rows of the embedding; nothing else of a plan tells them apart."""
    from omnimerge.engine import build_plan, load_recipe
    from omnimerge.engine.inputs import jobs_digest

    plan = build_plan(load_recipe(recipe))
    first, *rest = plan.jobs
    own = replace(first, own=((0, 4),))
    changed = replace(plan, jobs=(own, *rest))
    assert jobs_digest(plan) != jobs_digest(changed)
    assert jobs_digest(plan) == jobs_digest(build_plan(load_recipe(recipe)))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda raw: raw.replace(b'"F32"', b'"I32"', 1), "was not written as planned"),
        (lambda raw: raw.replace(b'.weight"', b'.weighs"', 1), "was not written as planned"),
        (lambda raw: raw[:-4], "is truncated"),
    ],
)
def test_headers_that_are_not_those_of_the_plan(recipe, tmp_path, monkeypatch, spoil, words):
    """The disk gives something else back: nothing gets the name, and the way on mends it."""
    file, out = tmp_path / "recipe.yaml", tmp_path / "out"
    file.write_text(json.dumps(recipe))
    real = CheckpointWriter.secure

    def lying(self):
        real(self)
        shard = max(self.folder.glob("*.safetensors"))
        shard.write_bytes(spoil(shard.read_bytes()))

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "secure", lying)
        done = run("merge", file, "-o", out)
    assert done.exit_code == 1 and words in done.stderr, done.output
    assert len(done.stderr.splitlines()) == 1 and "go on with --resume" in done.stderr
    assert not out.exists()
    assert run("merge", file, "-o", out, "--resume").exit_code == 0
    omnimerge.merge(recipe, tmp_path / "whole")
    assert files(out) == files(tmp_path / "whole")


def test_a_tensor_that_nobody_planned(recipe, tmp_path, monkeypatch):
    file, out = tmp_path / "recipe.yaml", tmp_path / "out"
    file.write_text(json.dumps(recipe))
    real = CheckpointWriter.read_back
    monkeypatch.setattr(CheckpointWriter, "read_back", lambda self: {**real(self), "more": None})
    done = run("merge", file, "-o", out)
    assert done.exit_code == 1 and not out.exists()
    assert "tensors that were not planned were written: ['more']" in done.stderr


def one_tensor():
    return [[OutputTensor("a", "F32", (2,))]]


@pytest.mark.parametrize("spelt", [".", "/", ".."])
def test_outputs_spelt_as_dots_and_the_root(tmp_path, monkeypatch, spelt):
    inner = tmp_path / "inner"
    inner.mkdir()
    monkeypatch.chdir(inner)
    done = run("clean", spelt)
    if spelt == "/":
        assert done.exit_code == 1 and "is the root of the file system" in done.stderr
        assert len(done.stderr.splitlines()) == 1
    else:
        assert done.output == f"nothing was left of {Path(spelt)}, nor in it\n"


def test_the_folder_that_one_stands_in(tmp_path, monkeypatch):
    inner = tmp_path / "inner"
    inner.mkdir()
    monkeypatch.chdir(inner)
    with CheckpointWriter(Path(), one_tensor()) as out:
        out.write("a", memoryview(bytes(8)))
    assert [p.name for p in inner.iterdir()] == ["model.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["inner"]


def test_an_output_spelt_through_a_folder_that_is_not_there(recipe, tmp_path):
    out = tmp_path / "out"
    omnimerge.merge(recipe, out)
    before = files(tmp_path)
    with pytest.raises(OutputError, match="out exists and is not empty"):
        omnimerge.merge({**recipe, "seed": 1}, out / "x" / ".." / ".." / "out")
    omnimerge.merge(recipe, out / "x" / ".." / ".." / "other")
    assert {p.name for p in tmp_path.iterdir()} == {"out", "other"}
    assert not (out / "x").exists() and before.items() <= files(tmp_path).items()


def test_somebodys_hidden_folder_of_that_name_is_not_touched(tmp_path):
    diary = tmp_path / ".notes.omnimerge" / "diary.txt"
    diary.parent.mkdir()
    diary.write_text("dear")
    assert "nothing was left" in run("clean", tmp_path).output
    with (
        pytest.raises(OutputError, match="is in the way"),
        CheckpointWriter(tmp_path / "notes", one_tensor()),
    ):
        pass
    assert diary.read_text() == "dear"


def test_clean_follows_the_link_that_an_output_is(tmp_path):
    real = tmp_path / "real"
    real.mkdir()
    link = tmp_path / "link"
    link.symlink_to(real / "out")
    (real / ".out.omnimerge").mkdir()
    assert f"removed {real / '.out.omnimerge'}" in run("clean", link).output


def test_a_lock_that_lost_its_place_is_none(tmp_path, monkeypatch):
    """Another process may finish between opening the file and locking it."""
    out, flock, removed = tmp_path / "out", fcntl.flock, []

    def late(descriptor, how):
        if not removed:
            removed.append(1)
            (tmp_path / ".out.omnimerge-lock").unlink()
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    held = staging.Staging(out)
    assert removed and (tmp_path / ".out.omnimerge").is_dir()
    with pytest.raises(OutputError, match="another process is writing"):
        staging.Staging(out)
    held.discard()
    assert list(tmp_path.iterdir()) == []


def test_what_is_locked_is_a_file_open_for_writing(tmp_path, monkeypatch):
    """Network file systems lock no folders, and nothing for other machines that is only read."""
    flock, seen = fcntl.flock, []

    def note(descriptor, how):
        how_open = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
        seen.append((stat.S_ISREG(os.fstat(descriptor).st_mode), how_open))
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", note)
    held = staging.Staging(tmp_path / "out")
    assert staging.leftovers(tmp_path) == []
    held.discard()
    assert seen == [(True, os.O_RDWR)] * 2


def test_one_process_at_a_time(tmp_path):
    """Many that come and go: the lock's file is removed and made anew all the time."""
    children = []
    for _ in range(4):
        children.append(os.fork())
        if not children[-1]:
            took = 0
            while took < 100:
                with contextlib.suppress(OutputError):
                    held = staging.Staging(tmp_path / "out")
                    alone = os.open(tmp_path / "alone", os.O_CREAT | os.O_EXCL)  # or it fails
                    os.close(alone)
                    (tmp_path / "alone").unlink()
                    held.discard()
                    took += 1
            os._exit(0)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["link", "file", "folder", "pipe"])
def test_somebodys_file_in_the_place_of_the_lock(tmp_path, kind):
    lock, mine = tmp_path / ".out.omnimerge-lock", tmp_path / "mine"
    mine.write_text("dear")
    if kind == "folder":
        lock.mkdir()
    elif kind == "file":
        lock.write_text("dear")
    elif kind == "pipe":
        os.mkfifo(lock)
    else:
        lock.symlink_to(mine)
    with (
        pytest.raises(OutputError, match=r"omnimerge-lock is in the way"),
        CheckpointWriter(tmp_path / "out", one_tensor()),
    ):
        pass
    assert "nothing was left" in run("clean", tmp_path / "out").output
    assert lock.exists() and mine.read_text() == "dear"


def test_an_earlier_output_that_cannot_be_removed(recipe, tmp_path, monkeypatch):
    """It stays, is known for what it is, and goes as soon as it can."""
    out, hidden = tmp_path / "out", tmp_path / ".out.omnimerge"
    omnimerge.merge({**recipe, "parameters": {"alpha": 0.1}}, out)
    monkeypatch.setattr(staging, "_remove", failing(errno.EACCES))
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    done = run("merge", tmp_path / "recipe.yaml", "-o", out, "--overwrite")
    (tmp_path / "recipe.yaml").unlink()
    assert done.exit_code == 0
    assert f"{hidden}, the earlier output, could not be removed; `omnimerge clean" in done.output
    (left,) = staging.leftovers(out)
    assert (left.folder, left.replaced, left.resumable) == (hidden, True, False)
    with pytest.raises(OutputError, match=r"cannot write .*out: Permission denied"):
        omnimerge.merge({**recipe, "parameters": {"alpha": 0.2}}, out, overwrite=True)
    whole = files(out)
    monkeypatch.undo()
    omnimerge.merge({**recipe, "parameters": {"alpha": 0.2}}, out, overwrite=True)
    assert staging.leftovers(out) == [] and [p.name for p in tmp_path.iterdir()] == ["out"]
    assert files(out).keys() == whole.keys() and files(out) != whole


def test_an_interrupt_while_an_earlier_output_is_removed(recipe, tmp_path, monkeypatch):
    """The new one is there: there is nothing to go on with."""
    out, remove = tmp_path / "out", staging._remove
    omnimerge.merge({**recipe, "parameters": {"alpha": 0.1}}, out)
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))

    def interrupted(folder):
        (folder / journal_name).touch()  # the first step of a removal
        raise KeyboardInterrupt

    journal_name = staging.JOURNAL_NAME
    monkeypatch.setattr(staging, "_remove", interrupted)
    done = run("merge", tmp_path / "recipe.yaml", "-o", out, "--overwrite")
    assert (done.exit_code, done.stderr) == (130, f"Interrupted. {out} is complete.\n")
    (left,) = staging.leftovers(out)
    assert (left.replaced, left.resumable) == (True, False)
    monkeypatch.setattr(staging, "_remove", remove)
    assert "(an earlier output of" in run("clean", out).output
    omnimerge.merge(recipe, tmp_path / "whole")
    assert files(out) == files(tmp_path / "whole")
    assert {p.name for p in tmp_path.iterdir()} == {"out", "whole", "recipe.yaml"}


def test_clean_goes_on_after_what_it_cannot_remove(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / f".{name}.omnimerge").mkdir()
    remove = staging._remove

    def stuck(folder):
        failing(errno.EACCES)() if folder.name == ".a.omnimerge" else remove(folder)

    monkeypatch.setattr(staging, "_remove", stuck)
    done = run("clean", tmp_path)
    assert done.exit_code == 1 and f"removed {tmp_path / '.b.omnimerge'}" in done.output
    assert done.stderr == f"Error: cannot remove {tmp_path / '.a.omnimerge'}: Permission denied\n"


@pytest.mark.parametrize("command", ["merge", "resume", "inside", "clean", "inspect"])
def test_links_in_a_ring(recipe, tmp_path, command):
    ring, file = tmp_path / "ring", tmp_path / "recipe.yaml"
    ring.symlink_to("ring")
    file.write_text(json.dumps(recipe))
    done = {
        "merge": lambda: run("merge", file, "-o", ring),
        "resume": lambda: run("merge", file, "-o", ring, "--resume"),
        "inside": lambda: run("merge", file, "-o", ring / "out"),
        "clean": lambda: run("clean", ring),
        "inspect": lambda: run("inspect", ring),
    }[command]()
    if command == "clean":
        assert (done.exit_code, done.output) == (0, f"nothing was left of {ring}, nor in it\n")
        return
    assert done.exit_code == 1 and len(done.stderr.splitlines()) == 1, done.output
    assert str(ring) in done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"ring", "recipe.yaml"}


def test_an_output_below_a_file(recipe, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot write .*file/out: Not a directory"):
        omnimerge.merge(recipe, tmp_path / "file" / "out")


def test_a_hidden_folder_that_is_taken_away_is_not_promised(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "INTERVAL", 0.0)

    def take(done, total):
        if done > total // 2:
            shutil.rmtree(tmp_path / ".out.omnimerge", ignore_errors=True)

    with pytest.raises((OutputError, CheckpointError)) as found:
        omnimerge.merge(recipe, tmp_path / "out", on_progress=take)
    assert "what is done is kept" not in str(found.value)


def test_a_lock_that_was_left_alone(tmp_path):
    """A kill just after the output got its name."""
    lock = tmp_path / ".out.omnimerge-lock"
    for command in (lambda: run("clean", tmp_path / "out"), lambda: run("clean", tmp_path)):
        lock.touch()
        assert f"removed {lock} (the lock of {tmp_path / 'out'}" in command().output
    lock.touch()
    with CheckpointWriter(tmp_path / "out", one_tensor()):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_clean_on_a_full_disk(tmp_path, monkeypatch):
    (tmp_path / ".out.omnimerge").mkdir()
    opened = os.open

    def full(path, flags, *arguments, **options):
        if flags & os.O_CREAT:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return opened(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", full)
    assert "removed" in run("clean", tmp_path).output
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_does_not_take_the_place_of_its_input(recipe, tmp_path):
    target = tmp_path / "target"
    omnimerge.merge(recipe, target)
    before = files(target)
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps({**recipe, "target": str(target), "select": "linear"}))
    for command in (
        ["merge", file, "--as-adapter", "4", "-o", target],
        ["extract-adapter", target, recipe["target"], "--rank", "4", "-o", target],
    ):
        done = run(*command, "--overwrite")
        assert done.exit_code == 1 and "is or holds an input" in done.stderr, done.output
    assert files(target) == before


def test_threads_do_not_keep_matrices_beyond_the_limit(recipe, tmp_path, monkeypatch):
    kept = []
    forget = SliceWorker.forget

    def note(self):
        kept.append(sum(each.nbytes for each in self._raw.values()))
        forget(self)

    monkeypatch.setattr(SliceWorker, "forget", note)
    base = {**recipe, "method": "tsv", "base": recipe["target"], "models": [recipe["target"]] * 2}
    del base["parameters"]
    omnimerge.merge(base, tmp_path / "wide")
    assert not kept
    omnimerge.merge(base, tmp_path / "narrow", memory=10_000)
    assert kept

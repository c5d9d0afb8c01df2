"""Merges that are killed: the same bytes when they are resumed, and what is left is found."""

import contextlib
import errno
import fcntl
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
from small_merge import files, recipe_of, run
from soaking import results, short_and_long

import omnimerge
from omnimerge.checkpoint import journal, staging
from omnimerge.checkpoint.ranges import Ranges
from omnimerge.checkpoint.staging import leftovers
from omnimerge.errors import InputChangedError, OutputError

KILLER = Path(__file__).parents[1] / "support" / "killer.py"


@pytest.fixture
def recipe(checkpoints):
    return recipe_of(checkpoints, max_shard_size="60KB")


def interrupted(recipe, out, after=40_000, number=signal.SIGINT, times=1):
    """Merge until some bytes are written, then interrupt."""
    left = [number] * times

    def stop(done, total):
        if done > after and left:
            os.kill(os.getpid(), left.pop())

    with pytest.raises(KeyboardInterrupt):
        omnimerge.merge(recipe, out, on_progress=stop)


def cannot(*_):
    raise OSError(errno.EINVAL, "not here")


def test_ranges_of_a_file_larger_than_memory():
    ranges = Ranges()
    ranges.add(0, 1 << 60)
    assert list(ranges) == [(0, 1 << 60)]  # a list asks for a length, and reserves as much
    assert ranges.total == 1 << 60


def test_ranges_by_hand():
    ranges = Ranges()
    for start, stop in ((0, 10), (20, 30), (10, 12), (40, 41), (25, 45), (7, 7)):
        ranges.add(start, stop)
    assert list(ranges) == [(0, 12), (20, 45)]
    assert ranges.total == 37
    assert [ranges.stop_after(i) for i in (0, 11, 12, 19, 20, 44, 45)] == [
        12,
        12,
        12,
        19,
        45,
        45,
        45,
    ]
    assert ranges.covers(20, 45) and ranges.covers(3, 3) and not ranges.covers(11, 13)
    assert not ranges.covers(19, 21) and not ranges.covers(44, 46)


@pytest.mark.parametrize("seed", range(20))
def test_ranges_are_sets_of_integers(seed):
    import random

    draw, ranges, expected = random.Random(seed), Ranges(), set()
    for _ in range(40):
        start = draw.randrange(60)
        stop = start + draw.randrange(8)
        ranges.add(start, stop)
        expected |= set(range(start, stop))
        assert {i for start, stop in ranges for i in range(start, stop)} == expected
        assert ranges.total == len(expected)
        assert all(a[1] < b[0] for a, b in pairwise(ranges))
        assert ranges.covers(start, stop + 1) == (set(range(start, stop + 1)) <= expected)


@pytest.mark.parametrize(("cases", "soak"), short_and_long(30, "OMNIMERGE_KILLS"))
def test_kill_at_random_moments(checkpoints, tmp_path, cases, soak):
    base, one, two = (str(checkpoints("qwen2_vl", own=own)) for own in ("base", "one", "two"))
    donor = str(checkpoints("llava_onevision"))
    small = {"max_shard_size": "60KB"}
    recipes = {
        "adamms": {
            "method": "adamms", "target": base, "models": [donor], "parameters": {"alpha": 0.3},
        },
        "ties": {
            "method": "ties", "base": base, "models": [one, two], **small,
            "parameters": {"threshold_scope": "model"},
        },
        "dare": {"method": "dare_linear", "base": base, "models": [one, two], **small},
        "tsv": {"method": "tsv", "base": base, "models": [one, two], **small},
    }  # fmt: skip
    (tmp_path / "recipes.json").write_text(json.dumps(recipes))
    done = subprocess.run(
        [sys.executable, KILLER, tmp_path / "recipes.json", tmp_path, str(cases), "7"],
        capture_output=True, text=True, check=False, timeout=max(3600, 4 * cases),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(found)
    if soak:
        results("kills.json").write_text(json.dumps(found, indent=1) + "\n")
    assert found["different"] == []
    assert found["cases"] == cases and found["killed"] >= cases
    assert found["resumed_cases"] >= 0.2 * cases and found["resumed_bytes"] > 0


@pytest.mark.parametrize("times", [1, 10])
def test_only_what_is_missing_is_computed(recipe, tmp_path, monkeypatch, times):
    interrupted(recipe, tmp_path / "out", times=times)
    from omnimerge.engine import slices

    computed = []
    real = slices.SliceWorker.compute

    def counted(self, job, start, stop):
        computed.append((stop - start) * 4)
        return real(self, job, start, stop)

    monkeypatch.setattr(slices.SliceWorker, "compute", counted)
    seen = []
    plan = omnimerge.merge(
        recipe, tmp_path / "out", resume=True, on_progress=lambda *now: seen.append(now)
    )
    assert seen[0][0] > 40_000
    assert sum(computed) == plan.bytes_to_write - seen[0][0]
    assert seen[-1] == (plan.bytes_to_write, plan.bytes_to_write)


def test_resuming_nothing_begins_and_resuming_what_is_complete_does_nothing(recipe, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe))
    out = tmp_path / "out"
    first = run("merge", file, "-o", out, "--resume")
    assert first.exit_code == 0 and "of it before" not in first.output
    stamp = (out / "config.json").stat().st_mtime_ns
    again = run("merge", file, "-o", out, "--resume")
    assert (again.exit_code, again.output) == (0, f"{out} is complete already\n")
    assert (out / "config.json").stat().st_mtime_ns == stamp
    other = run("merge", file, "-o", out, "--resume", "--param", "alpha=0.5")
    assert other.exit_code == 1 and "exists and is not empty" in other.output


@pytest.mark.parametrize("change", ["recipe", "input", "version"])
def test_another_merge_cannot_go_on_with_it(recipe, tmp_path, change, monkeypatch):
    import shutil

    target = tmp_path / "target"
    shutil.copytree(recipe["target"], target)
    recipe = {**recipe, "target": str(target)}
    out = tmp_path / "out"
    interrupted(recipe, out)
    if change == "recipe":
        recipe = {**recipe, "parameters": {"alpha": 0.31}}
    elif change == "input":
        os.utime(target / "model.safetensors", (1, 1))
    else:
        monkeypatch.setattr("omnimerge.engine.inputs.versions", lambda: {"torch": "0"})
    with pytest.raises(OutputError, match=r"is of another merge .*omnimerge clean"):
        omnimerge.merge(recipe, out, resume=True)
    assert [each.out for each in leftovers(out)] == [out]


def test_a_shard_that_is_gone_is_written_again(recipe, tmp_path):
    omnimerge.merge(recipe, tmp_path / "whole")
    out = tmp_path / "out"
    interrupted(recipe, out, after=100_000)
    (left,) = leftovers(out)
    sorted(left.folder.glob("*.safetensors"))[0].unlink()
    sorted(left.folder.glob("*.safetensors"))[1].write_bytes(b"short")
    omnimerge.merge(recipe, out, resume=True)
    assert files(out) == files(tmp_path / "whole")


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("stopped", [errno.ENOSPC, signal.SIGINT, signal.SIGKILL])
def test_what_is_made_anew_is_promised_no_more(recipe, tmp_path, monkeypatch, finished, stopped):
    """Shards are gone, and the run that makes them again does not come far either."""
    omnimerge.merge(recipe, tmp_path / "whole")
    out, calls, reserve = tmp_path / "out", [], os.posix_fallocate
    if finished:
        with monkeypatch.context() as patch, pytest.raises(OutputError, match="--resume"):
            patch.setattr(Path, "rename", cannot)
            omnimerge.merge(recipe, out)
    else:
        interrupted(recipe, out, after=200_000)
    (left,) = leftovers(out)
    gone = sorted(left.folder.glob("*.safetensors"))[:-1]
    for shard in gone:
        shard.unlink()

    def stops(*arguments):
        calls.append(1)
        if len(calls) == len(gone):
            if stopped == errno.ENOSPC:
                raise OSError(stopped, os.strerror(stopped))
            os.kill(os.getpid(), stopped)
        reserve(*arguments)

    child = os.fork()
    if not child:
        os.posix_fallocate = stops
        with contextlib.suppress(OutputError, KeyboardInterrupt):
            omnimerge.merge(recipe, out, resume=True)
        os._exit(0)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert ended == (-stopped if stopped == signal.SIGKILL else 0)
    assert all(shard.is_file() for shard in gone[:-1]) and not out.exists()
    omnimerge.merge(recipe, out, resume=True)
    assert files(out) == files(tmp_path / "whole")


def test_what_a_kill_left_is_named_and_cleaned(recipe, tmp_path):
    out = tmp_path / "out"
    child = os.fork()
    if not child:
        interrupted(recipe, out, number=signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    hidden = tmp_path / ".out.omnimerge"
    assert {p.name for p in tmp_path.iterdir()} == {hidden.name, ".out.omnimerge-lock"}
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe))
    done = run("merge", file, "-o", out)
    assert done.exit_code == 1 and f"an interrupted merge left {hidden}; go on" in done.stderr
    assert f"`omnimerge clean {out}`" in done.stderr
    assert f"removed {hidden} (an interrupted merge of {out}" in run("clean", out).output
    assert list(tmp_path.iterdir()) == [file]


def test_clean_that_is_killed_leaves_nothing_to_go_on_with(recipe, tmp_path):
    out = tmp_path / "out"
    interrupted(recipe, out)
    child = os.fork()
    if not child:
        unlink, left = os.unlink, [3]

        def dies(*arguments, **options):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            unlink(*arguments, **options)

        os.unlink = dies
        staging.clean(leftovers(out)[0])
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert [each.resumable for each in leftovers(out)] == [False]
    assert "removed" in run("clean", out).output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", ("", [])),
        (b'{"merge":"k"}', ("", [])),
        (b'{"merge":"k"}\n[[[0,5]]]\n', ("k", [[[0, 5]]])),
        (b'{"merge":"k"}\n[[[0,5]]]\n[[[0,9]]]\n[[[0,1', ("k", [[[0, 9]]])),
        (b'{"merge":"k"}\n[[[0,5]]]\n\x00\xff\n[[[0,9]]]\n', ("k", [[[0, 5]]])),
        (b"[]\n[[[0,5]]]\n", ("", [])),
        *(
            (b'{"merge":"k"}\n[[[0,5]]]\n' + odd + b"\n", ("k", [[[0, 5]]]))
            for odd in (
                b"5",
                b"[1,2]",
                b"[[null]]",
                b"[[0]]",
                b"[[[0]]]",
                b'[[["a","b"]]]',
                b"[[[0,1e400]]]",
                b"[[[5,0]]]",
                b"[[[-1,5]]]",
                b"[[[0,true]]]",
                b"[[[0,5,9]]]",
                b"{}",
            )
        ),
    ],
)
def test_a_journal_that_was_cut_off(tmp_path, text, expected):
    (tmp_path / "j").write_bytes(text)
    assert journal.read_journal(tmp_path / "j") == expected


def test_a_journal_that_promises_more_than_there_is(recipe, tmp_path):
    out = tmp_path / "out"
    omnimerge.merge(recipe, tmp_path / "whole")
    interrupted(recipe, out)
    file = tmp_path / ".out.omnimerge" / "omnimerge.journal"
    key, ranges = journal.read_journal(file)
    journal.begin_journal(file, key, [[[0, 10**12]] for _ in ranges])
    there = []
    omnimerge.merge(recipe, out, resume=True, on_progress=lambda done, total: there.append(done))
    assert there[0] == 0 and files(out) == files(tmp_path / "whole")


def test_two_processes_on_one_output(recipe, tmp_path):
    out = tmp_path / "out"
    seen = []

    def second(done, total):
        if not seen:
            seen.append(done)
            with pytest.raises(OutputError, match="another process is writing"):
                omnimerge.merge(recipe, out)
            assert leftovers(out) == [] and leftovers(tmp_path) == []
            assert "nothing was left" in run("clean", out).output

    omnimerge.merge(recipe, out, on_progress=second)
    assert seen and (out / "merge_manifest.json").is_file()


def test_clean_names_and_removes(recipe, tmp_path):
    out = tmp_path / "out"
    interrupted(recipe, out)
    for where in (out, tmp_path):
        found = run("clean", where, "--dry-run")
        assert found.exit_code == 0
        assert f"found {tmp_path / '.out.omnimerge'} (an interrupted merge of {out}" in found.output
        assert "can be resumed" in found.output
    gone = run("clean", out).output
    assert f"removed {tmp_path / '.out.omnimerge'}" in gone and "can be resumed" not in gone
    assert list(tmp_path.iterdir()) == []
    assert run("clean", out).output == f"nothing was left of {out}, nor in it\n"


def test_an_earlier_output_that_lost_its_place_is_put_back(recipe, tmp_path, monkeypatch):
    """Where two folders cannot be exchanged in one step, a kill between two renames."""
    out = tmp_path / "out"
    omnimerge.merge(recipe, out)
    before = files(out)
    monkeypatch.setattr(staging, "_renameat2", cannot)
    omnimerge.merge({**recipe, "parameters": {"alpha": 0.1}}, out, overwrite=True)
    assert files(out) != before and leftovers(tmp_path) == []
    out.rename(tmp_path / ".out.omnimerge-old")
    assert "restored" in run("clean", out).output
    assert files(out) != before and out.is_dir()


def test_file_systems_without_locks(recipe, tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    omnimerge.merge(recipe, tmp_path / "out")
    assert (tmp_path / "out" / "merge_manifest.json").is_file()


def test_a_source_that_changes_during_the_merge(recipe, tmp_path):
    import shutil

    donor = tmp_path / "donor"
    shutil.copytree(recipe["models"][0], donor)
    changed = []

    def change(done, total):
        if not changed:
            changed.append(done)
            os.utime(donor / "model.safetensors", (1, 1))

    with pytest.raises(omnimerge.OmnimergeError, match=r"changed while it was merged \(modified"):
        omnimerge.merge({**recipe, "models": [str(donor)]}, tmp_path / "out", on_progress=change)
    assert not (tmp_path / "out").exists()


def test_a_source_that_changes_while_its_ancestor_is_tested(recipe, tmp_path, monkeypatch):
    """After its header was read, before the merge begins."""
    import shutil

    align = importlib.import_module("omnimerge.arch.align")  # the function has the same name
    donor = tmp_path / "donor"
    shutil.copytree(recipe["models"][0], donor)
    real = align.check_ancestor

    def change(result):
        os.utime(donor / "model.safetensors", (1, 1))
        return real(result)

    monkeypatch.setattr(align, "check_ancestor", change)
    with pytest.raises(InputChangedError, match=r"changed while it was merged \(modified"):
        omnimerge.merge({**recipe, "models": [str(donor)]}, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [donor]


def test_what_was_merged_of_two_sources_is_not_kept(recipe, tmp_path):
    """Put back with its old time, the source looks as if it had never changed."""
    import shutil

    omnimerge.merge(recipe, tmp_path / "whole")
    donor = tmp_path / "donor"
    shutil.copytree(recipe["models"][0], donor)
    file = donor / "model.safetensors"
    content, stamp = file.read_bytes(), file.stat().st_mtime_ns
    recipe = {**recipe, "models": [str(donor)]}

    def change(done, total):
        if file.read_bytes() == content and done < total:
            file.write_bytes(content[:-3000] + b"\x11\x3c" * 1500)

    with pytest.raises(InputChangedError) as error:
        omnimerge.merge(recipe, tmp_path / "out", on_progress=change)
    assert "--resume" not in str(error.value)
    assert leftovers(tmp_path / "out") == [] and not (tmp_path / "out").exists()
    file.write_bytes(content)
    os.utime(file, ns=(stamp, stamp))
    omnimerge.merge(recipe, tmp_path / "out", resume=True)
    weights = [p.name for p in (tmp_path / "out").glob("*.safetensors")]
    assert len(weights) > 1
    for name in weights:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("kind", ["link", "file"])
def test_a_hidden_folder_that_is_none(recipe, tmp_path, kind):
    """A link in its place could lead to anybody's files."""
    mine, hidden = tmp_path / "mine", tmp_path / ".out.omnimerge"
    mine.mkdir()
    (mine / "letter").write_text("dear")
    hidden.symlink_to(mine) if kind == "link" else hidden.write_text("mine")
    with pytest.raises(OutputError, match=r"\.out\.omnimerge is in the way"):
        omnimerge.merge(recipe, tmp_path / "out")
    assert leftovers(tmp_path / "out") == []
    assert "nothing was left" in run("clean", tmp_path / "out").output
    assert (mine / "letter").read_text() == "dear" and hidden.exists()
    assert not (tmp_path / "out").exists()


def test_file_systems_that_do_not_tell_their_room(recipe, tmp_path, monkeypatch):
    def cannot(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(os, "statvfs", cannot)
    omnimerge.merge(recipe, tmp_path / "out")
    assert (tmp_path / "out" / "merge_manifest.json").is_file()


def test_a_signal_after_the_output_got_its_name(recipe, tmp_path, monkeypatch):
    real = staging.Staging.commit

    def commit(self):
        real(self)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(staging.Staging, "commit", commit)
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe))
    done = run("merge", file, "-o", tmp_path / "out")
    assert done.exit_code == 130
    assert done.output == f"Interrupted. {tmp_path / 'out'} is complete.\n"
    assert run("verify", tmp_path / "out").exit_code == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 1)])
def test_signals_end_the_command_with_a_message(recipe, tmp_path, number, code):
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe))
    slow = (
        "import time, omnimerge.engine.slices as s; real = s.SliceWorker.compute\n"
        "def compute(*a):\n    time.sleep(0.1); return real(*a)\n"
        "s.SliceWorker.compute = compute\n"
        "from omnimerge.cli import main; main(prog_name='omnimerge')\n"
    )
    command = [sys.executable, "-c", slow, "merge", file, "-o", tmp_path / "out"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        journals = tmp_path.glob(".out.omnimerge/omnimerge.journal")
        if any(file.stat().st_size for file in journals):
            break
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(number)
    _, message = process.communicate(timeout=60)
    assert process.returncode == code
    said = "Interrupted" if number == signal.SIGINT else "Terminated"
    assert message.startswith(
        f"{said}. What is done is kept: go on by the same command with --resume"
    )
    assert len(message.splitlines()) == 1
    done = run("merge", file, "-o", tmp_path / "out", "--resume")
    assert done.exit_code == 0 and "of it before" in done.output


def test_threads_end_before_what_they_write_into_is_tidied_up(recipe, tmp_path, monkeypatch):
    """Also when one Ctrl-C follows another: what follows may be another merge, in this process."""
    from omnimerge.engine import slices

    ended, real = [], slices.SliceWorker.compute

    def slowly(self, job, start, stop):
        time.sleep(0.05)
        ended.append(threading.current_thread().name)
        return real(self, job, start, stop)

    monkeypatch.setattr(slices.SliceWorker, "compute", slowly)
    for _ in range(3):
        interrupted(recipe, tmp_path / "out", times=10)
        before = len(ended)
        time.sleep(0.3)
        assert len(ended) == before
        shutil.rmtree(tmp_path / ".out.omnimerge", ignore_errors=True)

"""Merges on a cluster of three nodes: the bytes of a local merge, whatever is lost on the way."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import listening
import pytest
import tiny_adapters
import tiny_models
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import omnimerge
from omnimerge.checkpoint import journal
from omnimerge.checkpoint.staging import leftovers
from omnimerge.cli import main
from omnimerge.engine import knowledge, slices, worker
from omnimerge.engine import ray as ray_module
from omnimerge.errors import ExecutorError, NonFiniteError, OutputError

os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # the loopback address only
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
ray = pytest.importorskip("ray", reason="needs omnimerge[ray]")

LOOPBACK = {"node_ip_address": "127.0.0.1"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    from ray.cluster_utils import Cluster

    os.environ["OMNIMERGE_CACHE"] = str(tmp_path_factory.mktemp("cache"))  # of its processes

    # Patient: a busy machine leaves a node without the CPU for seconds, which is not down then.
    patient = {
        "health_check_initial_delay_ms": 0, "health_check_period_ms": 500,
        "health_check_failure_threshold": 10,
    }  # fmt: skip
    found = Cluster()
    found.add_node(num_cpus=0, include_dashboard=False, _system_config=patient, **LOOPBACK)
    for _ in range(2):
        found.add_node(num_cpus=1, **LOOPBACK)
    ray.init(address=found.address, log_to_driver=False, configure_logging=False)
    yield found
    ray.shutdown()
    found.shutdown()


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Tiny models make many slices, and many tasks."""
    monkeypatch.setattr(slices, "CHUNK_ELEMENTS", 1000)
    monkeypatch.setattr(knowledge, "MEASURED_ELEMENTS", 3000)
    monkeypatch.setattr(ray_module, "_LEAST", 1)
    monkeypatch.setattr(journal, "INTERVAL", 0.01)


@pytest.fixture(scope="module")
def experts(checkpoints):
    base, *models = (str(checkpoints("qwen2_vl", own=own)) for own in ("base", "one", "two"))
    return {"base": base, "models": models, "max_shard_size": "60KB"}


@pytest.fixture
def recipe(experts):
    return {"method": "dare_linear", **experts}


def merge(recipe, out, **options):
    return omnimerge.merge(recipe, out, force=["ancestor"], **options)


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def slowly(folder, seconds):
    """`_write` that says where it runs and takes its time; it travels as it is."""

    def write(*arguments):
        import ray as its

        from omnimerge.engine import ray as real

        note = f"{os.getpid()} {its.get_runtime_context().get_node_id()}"
        (Path(folder) / f"{time.time_ns()}").write_text(note)
        time.sleep(seconds)
        return real.write_pieces(*arguments)

    return write


def runs(folder):
    """(Process, node) of every task that began, in order."""
    notes = [file.read_text().split() for file in sorted(folder.iterdir())]
    return [(int(note[0]), note[1]) for note in notes if len(note) == 2]


@contextlib.contextmanager
def meanwhile(do):
    thread = threading.Thread(target=do)
    thread.start()
    yield
    thread.join()


def wait_for(what, seconds=30.0):
    end = time.monotonic() + seconds
    while not what() and time.monotonic() < end:
        time.sleep(0.01)
    assert what()


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("ties", {"threshold_scope": "model"}),  # histograms of the whole model
        ("metagpt", {}),  # sums of floats over the whole model
        ("pcb", {"threshold_scope": "model"}),  # four passes
        ("dare_linear", {"density": 0.3}),  # random numbers
        ("ties", {}),  # thresholds of every tensor
        ("wudi", {}),  # whole matrices
    ],
)
def test_the_bytes_are_those_of_a_local_merge(cluster, experts, tmp_path, method, parameters):
    recipe = {"method": method, "parameters": parameters, **experts}
    merge(recipe, tmp_path / "local")
    seen = []
    plan = merge(
        recipe, tmp_path / "ray", executor="ray", on_progress=lambda *now: seen.append(now)
    )
    assert files(tmp_path / "ray") == files(tmp_path / "local")
    assert seen[0] == (0, plan.bytes_to_write) and len(seen) > 10
    assert seen[-1] == (plan.bytes_to_write, plan.bytes_to_write)


def test_adamms_from_relative_paths(cluster, checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(checkpoints("qwen2_vl").parent)
    target, donor = checkpoints("qwen2_vl").name, checkpoints("llava_onevision").name
    recipe = {
        "method": "adamms", "target": target, "models": [donor], "parameters": {"alpha": 0.3},
    }  # fmt: skip
    merge(recipe, tmp_path / "local")
    merge(recipe, tmp_path / "ray", executor="ray")
    assert files(tmp_path / "ray") == files(tmp_path / "local")


@pytest.mark.parametrize("method", ["task_arithmetic", "optmerge"])
def test_adapters(cluster, checkpoints, tmp_path, method):
    folder = checkpoints("qwen2_vl")
    for seed in (1, 2):
        model = tiny_models.load("qwen2_vl", folder)
        tiny_adapters.save(model, tmp_path / f"adapter{seed}", seed=seed)
    entries = [{"adapter": str(tmp_path / f"adapter{seed}")} for seed in (1, 2)]
    recipe = {"method": method, "base": str(folder), "models": entries}
    merge(recipe, tmp_path / "local")
    merge(recipe, tmp_path / "ray", executor="ray")
    assert files(tmp_path / "ray") == files(tmp_path / "local")


def test_nothing_listens_beyond_this_machine(cluster):
    seen, beyond = listening.sockets_of("ray")
    assert seen >= 5 and beyond == []


def test_an_error_of_a_task_is_that_of_a_local_merge(cluster, recipe, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(recipe["models"][1], broken)
    tensors = load_file(broken / "model.safetensors")
    name = next(n for n in tensors if "layers.1.mlp.up_proj" in n)
    tensors[name].view(-1)[77] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    said = []
    for method, scope in (("dare_linear", {}), ("ties", {"threshold_scope": "model"})):
        bad = {**recipe, "method": method, "models": [recipe["models"][0], str(broken)]}
        for executor in ("local", "ray"):
            with pytest.raises(NonFiniteError) as error:
                merge({**bad, "parameters": scope}, tmp_path / "out", executor=executor)
            said.append(str(error.value))
    assert said[0] == said[1] and "holds NaN or infinity" in said[0] and "\n" not in said[0]
    assert said[2] == said[3]
    assert [p.name for p in tmp_path.iterdir()] == ["broken"]


@pytest.mark.parametrize("what", ["file", "folder", "version"])
def test_a_machine_that_sees_something_else_refuses(cluster, recipe, tmp_path, monkeypatch, what):
    donor = tmp_path / "donor"
    shutil.copytree(recipe["models"][1], donor)
    recipe = {**recipe, "models": [recipe["models"][0], str(donor)]}
    real = ray_module.describe_work

    def other(*arguments):
        work = real(*arguments)
        if what == "file":
            os.utime(donor / "model.safetensors", (1, 1))
        elif what == "folder":
            return dataclasses.replace(
                work, recipe={**work.recipe, "base": "/nowhere"}, key=f"{work.key}+"
            )
        else:
            work.seen["version of torch"] = "0.1"
        return work

    monkeypatch.setattr(ray_module, "describe_work", other)
    expected = {
        "file": r"does not see what the driver sees: modified_ns of .*/donor/model.safetensors;",
        "folder": r"cannot do what the driver can: there is no folder /nowhere",
        "version": r"does not see what the driver sees: version of torch; all machines have to",
    }
    with pytest.raises(ExecutorError, match=expected[what]):
        merge(recipe, tmp_path / "out", executor="ray")
    assert not (tmp_path / "out").exists() and leftovers(tmp_path / "out") == []


def test_a_task_that_comes_late_touches_no_other_merge(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"another merge's")
    (tmp_path / "omnimerge.journal").write_text('{"merge":"another"}\n[]\n')
    work = worker.Work({}, (), (), {}, str(tmp_path), "ours")
    with pytest.raises(ExecutorError, match="belongs to another merge by now"):
        worker._file_of(work, "model.safetensors", os.O_WRONLY)
    with pytest.raises(ExecutorError, match="has to lie on storage that all machines share"):
        worker._file_of(work, "model-2.safetensors", os.O_WRONLY)


def test_a_write_that_the_storage_lost_is_found(tmp_path):
    (tmp_path / "f").write_bytes(b"head" + b"\0" * 4096)
    (tmp_path / "omnimerge.journal").write_text('{"merge":"k"}\n')
    work = worker.Work({}, (), (), {}, str(tmp_path), "k")
    written = []
    worker._append(written, 4, memoryview(b"\0" * 96))
    worker._append(written, 100, memoryview(b"\0" * 4))
    worker._append(written, 300, memoryview(b"\0" * 4))
    assert [each[:2] for each in written] == [(4, 104), (300, 304)]
    assert len(worker.read_back(work, "f", written)) == 64
    worker._append(written, 304, memoryview(b"lost"))
    with pytest.raises(OutputError, match=r"at bytes 300 to 308: .* not coherent"):
        worker.read_back(work, "f", written)


def test_a_process_keeps_no_buffers_for_its_next_task(recipe, tmp_path, monkeypatch):
    """The next task may be of smaller tensors, and have asked for less memory."""
    plan = omnimerge.plan({**recipe, "method": "linear"}, force=["ancestor"])
    monkeypatch.setitem(worker._opened, "k", types.SimpleNamespace(plan=plan, worker=None))
    number = next(n for n, job in enumerate(plan.jobs) if job.merged)
    size = plan.jobs[number].output.nbytes
    (tmp_path / "f").write_bytes(bytes(size))
    (tmp_path / "omnimerge.journal").write_text('{"merge":"k"}\n')
    work = worker.Work({}, (), (), {}, str(tmp_path), "k")
    pieces = [worker.Piece(number, 0, tuple(slices.slices_of(plan, plan.jobs[number])))]
    ((start, stop, _),) = worker.write_pieces(work, None, "f", pieces)
    assert (start, stop) == (0, size) and any((tmp_path / "f").read_bytes())
    kept = worker._opened["k"].worker
    assert not kept._raw and not kept._floats


def test_a_killed_process(cluster, recipe, tmp_path, monkeypatch):
    merge(recipe, tmp_path / "local")
    notes = tmp_path / "notes"
    notes.mkdir()
    monkeypatch.setattr(ray_module, "write_pieces", slowly(str(notes), 0.1))
    seen = []

    def kill():
        wait_for(lambda: len(runs(notes)) >= 4)
        os.kill(runs(notes)[-1][0], signal.SIGKILL)

    with meanwhile(kill):
        merge(recipe, tmp_path / "ray", executor="ray", on_progress=lambda *now: seen.append(now))
    assert files(tmp_path / "ray") == files(tmp_path / "local")
    assert len({process for process, _ in runs(notes)}) == 3  # one was replaced
    assert seen[-1][0] == seen[-1][1]


def test_interrupted_here_resumed_there(cluster, recipe, tmp_path, monkeypatch):
    merge(recipe, tmp_path / "whole")
    notes = tmp_path / "notes"
    notes.mkdir()
    monkeypatch.setattr(ray_module, "write_pieces", slowly(str(notes), 0.05))

    noted = []

    def note(done, total):
        noted.append(done)

    def stop(done, total):
        if done > 0.4 * total:
            raise KeyboardInterrupt

    for first, second in (("local", "ray"), ("ray", "local"), ("ray", "ray")):
        out = tmp_path / f"{first}-{second}"
        with pytest.raises(KeyboardInterrupt):
            merge(recipe, out, executor=first, on_progress=stop)
        assert [each.resumable for each in leftovers(out)] == [True]
        noted.clear()
        merge(recipe, out, executor=second, resume=True, on_progress=note)
        assert noted[0] > 0
        assert files(out) == files(tmp_path / "whole")


def test_the_command(cluster, recipe, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe))

    def run(*arguments):
        return CliRunner().invoke(main, ["merge", str(file), "--force", "ancestor", *arguments])

    merge(recipe, tmp_path / "local")
    done = run("-o", str(tmp_path / "ray"), "--executor", "ray")
    assert done.exit_code == 0, done.output
    assert "wrote " in done.output
    assert files(tmp_path / "ray") == files(tmp_path / "local")
    out = ("-o", str(tmp_path / "out"))
    for options, why in (
        (("--executor", "ray", "--memory", "2GB"), "give every machine's memory to"),
        (("--address", "auto"), "--address is for --executor ray"),
        (("--executor", "ray", "--as-adapter", "4"), "--as-adapter runs on this machine"),
        (("--executor", "ray", "--address", ""), "--address is empty; give auto or host:port"),
    ):
        refused = run(*out, *options)
        assert refused.exit_code == 2 and why in refused.output
    refused = run(*out, "--executor", "ray", "--address", "ray://127.0.0.1:10001")
    assert (
        refused.exit_code == 1 and "run the command on a machine of the cluster" in refused.output
    )


def test_without_ray_there_is_one_line(recipe, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ExecutorError, match=r"needs Ray, which is not installed; `pip install"):
        merge(recipe, tmp_path / "out", executor="ray")
    with pytest.raises(omnimerge.OmnimergeError, match="'rai' is none, did you mean 'ray'"):
        merge(recipe, tmp_path / "out", executor="rai")


def test_an_address_where_nobody_listens():
    with pytest.raises(ExecutorError, match=r"cannot reach a Ray cluster \(127.0.0.1:9\): "):
        ray_module._knock("127.0.0.1:9")
    ray_module._knock("auto")


def test_checkpoints_at_urls(cluster, recipe, tmp_path, monkeypatch):
    merge(recipe, tmp_path / "local")
    urls = {key: Path(recipe[key]).as_uri() for key in ("base",)}
    urls["models"] = [Path(each).as_uri() for each in recipe["models"]]
    monkeypatch.setenv("OMNIMERGE_CACHE", str(tmp_path / "the driver's own"))
    merge(recipe | urls, tmp_path / "ray", executor="ray")
    differ = {"merge_manifest.json", "README.md"}  # which name the inputs
    near, far = files(tmp_path / "local"), files(tmp_path / "ray")
    assert near.keys() == far.keys()
    assert {str(name) for name in near if near[name] != far[name]} <= differ


def test_a_cluster_without_a_cpu_is_not_waited_for(monkeypatch):
    cancelled = []

    class Empty:
        def wait(self, references, **options):
            return [], references

        def cluster_resources(self):
            return {}

        def cancel(self, reference):
            cancelled.append(reference)

    monkeypatch.setattr(ray_module, "connect", lambda address: (Empty(), False))
    monkeypatch.setattr(ray_module, "_PATIENCE", 0.05)
    with pytest.raises(ExecutorError, match="no machine of the Ray cluster had a CPU"):
        list(ray_module.RayExecutor().results(["one", "two"]))
    assert cancelled == ["one", "two"]


def test_integers_are_summed_where_they_are_counted(experts):
    plan = omnimerge.plan({"method": "ties", **experts, "parameters": {"threshold_scope": "model"}})
    known = plan.method.new_statistics(2, plan.recipe.all_parameters)
    some = list(knowledge.measured_slices(plan))[:5]
    (total,) = knowledge.measure_all(known, 0, some)
    assert int(total[0].sum()) == sum(stop - start for _, start, stop in some)
    plan = omnimerge.plan({"method": "metagpt", **experts})
    known = plan.method.new_statistics(2, plan.recipe.all_parameters)
    found = knowledge.measure_all(known, 0, some)
    assert len(found) == 5 and all(each.dtype == torch.float64 for each in found)


def test_a_killed_node(cluster, recipe, tmp_path, monkeypatch):
    merge(recipe, tmp_path / "local")
    notes = tmp_path / "notes"
    notes.mkdir()
    monkeypatch.setattr(ray_module, "write_pieces", slowly(str(notes), 0.2))
    lost = []

    def kill():
        wait_for(lambda: len({node for _, node in runs(notes)}) == 2 and len(runs(notes)) >= 4)
        node = next(n for n in cluster.worker_nodes if n.node_id == runs(notes)[-1][1])
        lost.append((node.node_id, len(runs(notes))))
        cluster.remove_node(node, allow_graceful=False)

    with meanwhile(kill):
        merge(recipe, tmp_path / "ray", executor="ray")
    assert files(tmp_path / "ray") == files(tmp_path / "local")
    ((gone, before),) = lost
    after = runs(notes)[before + 1 :]
    assert len(after) >= 4 and gone not in {node for _, node in after}


# From here on there is one node less.

DRIVER = """
import json, sys
import omnimerge
from omnimerge.checkpoint import journal
from omnimerge.engine import ray as ray_module, slices
sys.path.insert(0, sys.argv[4])
from test_ray import slowly
import ray
ray.cloudpickle.register_pickle_by_value(sys.modules["test_ray"])
slices.CHUNK_ELEMENTS, ray_module._LEAST, journal.INTERVAL = 1000, 1, 0.01
ray_module.write_pieces = slowly(sys.argv[3], 0.2)
recipe = json.loads(sys.argv[1])
omnimerge.merge(recipe, sys.argv[2], force=["ancestor"], executor="ray", address="auto")
"""


def test_resumed_after_the_driver_was_killed(cluster, recipe, tmp_path):
    merge(recipe, tmp_path / "whole")
    out, notes = tmp_path / "out", tmp_path / "notes"
    notes.mkdir()
    support = Path(__file__).parents[1] / "support"
    path = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(support)])
    arguments = [json.dumps(recipe), str(out), str(notes), str(Path(__file__).parent)]
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, *arguments],
        env={**os.environ, "PYTHONPATH": path, "RAY_ADDRESS": cluster.address},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    hidden = tmp_path / ".out.omnimerge" / "omnimerge.journal"
    with contextlib.suppress(AssertionError):  # then what it said is shown
        wait_for(lambda: hidden.exists() and hidden.read_bytes().count(b"\n") > 6, 60)
    driver.kill()
    said = driver.communicate()[1].decode()
    assert driver.returncode == -signal.SIGKILL and hidden.exists(), said
    seen = []
    merge(recipe, out, resume=True, on_progress=lambda *now: seen.append(now))
    assert seen[0][0] > 0
    assert files(out) == files(tmp_path / "whole")

"""Merging on accelerators, with a device that is none (`pretend_device`); `test_gpu` has one."""

import json
import shutil
import threading
from types import SimpleNamespace

import pretend_device
import pytest
import tiny_adapters
import tiny_models
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import omnimerge
from omnimerge.checkpoint import Checkpoint
from omnimerge.cli import main
from omnimerge.engine import accelerated, build_plan, devices, load_recipe, run_plan
from omnimerge.engine.accelerated import DeviceExecutor
from omnimerge.engine.lane import Lane
from omnimerge.errors import CheckpointError, ExecutorError, NonFiniteError, RecipeError
from omnimerge.methods import all_methods

ROOM = 1 << 34
NEEDED = {"adamms": {"alpha": 0.3}, "nearswap": {"t": 0.01}, "slerp": {"t": 0.3}}
WEIGHT = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def recipe(checkpoints):
    return recipe_of("linear", checkpoints)


def recipe_of(name, checkpoints, **parameters):
    """A recipe of any method: two experts of one base."""
    base, *experts = (str(checkpoints("qwen2_vl", own=own)) for own in ("base", "e0", "e1"))
    method = all_methods()[name]
    found = {"method": name, "base": base, "models": experts[: method.models[1] or 2], "seed": 3}
    found["parameters"] = NEEDED.get(name, {}) | parameters
    return found


def on_device(recipe, out, *, memory=10**9, names=(pretend_device.NAME,), made=None, **options):
    free = options.pop("free", lambda device: ROOM)
    executor = DeviceExecutor(names, memory, pretend_device.lanes(made), free)
    run_plan(build_plan(load_recipe(recipe), ancestor=False), out, executor=executor, **options)
    return (out / "model.safetensors").read_bytes()


def on_cpu(recipe, out, **options):
    run_plan(build_plan(load_recipe(recipe), ancestor=False), out, **options)
    return (out / "model.safetensors").read_bytes()


def half(folder, to, dtype=torch.bfloat16):
    """A copy of a checkpoint in another dtype."""
    shutil.copytree(folder, to)
    file = to / "model.safetensors"
    tensors = {k: v.to(dtype) if v.ndim > 1 else v for k, v in load_file(file).items()}
    save_file(tensors, file)
    return str(to)


@pytest.fixture
def small(monkeypatch):
    """Slices and pieces so small that every tensor takes several."""
    monkeypatch.setattr("omnimerge.engine.accelerated.CHUNK_ELEMENTS", 2500)
    monkeypatch.setattr("omnimerge.engine.accelerated._ELEMENTS", 2500)
    monkeypatch.setattr("omnimerge.engine.accelerated._SMALLEST_PIECE", 4096)
    monkeypatch.setattr("omnimerge.engine.accelerated._LARGEST_PIECE", 4096)
    monkeypatch.setattr("omnimerge.engine.knowledge.MEASURED_ELEMENTS", 3000)


def test_products_are_of_float32(checkpoints, tmp_path):
    """Whatever the process had asked for, which is put back."""
    seen = []
    settings = torch.backends.cuda.matmul

    def lane(device, piece):
        seen.append(settings.fp32_precision)
        return pretend_device.lanes(None)(device, piece)

    plan = build_plan(load_recipe(recipe_of("linear", checkpoints)), ancestor=False)
    settings.fp32_precision = "tf32"
    try:
        executor = DeviceExecutor((pretend_device.NAME,), 10**9, lane, lambda device: ROOM)
        run_plan(plan, tmp_path / "out", executor=executor)
        assert set(seen) == {"ieee"} and len(seen) >= 2
        assert settings.fp32_precision == "tf32"
    finally:
        settings.fp32_precision = "none"


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("CUDA out of memory. Tried to allocate 2 GiB", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`", True),
        (
            "cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(h)`",
            True,
        ),
        (
            "cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED, when calling `cusolverDnSsyevd`",
            False,
        ),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_what_says_that_memory_is_short(said, expected):
    assert accelerated._out_of_memory(RuntimeError(said)) is expected


@pytest.mark.parametrize("name", [n for n, m in all_methods().items() if not m.adapters_only])
def test_every_method_runs_there_to_the_same_bytes(name, checkpoints, tmp_path, small):
    recipe = recipe_of(name, checkpoints)
    assert on_device(recipe, tmp_path / "there") == on_cpu(recipe, tmp_path / "here")


@pytest.mark.parametrize("name", ["ties", "consensus_ties", "pcb"])
@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_thresholds_of_tensors_and_of_models(name, scope, checkpoints, tmp_path, small):
    recipe = recipe_of(name, checkpoints, threshold_scope=scope)
    assert on_device(recipe, tmp_path / "there") == on_cpu(recipe, tmp_path / "here")


@pytest.mark.parametrize("name", [n for n, m in all_methods().items() if m.low_rank])
def test_adapters(name, checkpoints, tmp_path, small):
    base = checkpoints("qwen2_vl")
    for number in range(2):
        model = tiny_models.load("qwen2_vl", base)
        tiny_adapters.save(model, tmp_path / f"lora{number}", seed=number)
    models = [{"adapter": str(tmp_path / f"lora{number}")} for number in range(2)]
    recipe = {"method": name, "base": str(base), "models": models, "seed": 3}
    assert on_device(recipe, tmp_path / "there") == on_cpu(recipe, tmp_path / "here")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_dtypes(dtype, stored, checkpoints, tmp_path, small):
    recipe = recipe_of("task_arithmetic", checkpoints, scale=0.5)
    recipe["models"][0] = half(recipe["models"][0], tmp_path / "expert", stored)
    recipe["dtype"] = dtype
    assert on_device(recipe, tmp_path / "there") == on_cpu(recipe, tmp_path / "here")


def test_lines_and_the_targets_own_rows(checkpoints, tmp_path, small):
    recipe = {**recipe_of("ties", checkpoints), "lines": {"alpha": 0.5, "beta": 0.5}}
    assert on_device(recipe, tmp_path / "there") == on_cpu(recipe, tmp_path / "here")


def test_several_devices_share_the_work(recipe, tmp_path, small):
    used = {}

    def make(device, piece):
        copies = pretend_device.LateCopies()
        used.setdefault(device, []).append(copies)
        return Lane(pretend_device.NAME, piece, copies)

    executor = DeviceExecutor(["meta:0", "meta:1"], 10**9, make, lambda device: ROOM)
    run_plan(build_plan(load_recipe(recipe)), tmp_path / "two", executor=executor)
    written = (tmp_path / "two" / "model.safetensors").read_bytes()
    assert written == on_cpu(recipe, tmp_path / "here")
    assert {name: len(lanes) for name, lanes in used.items()} == {"meta:0": 2, "meta:1": 2}
    assert all(any(lane.most > 0 for lane in lanes) for lanes in used.values())
    manifest = json.loads((tmp_path / "two" / "merge_manifest.json").read_text())
    assert manifest["devices"] == {"meta:0": "meta:0", "meta:1": "meta:1"}


def test_the_next_buffer_is_filled_while_one_is_under_way(recipe, tmp_path, small):
    made = []
    on_device(recipe, tmp_path / "out", made=made)
    assert [lane.most for lane in made] == [4] * len(made)  # two on the way there, two back


def test_lanes_work_at_the_same_time(recipe, tmp_path, monkeypatch):
    both, real = threading.Barrier(2, timeout=20), Lane.read

    def read(self, *where):
        if not both.broken and not getattr(self, "met", False):
            self.met = True
            both.wait()  # until the other lane reads too
        return real(self, *where)

    monkeypatch.setattr(Lane, "read", read)
    monkeypatch.setattr(accelerated, "worker_count", lambda: 2)
    on_device(recipe, tmp_path / "out")
    assert not both.broken


@pytest.mark.parametrize("memory", [1 << 20, 1 << 24, 10**9])
def test_the_hosts_buffers_stay_within_half_of_the_memory(recipe, tmp_path, memory):
    made = []
    on_device(recipe, tmp_path / "out", memory=memory, made=made)
    used = sum(sum(lane.buffers) for lane in made)
    assert all(len(lane.buffers) == 4 for lane in made)
    assert used <= memory // 2
    assert used >= memory // 4 or max(made[0].buffers) == 1 << 24


def test_slices_are_as_small_as_the_devices_memory_asks_for(recipe, tmp_path, monkeypatch):
    seen = []
    real = accelerated.Todo.__init__
    monkeypatch.setattr(
        accelerated.Todo,
        "__init__",
        lambda self, plan, writer, memory, elements: (
            seen.append(elements),
            real(self, plan, writer, memory, elements),
        )[-1],
    )
    monkeypatch.setattr(accelerated, "worker_count", lambda: 4)
    for free in (1 << 20, 1 << 30, 1 << 36):
        on_device(recipe, tmp_path / str(free), free=lambda device, free=free: free)
    # 0.8 of the memory for 4 lanes, 2 * 8 * (2 models + 4) bytes an element
    assert seen == [1 << 18, int(0.8 * (1 << 30)) // (4 * 96), 1 << 22]


def no_memory(monkeypatch, times, error=torch.cuda.OutOfMemoryError):
    left, real = (
        [error("CUDA out of memory") for _ in range(times)],
        accelerated.SliceWorker.compute,
    )

    def compute(self, job, *where):
        if job.merged and self._lane is not None and left:
            raise left.pop()
        return real(self, job, *where)

    monkeypatch.setattr(accelerated.SliceWorker, "compute", compute)


def test_a_device_without_memory_is_tried_again_alone(recipe, tmp_path, monkeypatch):
    expected = on_cpu(recipe, tmp_path / "here")
    monkeypatch.setattr(accelerated, "worker_count", lambda: 1)
    no_memory(monkeypatch, 1)
    assert on_device(recipe, tmp_path / "there") == expected


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError, RuntimeError])
def test_a_device_without_memory_is_said(recipe, tmp_path, monkeypatch, error):
    no_memory(monkeypatch, 100, error)
    with pytest.raises(
        ExecutorError, match=r"meta has too little memory for tensor '.*--device cpu"
    ):
        on_device(recipe, tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_another_error_is_no_lack_of_memory(recipe, tmp_path, monkeypatch):
    def fail(self, *where):
        raise RuntimeError("a bug")

    monkeypatch.setattr(accelerated.SliceWorker, "compute", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        on_device(recipe, tmp_path / "out")


@pytest.mark.parametrize(
    ("dtype", "value", "words"),
    [
        ("float16", 7e4, "overflows float16"),
        ("float8_e4m3fn", 500.0, "overflows float8_e4m3fn"),
        ("float8_e5m2", 7e4, "overflows float8_e5m2"),
    ],
)
def test_overflow_and_nan_are_found_there(recipe, tmp_path, dtype, value, words):
    for number, number_of in ((value, words), (float("nan"), "holds NaN or infinity")):
        folder = tmp_path / f"expert{number}"
        shutil.copytree(recipe["models"][0], folder)
        tensors = load_file(folder / "model.safetensors")
        tensors[WEIGHT][3, 5] = number
        save_file(tensors, folder / "model.safetensors")
        bad = {**recipe, "models": [str(folder), str(folder)], "dtype": dtype}
        with pytest.raises(NonFiniteError, match=number_of):
            on_device(bad, tmp_path / "out")


def test_an_input_that_ends_early_is_said(recipe, tmp_path, small):
    folder = tmp_path / "expert"
    shutil.copytree(recipe["models"][0], folder)
    plan = build_plan(load_recipe({**recipe, "models": [str(folder), recipe["models"][1]]}))
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, 2) - 1000)
    executor = DeviceExecutor([pretend_device.NAME], 10**9, pretend_device.lanes(), lambda d: ROOM)
    with pytest.raises(CheckpointError, match="changed while it was merged"):
        run_plan(plan, tmp_path / "out", executor=executor)


def test_the_manifest_says_the_device_and_verify_computes_again(checkpoints, tmp_path):
    for name in ("linear", "tsv"):
        out = tmp_path / name
        on_device(recipe_of(name, checkpoints), out)
        manifest = json.loads((out / "merge_manifest.json").read_text())
        assert manifest["devices"] == {"meta": "meta"}
        assert {c.state for c in omnimerge.verify(out, deep=True)} == {"ok"}
    on_cpu(recipe_of("linear", checkpoints), tmp_path / "cpu")
    assert "devices" not in json.loads((tmp_path / "cpu" / "merge_manifest.json").read_text())


@pytest.mark.parametrize(
    ("name", "noise", "state"),
    [("tsv", 1e-4, "ok"), ("tsv", 0.1, "failed"), ("linear", 1e-6, "failed")],
)
def test_verify_tolerates_rounding_of_spectral_methods_only(
    name, noise, state, checkpoints, tmp_path
):
    recipe, out = recipe_of(name, checkpoints), tmp_path / "out"
    on_device(recipe, out)
    tensors = load_file(out / "model.safetensors")
    base = Checkpoint.open(recipe["base"]).read_tensor(WEIGHT)
    tensors[WEIGHT] += noise * (tensors[WEIGHT] - base)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    again = omnimerge.verify(out, deep=True, tensors=1000)[-1]
    assert again.name == "1000 merged tensors computed again" and again.state == state
    manifest = json.loads((out / "merge_manifest.json").read_text())
    del manifest["devices"]  # what the CPU merged has the CPU's bits
    (out / "merge_manifest.json").write_text(json.dumps(manifest))
    assert omnimerge.verify(out, deep=True, tensors=1000)[-1].state == "failed"


@pytest.mark.parametrize("name", ["linear", "tsv"])
def test_the_device_counts_for_a_resumed_merge_where_the_bits_differ(name, checkpoints, tmp_path):
    from omnimerge.engine.inputs import InputFiles, merge_key

    plan = build_plan(load_recipe(recipe_of(name, checkpoints)), ancestor=False)
    files = InputFiles(plan)
    keys = {
        merge_key(plan, files, found)
        for found in (None, {}, {"cuda:0": "H200"}, {"cuda:1": "H200"}, {"cuda:0": "L4"})
    }
    assert len(keys) == (1 if name == "linear" else 3)


@pytest.fixture
def gpus(monkeypatch):
    """A machine with GPUs, as far as names go."""

    def set_up(count, broken=()):
        def ones(*shape, device):
            if device in broken:
                raise RuntimeError("CUDA error: all CUDA-capable devices are busy\nmore")
            return torch.ones(*shape)

        fake = SimpleNamespace(
            device_count=lambda: count, get_device_name=lambda device: f"H200 no. {device[5:]}"
        )
        monkeypatch.setattr(
            devices,
            "torch",
            SimpleNamespace(cuda=fake, ones=ones, device=torch.device, version=torch.version),
        )

    return set_up


@pytest.mark.parametrize(
    ("text", "count", "found"),
    [
        ("cpu", 2, ()),
        ("auto", 0, ()),
        ("auto", 2, ("cuda:0", "cuda:1")),
        ("cuda", 2, ("cuda:0",)),
        ("cuda:1", 2, ("cuda:1",)),
        ("cuda:1, cuda:0,cuda:1", 2, ("cuda:1", "cuda:0")),
    ],
)
def test_names_of_devices(text, count, found, gpus):
    gpus(count)
    assert devices.devices_named(text) == found


@pytest.mark.parametrize(
    ("text", "count", "words"),
    [
        (
            "gpu",
            1,
            r"'gpu' is none that merges run on; give cpu, auto, .*; here: cpu, cuda:0 \(H200",
        ),
        ("cuda:x", 0, r"'cuda:x' is none"),
        ("cpu,cuda", 1, r"'cpu' is none"),
        ("", 1, r"'' is none"),
        (
            "cuda:2",
            2,
            r"cuda:2 is not there; here: cpu, cuda:0 \(H200 no. 0\), cuda:1 \(H200 no. 1",
        ),
        ("cuda", 0, r"cuda:0 is not there \((this torch is built|torch finds no).*; here: cpu$"),
        ("cuda:1", 2, r"cuda:1 cannot be used \(CUDA error: all CUDA-capable devices are busy\)"),
    ],
)
def test_devices_that_are_not_there(text, count, words, gpus):
    gpus(count, broken=["cuda:1"])
    with pytest.raises(RecipeError, match=words):
        devices.devices_named(text)


def test_auto_leaves_out_what_cannot_be_used(gpus):
    gpus(2, broken=["cuda:1"])
    assert devices.devices_named("auto") == ("cuda:0",)


def run(*arguments):
    return CliRunner().invoke(main, [str(each) for each in arguments])


def test_the_command_refuses_before_it_reads(gpus, tmp_path):
    gpus(0)
    for more, words in (
        (("--device", "cuda"), "device: cuda:0 is not there"),
        (("--device", "cuda", "--executor", "ray"), "device: cuda goes with executor local"),
        (("--device", "tpu"), "'tpu' is none that merges run on"),
    ):
        result = run("merge", tmp_path / "none.yaml", "-o", tmp_path / "out", *more)
        assert result.exit_code == 1, result.output
        assert words in result.output and result.output.count("\n") == 1
    result = run("merge", "x.yaml", "-o", "out", "--device", "cuda", "--as-adapter", "4")
    assert result.exit_code == 2 and "--as-adapter merges on the CPU" in result.output
    with pytest.raises(RecipeError, match="cuda:0 is not there"):
        omnimerge.merge(tmp_path / "none.yaml", tmp_path / "out", device="cuda")
    with pytest.raises(RecipeError, match="goes with executor local"):
        omnimerge.merge(tmp_path / "none.yaml", tmp_path / "out", device="auto", executor="ray")


def test_auto_says_what_it_stands_for(gpus, recipe, tmp_path):
    gpus(0)
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    result = run("merge", tmp_path / "recipe.yaml", "-o", tmp_path / "out", "--device", "auto")
    assert result.exit_code == 0
    assert "device auto: cpu; torch finds no CUDA GPU\n" in result.output
    assert (
        on_cpu(recipe, tmp_path / "here") == (tmp_path / "out" / "model.safetensors").read_bytes()
    )


def test_the_command_merges_on_the_devices(gpus, recipe, tmp_path, monkeypatch):
    gpus(2)
    given = []

    def on(names, memory):
        given.append((names, memory))
        make = pretend_device.lanes()
        executor = DeviceExecutor((), memory, lambda d, p: make("meta", p), lambda d: ROOM)
        executor.devices = {each: devices.describe_device(each) for each in names}
        return executor

    monkeypatch.setattr("omnimerge.engine.execute.DeviceExecutor", on)
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    more = ("--device", "auto", "--memory", "200MB")
    result = run("merge", tmp_path / "recipe.yaml", "-o", tmp_path / "out", *more)
    assert "device auto: cuda:0 (H200 no. 0), cuda:1 (H200 no. 1)\n" in result.output
    assert given == [(("cuda:0", "cuda:1"), 200_000_000)]
    manifest = json.loads((tmp_path / "out" / "merge_manifest.json").read_text())
    assert manifest["devices"] == {"cuda:0": "H200 no. 0", "cuda:1": "H200 no. 1"}

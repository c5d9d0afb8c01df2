"""Carry out a plan on a Ray cluster: the machines read and write storage that all of them see.

Only the recipe travels, and which elements a task is about; for methods that look at the whole
model first, what they counted. The driver keeps the lock, the journal and the commit. A task writes
at its places in the files of the hidden folder, waits for the disk, and answers which bytes it
wrote, with a checksum; when a file is complete, a task reads it back for the manifest.

A task is a function of its arguments: one whose machine is lost is done again elsewhere, and writes
the same bytes. Tasks that outlive their driver write these bytes too, or find another folder.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from types import MappingProxyType
from typing import Any

from torch import Tensor

from omnimerge.checkpoint import CheckpointWriter
from omnimerge.checkpoint.dtypes import item_size
from omnimerge.checkpoint.shard import ShardFile
from omnimerge.engine.executor import Report, Task, tasks_left
from omnimerge.engine.inputs import InputFiles
from omnimerge.engine.knowledge import Pass, measured_slices, model_statistics
from omnimerge.engine.plan import MergePlan
from omnimerge.engine.worker import Piece, Written, describe_work, measure, read_back, write_pieces
from omnimerge.errors import ExecutorError, OmnimergeError
from omnimerge.methods import Statistics

# Read when Ray is imported, for a cluster on this machine alone.
_ALONE = {
    # Without it, it listens on all of the machine's addresses, and takes 127.0.0.1 for none.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent home
    "RAY_AUTH_MODE": "token",  # its own default, without a line about it
}
_ATTEMPTS = 5
# Tasks for each CPU of the cluster, so that none waits long for the last one; and their bounds.
_TASKS_PER_CPU, _LEAST, _MOST = 8, 8 * 10**6, 256 * 10**6
_PROCESS = 500 * 10**6  # memory of a Python process with torch, next to its buffers
_PATIENCE = 300.0  # seconds without any CPU in the cluster


class RayExecutor:
    """Tasks of a Ray cluster. See `Executor`.

    Args:
        address: of the cluster, ``auto`` for the one that this machine is part of; None: the one
            that RAY_ADDRESS names, or one on this machine alone, on 127.0.0.1.

    Raises:
        ExecutorError: if Ray is not installed, or the cluster cannot be reached.
    """

    hashes = True
    devices: Mapping[str, str] = MappingProxyType({})

    def __init__(self, address: str | None = None) -> None:
        self._ray, self._started = connect(address)

    def run(
        self, plan: MergePlan, files: InputFiles, writer: CheckpointWriter, report: Report
    ) -> None:
        """Write everything that the writer does not have yet; see `Executor`.

        Args:
            plan: what to do.
            files: its inputs.
            writer: the output.
            report: gets the bytes written.

        Raises:
            ExecutorError: if tasks lose their machines again and again, or there is none.
        """
        tasks = list(tasks_left(plan, writer))
        work = self._ray.put(describe_work(plan, files, writer))
        known = None
        if any(task.job.merged for task in tasks):
            known = model_statistics(plan, measured=self._by_tasks(plan, work))
        run = _Run(self, plan, writer, report)
        run.carry_out(tasks, work, self._ray.put(known))

    def close(self) -> None:
        """Stop Ray where this started it."""
        if self._started:
            self._ray.shutdown()

    def submit(self, function: Any, memory: int, *arguments: Any) -> Any:
        """Start a task on one CPU of any machine.

        Args:
            function: what it runs.
            memory: bytes that it takes.
            *arguments: of the function.

        Returns:
            Ray's reference of the result.
        """
        remote = self._ray.remote(function).options(
            num_cpus=1,
            memory=min(memory, self._largest_memory()),
            max_retries=_ATTEMPTS,
            scheduling_strategy="SPREAD",
        )
        return remote.remote(*arguments)

    def results(self, running: Iterable[Any], *, in_order: bool = False) -> Generator[Any]:
        """Wait for tasks; more of them may be added to `running` meanwhile.

        Args:
            running: references; those that are done are removed where that is possible.
            in_order: whether to keep their order.

        Yields:
            (Reference, result), as they are done.

        Raises:
            ExecutorError: if one loses its machine again and again, or there is none.
        """
        waiting = running if isinstance(running, list) else list(running)
        idle_since = time.monotonic()
        try:
            while waiting:
                first = waiting[:1] if in_order else waiting
                done, _ = self._ray.wait(first, num_returns=1, timeout=5.0)
                if done or self._cpus():
                    idle_since = time.monotonic()
                if time.monotonic() - idle_since > _PATIENCE:
                    raise ExecutorError(
                        f"no machine of the Ray cluster had a CPU to work with for {_PATIENCE:.0f} "
                        "s; see `ray status`"
                    )
                for each in done:
                    waiting.remove(each)
                    yield each, self._result(each)
        except BaseException:  # Ctrl-C too
            for each in waiting:
                self._ray.cancel(each)
            raise

    def grouped(self, sizes: Sequence[int]) -> Iterator[slice]:
        """Cut a list of things with sizes into runs, several for each CPU.

        Args:
            sizes: bytes of each.

        Yields:
            Slices of the list.
        """
        limit = sum(sizes) // (_TASKS_PER_CPU * max(1, self._cpus()))
        limit = min(max(limit, _LEAST), _MOST)
        start, held = 0, 0
        for number, nbytes in enumerate(sizes):
            if held and held + nbytes > limit:
                yield slice(start, number)
                start, held = number, 0
            held += nbytes
        if start < len(sizes):
            yield slice(start, len(sizes))

    def _by_tasks(self, plan: MergePlan, work: Any) -> Pass:
        """Measure the whole model by tasks: what they counted comes back, the driver adds it up."""
        numbers = {job.output.name: number for number, job in enumerate(plan.jobs)}
        slices = [(numbers[job.output.name], *where) for job, *where in measured_slices(plan)]
        sizes = [
            (stop - start) * item_size(plan.jobs[number].output.dtype)
            for number, start, stop in slices
        ]
        groups = [slices[run] for run in self.grouped(sizes)]
        cost = _PROCESS + max(plan.memory_to_measure(job) for job in plan.merged)

        def measured(known: Statistics, number: int) -> Iterator[Tensor]:
            held = self._ray.put(known)
            running = [self.submit(measure, cost, work, held, number, group) for group in groups]
            for _, found in self.results(running, in_order=True):
                yield from found

        return measured

    def _result(self, reference: Any) -> Any:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            cause: object = getattr(error, "cause", None)
            if isinstance(cause, (OmnimergeError, OSError)):
                raise cause from error
            raise
        except self._ray.exceptions.RayError as error:
            raise ExecutorError(
                f"a task lost its machine or its process {_ATTEMPTS + 1} times "
                f"({type(error).__name__}); look at the memory of the machines"
            ) from error

    def _cpus(self) -> int:
        return int(self._ray.cluster_resources().get("CPU", 0))

    def _largest_memory(self) -> int:
        """Of any machine: a task that asks for more would wait for ever."""
        sizes = [n["Resources"].get("memory", 0) for n in self._ray.nodes() if n["Alive"]]
        return int(max(sizes, default=0))


class _Run:
    """One output that is being filled.

    Args:
        executor: where.
        plan: what to do.
        writer: the output.
        report: gets the bytes written.
    """

    def __init__(
        self, executor: RayExecutor, plan: MergePlan, writer: CheckpointWriter, report: Report
    ) -> None:
        self._executor, self._plan = executor, plan
        self._writer, self._report = writer, report
        self._written: dict[str, list[Written]] = {s.path.name: [] for s in writer.files}
        self._groups: dict[str, int] = dict.fromkeys(self._written, 0)
        self._running: list[Any] = []
        self._meaning: dict[Any, tuple[ShardFile, bool]] = {}

    def carry_out(self, tasks: Sequence[Task], work: Any, known: Any) -> None:
        """Write what is missing, then read every file back.

        Args:
            tasks: what is missing, in file order.
            work: what every task gets, in Ray's store.
            known: the method's statistics, in Ray's store.
        """
        for shard, group in self._by_file(tasks):
            cost = _PROCESS + max(self._plan.memory_of(task.job) for task in group)
            pieces = [self._piece(task) for task in group]
            self._groups[shard.path.name] += 1
            self._submit(shard, False, write_pieces, cost, work, known, shard.path.name, pieces)
        for shard in self._writer.files:
            self._read_back_if_complete(shard, work)
        with closing(self._executor.results(self._running)) as results:
            for reference, found in results:
                shard, is_digest = self._meaning.pop(reference)
                if is_digest:
                    self._writer.hashed(shard.path.name, found)
                    continue
                self._take(shard, found)
                self._groups[shard.path.name] -= 1
                self._read_back_if_complete(shard, work)

    def _by_file(self, tasks: Sequence[Task]) -> Iterator[tuple[ShardFile, Sequence[Task]]]:
        for run in self._executor.grouped([task.nbytes for task in tasks]):
            by_file: dict[str, list[Task]] = {}
            files: dict[str, ShardFile] = {}
            for task in tasks[run]:
                shard = self._writer.place(task.job.output.name)[0]
                files[shard.path.name] = shard
                by_file.setdefault(shard.path.name, []).append(task)
            yield from ((files[name], group) for name, group in by_file.items())

    def _piece(self, task: Task) -> Piece:
        offset = self._writer.place(task.job.output.name)[1]
        return Piece(task.number, offset, task.slices)

    def _take(self, shard: ShardFile, written: Sequence[Written]) -> None:
        """The disk has these bytes: the next line of the journal may speak of them."""
        for start, stop, _ in written:
            shard.mark(start, stop)
            self._report(stop - start)
        self._written[shard.path.name].extend(written)

    def _read_back_if_complete(self, shard: ShardFile, work: Any) -> None:
        name = shard.path.name
        if not self._groups[name]:
            found = sorted(self._written[name])
            self._submit(shard, True, read_back, _PROCESS, work, name, found)

    def _submit(
        self, shard: ShardFile, is_digest: bool, function: Any, memory: int, *arguments: Any
    ) -> None:
        reference = self._executor.submit(function, memory, *arguments)
        self._meaning[reference] = shard, is_digest
        self._running.append(reference)


def connect(address: str | None = None) -> tuple[Any, bool]:
    """Join a Ray cluster, or start one on this machine alone.

    Args:
        address: of the cluster, ``auto`` for the one that this machine is part of; None: the one
            that this process is connected to, or RAY_ADDRESS names, or a new one on 127.0.0.1.

    Returns:
        The module, and whether this call connected to a cluster; then call its `shutdown` later.

    Raises:
        ExecutorError: if Ray is not installed, or the cluster cannot be reached.
    """
    if address and address.startswith("ray://"):
        raise ExecutorError(
            f"{address} is an address of Ray's client; run the command on a machine of the "
            "cluster, with --address auto"
        )
    alone = not address and not os.environ.get("RAY_ADDRESS")
    if alone and "ray" not in sys.modules:
        for name, value in _ALONE.items():
            os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise ExecutorError(
            "executor ray needs Ray, which is not installed; `pip install omnimerge[ray]`, or use "
            "the local executor"
        ) from error
    if ray.is_initialized():
        return ray, False
    options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    options |= {"address": "local", "include_dashboard": False} if alone else {"address": address}
    if not alone:
        _knock(address or os.environ["RAY_ADDRESS"])
    main = threading.current_thread() is threading.main_thread()
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        where = address or os.environ.get("RAY_ADDRESS") or "on this machine"
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ExecutorError(
            f"cannot reach a Ray cluster ({where}): {reason}; start one with `ray start --head`"
        ) from error
    finally:
        if main:  # Ray takes SIGTERM for itself, and would leave without a word
            signal.signal(signal.SIGTERM, on_sigterm)
    return ray, True


def _knock(address: str) -> None:
    """Say at once that nobody answers; Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10.0).close()
    except OSError as error:
        reason = error.strerror or error
        raise ExecutorError(
            f"cannot reach a Ray cluster ({address}): {reason}; see `ray status` on its head"
        ) from error

"""Several models at once: one Ray actor for each, on one machine or a cluster.

Only the recipe, coefficients, prompts and answers travel; every actor reads the weights from the
folders that the recipe names, which all machines must see. A lost actor is replaced, and what it
was answering is asked again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omnimerge.engine.ray import connect
from omnimerge.errors import OmnimergeError, SearchError

if TYPE_CHECKING:
    from omnimerge.generate import Prompt, Response
    from omnimerge.search.executor import Answers, Settings, Task

_ATTEMPTS = 3


class RayExecutor:
    """Actors that answer tasks, as many as the cluster has GPUs, or as are asked for.

    Args:
        settings: what to do.
        replicas: number of actors; None: one for each GPU, or one where there is none.

    Raises:
        ExecutorError: if Ray is not installed, or its cluster cannot be reached.
    """

    def __init__(self, settings: Settings, replicas: int | None = None) -> None:
        self._ray, self._started = connect()
        gpus = int(self._ray.cluster_resources().get("GPU", 0))
        on_gpu = settings.device.startswith("cuda")
        self._count = replicas or (gpus if on_gpu else 1) or 1
        self._options = {"num_gpus": 1 if on_gpu else 0, "num_cpus": 1}
        self._settings = settings
        self._described = _described(settings)
        self._actors: list[Any] = []
        self._costs: list[Mapping[str, float]] = []

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Answers]]:
        """Answer tasks on whichever actor is free; see `Executor`.

        Args:
            tasks: the tasks.

        Yields:
            A task with all of its answers, in the order in which they are finished.

        Raises:
            SearchError: if a task loses its actor again and again.
        """
        waiting = iter(tasks)
        again: list[tuple[Task, int]] = []
        running: dict[Any, tuple[Any, Task, int]] = {}
        idle = [*self._actors]
        while True:
            while len(running) < self._count:
                task, attempt = again.pop() if again else (next(waiting, None), 1)
                if task is None:
                    break
                actor = idle.pop() if idle else self._actor()
                running[actor.answers.remote(task)] = actor, task, attempt
            if not running:
                return
            (done,), _ = self._ray.wait(list(running), num_returns=1)
            actor, task, attempt = running.pop(done)
            try:
                answers = self._ray.get(done)
            except self._ray.exceptions.RayActorError as error:
                self._actors.remove(actor)
                if attempt == _ATTEMPTS:
                    raise SearchError(
                        f"a model was lost {attempt} times while it answered; the answers so far "
                        "are kept, so the same command goes on; look at the memory of the machines"
                    ) from error
                again.append((task, attempt + 1))
                continue
            except self._ray.exceptions.RayTaskError as error:
                raise _cause(error) from error
            idle.append(actor)
            yield task, answers

    def alone(self, folder: Path, prompts: Sequence[Prompt]) -> list[Response]:
        """Answer prompts with a checkpoint as it is; see `Executor`.

        Args:
            folder: the checkpoint.
            prompts: the prompts.

        Returns:
            One answer per prompt.
        """
        self._let_go()  # its GPU is needed
        remote = self._ray.remote(_alone).options(**self._options)
        try:
            answers, cost = self._ray.get(
                remote.remote(self._described, str(folder), list(prompts))
            )
        except self._ray.exceptions.RayTaskError as error:
            raise _cause(error) from error
        self._costs.append(cost)
        found: list[Response] = answers
        return found

    def cost(self) -> Mapping[str, float]:
        """Return what answering took, in counts, over all actors."""
        self._collect()
        total: dict[str, float] = {}
        for cost in self._costs:
            for name, value in cost.items():
                total[name] = total.get(name, 0) + value
        return total

    def close(self) -> None:
        """Let the models go, and stop Ray where this started it."""
        self._let_go()
        if self._started:
            self._ray.shutdown()

    def _actor(self) -> Any:
        actor = self._ray.remote(_Actor).options(**self._options).remote(self._described)
        self._actors.append(actor)
        return actor

    def _collect(self) -> None:
        for actor in self._actors:
            try:
                self._costs.append(self._ray.get(actor.cost.remote()))
            except self._ray.exceptions.RayError:
                continue

    def _let_go(self) -> None:
        self._collect()
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors = []


class _Actor:
    """One model, in a process of its own."""

    def __init__(self, described: Mapping[str, Any]) -> None:
        from omnimerge.search.executor import Replica

        self._replica = Replica(_settings(described))

    def answers(self, task: Task) -> Answers:
        return [answer for some in self._replica.answers(task) for answer in some]

    def cost(self) -> dict[str, float]:
        return self._replica.cost()


def _alone(
    described: Mapping[str, Any], folder: str, prompts: Sequence[Prompt]
) -> tuple[list[Response], dict[str, float]]:
    """The answers, and what they took."""
    from omnimerge.generate.response import GenerationStats
    from omnimerge.search.executor import answer_alone

    stats = GenerationStats()
    answers = answer_alone(_settings(described), Path(folder), prompts, stats)
    return answers, stats.to_dict()


def _described(settings: Settings) -> dict[str, Any]:
    """Settings as plain values: the plan as its recipe."""
    recipe = settings.plan.recipe.model_dump(mode="json", exclude_defaults=True)
    return {
        "recipe": recipe,
        "forced": settings.plan.forced,
        "space": settings.space,
        "max_new_tokens": settings.max_new_tokens,
        "batch_size": settings.batch_size,
        # A process sees the GPU that it was given, and no other.
        "device": "cuda" if settings.device.startswith("cuda") else settings.device,
        "trust_remote_code": settings.trust_remote_code,
    }


def _settings(described: Mapping[str, Any]) -> Settings:
    from omnimerge.engine import build_plan, load_recipe
    from omnimerge.search.executor import Settings

    # The gates were passed where the search began.
    plan = build_plan(load_recipe(described["recipe"]), force=described["forced"], ancestor=False)
    names = ("space", "max_new_tokens", "batch_size", "device", "trust_remote_code")
    return Settings(plan, replicated=True, **{name: described[name] for name in names})


def _cause(error: Any) -> Exception:
    """The error of ours that an actor raised, as it would have been here."""
    cause = getattr(error, "cause", None)
    found: Exception = cause if isinstance(cause, OmnimergeError) else error
    return found

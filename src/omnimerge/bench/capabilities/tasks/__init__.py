"""The five tasks by name, in the order of the columns."""

from __future__ import annotations

from omnimerge.bench.capabilities.tasks import chart, geometry, grounding, ocr, vqa
from omnimerge.bench.capabilities.tasks.task import (
    IMAGE_SIZE,
    Question,
    Scene,
    Task,
    draw_scenes,
    kinds_of,
    scenes_of,
)

TASKS: dict[str, Task] = {
    task.name: task for task in (vqa.TASK, geometry.TASK, chart.TASK, ocr.TASK, grounding.TASK)
}
"""Name -> task."""

__all__ = [
    "IMAGE_SIZE",
    "TASKS",
    "Question",
    "Scene",
    "Task",
    "draw_scenes",
    "kinds_of",
    "scenes_of",
]

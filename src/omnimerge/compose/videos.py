"""Videos as lists of frames, where transformers' own video processors cannot be loaded.

Those exist for torchvision only. Where it is missing, every frame goes through an image processor
that works on Pillow images, with the sizes and means of the model's video processor.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from transformers import BatchFeature

from omnimerge.checkpoint.small_file import read_json

_SETTINGS = (
    "do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor",
    "do_normalize", "image_mean", "image_std",
)  # fmt: skip


class FrameProcessor:
    """Turns videos into what the model's video processor would give.

    Models that read patches of several frames (``temporal_patch_size``) get ``pixel_values_videos``
    of all patches and ``video_grid_thw``; the last frame is repeated where one is missing. All
    others get ``pixel_values_videos`` of shape ``(videos, frames, channels, height, width)``.

    Args:
        frames: an image processor that takes Pillow images.
        temporal_patch_size: frames per patch; 0 for models without such patches.
        merge_size: patches per token, along one side.
    """

    options = frozenset({*_SETTINGS, "do_sample_frames", "video_metadata"})

    def __init__(self, frames: Any, *, temporal_patch_size: int = 0, merge_size: int = 2) -> None:
        self.frames = frames
        self.temporal_patch_size = temporal_patch_size
        self.merge_size = merge_size
        self.model_input_names = ["pixel_values_videos"]

    @classmethod
    def load(cls, folder: Path) -> FrameProcessor:
        """Read the settings of a checkpoint's video processor, else of its image processor.

        Args:
            folder: the checkpoint.

        Returns:
            The processor.
        """
        settings = _settings(folder)
        if settings.get("temporal_patch_size"):
            from transformers import Qwen2VLImageProcessorPil as Patches

            known = {k: v for k, v in settings.items() if not k.endswith(("_type", "_class"))}
            known.pop("return_metadata", None)
            return cls(
                Patches(**known),
                temporal_patch_size=int(settings["temporal_patch_size"]),
                merge_size=int(settings.get("merge_size", 2)),
            )
        from transformers import CLIPImageProcessorPil

        given = {key: settings[key] for key in _SETTINGS if settings.get(key) is not None}
        given.setdefault("do_center_crop", "crop_size" in given)
        return cls(CLIPImageProcessorPil(**given))

    def __call__(self, videos: Any, **options: Any) -> BatchFeature:
        """Process videos, every frame of them.

        Args:
            videos: one video, a list of videos, or lists of them; a video is a list of frames.
            **options: `options` that are for single frames count, all others play no part.

        Returns:
            The model's inputs, as tensors.
        """
        given = {k: v for k, v in options.items() if k in _SETTINGS and v is not None}
        each = videos_in(videos)
        if self.temporal_patch_size:
            return self._patches(each, given)
        pixels = [np.stack([self._frame(f, given)["pixel_values"][0] for f in v]) for v in each]
        return BatchFeature({"pixel_values_videos": np.stack(pixels)}, tensor_type="pt")

    def _frame(self, frame: Any, given: dict[str, Any]) -> Any:
        return self.frames(frame, return_tensors="np", **given)

    def _patches(self, videos: Sequence[Sequence[Any]], given: dict[str, Any]) -> BatchFeature:
        step, rows, grids = self.temporal_patch_size, [], []
        for frames in videos:
            padded = [*frames, *[frames[-1]] * (-len(frames) % step)]
            made = [self._frame(frame, given) for frame in padded]
            size = int(self.frames.patch_size)
            # An image fills all its time slots with one frame; a video has another one in each.
            slots = [m["pixel_values"].reshape(-1, 3, step, size, size)[:, :, 0] for m in made]
            for start in range(0, len(slots), step):
                together = np.stack(slots[start : start + step], axis=2)
                rows.append(together.reshape(len(together), -1))
            _, height, width = (int(n) for n in made[0]["image_grid_thw"][0])
            grids.append([len(padded) // step, height, width])
        inputs = {"pixel_values_videos": np.concatenate(rows), "video_grid_thw": np.array(grids)}
        return BatchFeature(inputs, tensor_type="pt")


def videos_in(value: Any) -> list[Any]:
    """Return the single videos of nested lists, in order.

    Args:
        value: a video (a list of frames, or an array of four dimensions), or lists of them.

    Returns:
        The videos.
    """
    if value is None:
        return []
    if not isinstance(value, (list, tuple)) or (value and _is_frame(value[0])):
        return [value]
    return [video for each in value for video in videos_in(each)]


def _is_frame(value: Any) -> bool:
    dimensions = getattr(value, "ndim", None)
    return dimensions == 3 if dimensions is not None else hasattr(value, "convert")


def _settings(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        if (folder / name).is_file():
            found |= read_json(folder / name)
    if (folder / "processor_config.json").is_file():
        both = read_json(folder / "processor_config.json")
        found |= both.get("image_processor") or {}
        found |= both.get("video_processor") or {}
    return found


def has_torchvision() -> bool:
    """Return whether transformers' own video processors can be loaded."""
    return importlib.util.find_spec("torchvision") is not None


@contextmanager
def without_torchvision() -> Iterator[None]:
    """Let processors be built without their video part, where torchvision is missing.

    Yields:
        Nothing; transformers is as before at the end.
    """
    if has_torchvision():
        yield
        return
    from transformers.models.auto import video_processing_auto
    from transformers.processing_utils import ProcessorMixin

    check = ProcessorMixin.check_argument_for_proper_class
    loader = video_processing_auto.AutoVideoProcessor

    def absent_is_fine(self: Any, name: str, part: Any) -> Any:
        return None if part is None and "video" in name else check(self, name, part)

    ProcessorMixin.check_argument_for_proper_class = absent_is_fine
    video_processing_auto.AutoVideoProcessor = _Absent
    try:
        yield
    finally:
        ProcessorMixin.check_argument_for_proper_class = check
        video_processing_auto.AutoVideoProcessor = loader


class _Absent:
    """Stands in for transformers' AutoVideoProcessor: there is none."""

    @classmethod
    def from_pretrained(cls, *_args: Any, **_options: Any) -> None:
        return None

"""Prompts to tensors on the model's device, each batch rendered and processed once."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from omnimerge.generate.batching import Size
from omnimerge.generate.memory import ByteStore
from omnimerge.generate.processor import InputProcessor, open_image
from omnimerge.generate.response import GenerationStats

if TYPE_CHECKING:
    from omnimerge.generate.prompts import Prompt

Inputs = dict[str, Any]


class Encoder:
    """Makes a model's inputs, and keeps them for the next point.

    Args:
        processor: what turns prompts into tensors.
        model: the model they are for.
        store: where to keep them.
        stats: where to count.
    """

    def __init__(
        self, processor: InputProcessor, model: Any, store: ByteStore, stats: GenerationStats
    ) -> None:
        self.processor = processor
        self._model = model
        self._store = store
        self._stats = stats
        self._accepted = _accepted_inputs(model)
        self._rendered: dict[Prompt, tuple[str, Size]] = {}
        self._pixels: dict[Path, int] = {}

    def size(self, prompt: Prompt) -> Size:
        """Return how much a prompt is.

        Args:
            prompt: the prompt.

        Returns:
            Its size.

        Raises:
            PromptError: if an image cannot be decoded.
            GenerationError: if the model does not take the prompt.
        """
        return self._render(prompt)[1]

    def batch(self, prompts: Sequence[Prompt], *, keep: bool = True) -> Inputs:
        """Encode prompts, unless that was done before.

        Args:
            prompts: those of one batch.
            keep: whether they are likely to come again as this batch.

        Returns:
            The inputs of the model's ``generate``, on its device and in its dtype.

        Raises:
            PromptError: if a file cannot be decoded.
            GenerationError: if the processor refuses the batch.
        """
        key = ("inputs", *prompts)
        inputs: Inputs | None = self._store.get(key)
        if inputs is not None:
            self._stats.inputs_reused += 1
        else:
            self._stats.inputs_encoded += 1
            texts = [self._render(prompt)[0] for prompt in prompts]
            encoded = self.processor.encode(prompts, texts)
            inputs = {n: self._cast(v) for n, v in encoded.items() if n in self._accepted}
            if keep:
                self._store.put(key, inputs)
        return {
            name: value.to(self._model.device) if isinstance(value, torch.Tensor) else value
            for name, value in inputs.items()
        }

    def _cast(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.to(self._model.dtype)
        return value

    def _render(self, prompt: Prompt) -> tuple[str, Size]:
        if prompt not in self._rendered:
            text = self.processor.render(prompt)
            media = (len(prompt.images), len(prompt.audios), len(prompt.videos))
            volume = sum(self._volume(path, prompt.id) for path in prompt.images)
            volume += sum(_weight(path) for path in (*prompt.audios, *prompt.videos))
            self._rendered[prompt] = text, Size(media, volume, self.processor.length(text))
        return self._rendered[prompt]

    def _volume(self, path: Path, prompt_id: str) -> int:
        if path not in self._pixels:  # decoded in full: a broken one is found before any answer
            image = open_image(path, prompt_id)
            self._pixels[path] = image.width * image.height
        return self._pixels[path]


def _weight(path: Path) -> int:
    """The bytes of a file, or of the frames in a folder; 0 if it cannot be looked at."""
    try:
        files = path.iterdir() if path.is_dir() else [path]
        return sum(file.stat().st_size for file in files)
    except OSError:
        return 0


def _accepted_inputs(model: Any) -> frozenset[str]:
    """The inputs that the model takes; processors return others as well."""
    # Those of a composed model depend on its parts.
    names: set[str] = {"input_ids", "attention_mask", *getattr(model, "media_inputs", ())}
    for function in (model.forward, model.prepare_inputs_for_generation):
        names |= set(inspect.signature(function).parameters)
    return frozenset(names - {"labels", "kwargs", "args"})

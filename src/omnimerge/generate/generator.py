"""One loaded model that answers prompts and takes new weights in place."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from omnimerge.errors import GenerationError
from omnimerge.generate.batching import batches
from omnimerge.generate.loading import LoadedModel, load_model
from omnimerge.generate.processor import InputProcessor, open_image
from omnimerge.generate.quiet import quiet
from omnimerge.generate.response import Response
from omnimerge.generate.weights import WeightSlots

if TYPE_CHECKING:
    from torch import Tensor

    from omnimerge.generate.prompts import Prompt

Progress = Callable[[int, int], None]


class Generator:
    """Answers prompts with one model: greedy, deterministic, in batches of similar length.

    Greedy means the most probable token at every step. Sampling settings and repetition penalties
    of the checkpoint's generation_config.json are not used: a penalty also counts padding, so that
    an answer would depend on the batch it is in. The tokens that end an answer are.

    Args:
        folder: the checkpoint's folder.
        loaded: the transformers model, as `load_model` gives it.
        processor: what turns prompts into its inputs.
    """

    def __init__(self, folder: Path, loaded: LoadedModel, processor: InputProcessor) -> None:
        self.folder = folder
        self.model = loaded.model
        self.processor = processor
        self._prefix = loaded.prefix
        self._slots: WeightSlots | None = None
        self._pixels: dict[Path, int] = {}
        self._stops = _stop_tokens(self.model, processor.tokenizer)
        self._accepted = _accepted_inputs(self.model)
        self._plain_greedy()

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        device: str = "cpu",
        dtype: str = "auto",
        trust_remote_code: bool = False,
    ) -> Generator:
        """Load model and processor of a checkpoint folder.

        Args:
            folder: the checkpoint, as transformers reads it.
            device: a torch device, such as ``cpu`` or ``cuda:0``.
            dtype: ``auto`` (float32 on a CPU, the checkpoint's dtype elsewhere), ``float32``,
                ``bfloat16`` or ``float16``.
            trust_remote_code: whether Python code in the folder may run.

        Returns:
            The generator.

        Raises:
            GenerationError: if the model cannot be loaded completely, with the names of missing,
                unexpected and mismatched tensors, or if it has no processor or chat template.
        """
        with quiet():
            loaded = load_model(
                folder, device=device, dtype=dtype, trust_remote_code=trust_remote_code
            )
            processor = InputProcessor.load(
                folder, multimodal=loaded.multimodal, trust_remote_code=trust_remote_code
            )
            return cls(folder, loaded, processor)

    def responses(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = 32,
        batch_size: int = 16,
        on_progress: Progress | None = None,
    ) -> list[Response]:
        """Answer prompts.

        Args:
            prompts: the prompts; their `answer` is not looked at.
            max_new_tokens: the most tokens of an answer, at least 1.
            batch_size: the most prompts in one batch, at least 1. Answers do not depend on it,
                except where two tokens are equally probable up to rounding.
            on_progress: called with (answered, all) after every batch.

        Returns:
            One response per prompt, in the order of `prompts`.

        Raises:
            PromptError: if an image cannot be decoded.
            GenerationError: if the model cannot take the prompts.
        """
        if max_new_tokens < 1 or batch_size < 1:
            raise GenerationError(
                f"max_new_tokens {max_new_tokens} and batch_size {batch_size} must be at least 1"
            )
        answered: dict[int, Response] = {}
        with quiet():
            texts = [self.processor.render(prompt) for prompt in prompts]
            sizes = [self._size(p, text) for p, text in zip(prompts, texts, strict=True)]
            for batch in batches(sizes, batch_size):
                inputs = self.processor.encode(
                    [prompts[i] for i in batch], [texts[i] for i in batch]
                )
                generated = self._generate(inputs, max_new_tokens)
                for position, tokens in zip(batch, generated, strict=True):
                    text = self.processor.decode(tokens)
                    answered[position] = Response(prompts[position].id, text, tuple(tokens))
                if on_progress is not None:
                    on_progress(len(answered), len(prompts))
        return [answered[position] for position in range(len(prompts))]

    def set_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Put tensors into the model, in place.

        Args:
            tensors: pairs of a name, as in the checkpoint's files, and a tensor of the shape that
                it has there. Rounded to the dtype the model runs in. A later call must give at
                least the names given before.

        Raises:
            GenerationError: for an unknown name or a wrong shape, and if afterwards any of these
                parameters does not hold what was given.
            LayoutError: if the checkpoint's names cannot be matched to the model's.
        """
        if self._slots is None:
            self._slots = WeightSlots(self.folder, self.model.state_dict(), self._prefix)
        self._slots.fill(tensors)

    @torch.inference_mode()
    def _generate(self, inputs: Any, max_new_tokens: int) -> list[list[int]]:
        """New tokens of each row, cut before the token that ends the answer."""
        inputs = inputs.to(self.model.device)
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                inputs[name] = value.to(self.model.dtype)
        given = {name: value for name, value in inputs.items() if name in self._accepted}
        output = self.model.generate(**given, max_new_tokens=max_new_tokens)
        seen = 0 if self.model.config.is_encoder_decoder else given["input_ids"].shape[1]
        return [self._until_stop(row[seen:].tolist()) for row in output]

    def _until_stop(self, tokens: list[int]) -> list[int]:
        ends = [i for i, token in enumerate(tokens) if token in self._stops]
        return tokens[: ends[0]] if ends else tokens

    def _size(self, prompt: Prompt, text: str) -> tuple[int, int, int]:
        for path in prompt.images:
            if path not in self._pixels:
                image = open_image(path, prompt.id)
                self._pixels[path] = image.width * image.height
        pixels = sum(self._pixels[path] for path in prompt.images)
        return len(prompt.images), pixels, self.processor.length(text)

    def _plain_greedy(self) -> None:
        from transformers import GenerationConfig

        self.model.generation_config = GenerationConfig(
            do_sample=False,
            num_beams=1,
            eos_token_id=sorted(self._stops) or None,
            pad_token_id=self.processor.tokenizer.pad_token_id,
            bos_token_id=self.processor.tokenizer.bos_token_id,
        )


def _stop_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer: the generation config's, and the tokenizer's."""
    found = model.generation_config.eos_token_id
    listed = found if isinstance(found, list) else [found]
    return frozenset(int(t) for t in (*listed, tokenizer.eos_token_id) if t is not None)


def _accepted_inputs(model: Any) -> frozenset[str]:
    """The inputs that the model takes; processors return others as well."""
    names: set[str] = {"input_ids", "attention_mask"}
    for function in (model.forward, model.prepare_inputs_for_generation):
        names |= set(inspect.signature(function).parameters)
    return frozenset(names - {"labels", "kwargs", "args"})

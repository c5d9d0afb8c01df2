"""Prompts to model inputs: chat template, images, tokens; with or without torchvision.

Video processors of transformers exist for torchvision only, and most image models ask for one
even where no video is ever shown to them. `without_video` lets such a processor be assembled from
its other parts. Image processors fall back to their PIL variant by themselves.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from omnimerge.errors import GenerationError, PromptError

if TYPE_CHECKING:
    from PIL.Image import Image

    from omnimerge.generate.prompts import Prompt

_VOCABULARIES = (
    "tokenizer.json",
    "vocab.*",
    "*.model",  # SentencePiece
    "tekken.json",
    "*.tiktoken",
)


class InputProcessor:
    """Turns prompts into the inputs of one model.

    Args:
        folder: the checkpoint's folder.
        processor: the transformers processor; the tokenizer itself for a text-only model.
        tokenizer: its tokenizer; set to pad on the left.
    """

    def __init__(self, folder: Path, processor: Any, tokenizer: Any) -> None:
        self.folder = folder
        self.tokenizer = tokenizer
        self.multimodal = processor is not tokenizer
        self._processor = processor
        self._template = _chat_template(processor, tokenizer)
        if self._template is None and self.multimodal:
            raise GenerationError(
                f"{folder} has no chat template; add its chat_template.jinja (or a 'chat_template' "
                "in tokenizer_config.json), as published with the model"
            )
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

    @classmethod
    def load(
        cls, folder: Path, *, multimodal: bool, trust_remote_code: bool = False
    ) -> InputProcessor:
        """Load what a checkpoint folder holds for making inputs.

        Args:
            folder: the checkpoint.
            multimodal: whether the model takes more than text; if not, the tokenizer is all.
            trust_remote_code: whether Python code in the folder may run.

        Returns:
            The processor.

        Raises:
            GenerationError: if it cannot be loaded, or a multimodal model has no chat template.
        """
        from transformers import AutoProcessor, AutoTokenizer

        options = {"trust_remote_code": trust_remote_code, "local_files_only": True}
        _check_vocabulary(folder, trust_remote_code)
        try:
            if not multimodal:
                tokenizer = AutoTokenizer.from_pretrained(str(folder), **options)
                return cls(folder, tokenizer, tokenizer)
            with nullcontext() if _has_torchvision() else without_video():
                processor = AutoProcessor.from_pretrained(str(folder), **options)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
            raise GenerationError(
                f"cannot load the processor of {folder} ({one_line(error)}); the folder needs the "
                "tokenizer and processor files that were published with the model"
            ) from error
        tokenizer = getattr(processor, "tokenizer", None)
        if tokenizer is None:
            raise GenerationError(
                f"{folder} holds no complete processor (found {type(processor).__name__}); add the "
                "tokenizer and preprocessor files that were published with the model"
            )
        return cls(folder, processor, tokenizer)

    def render(self, prompt: Prompt) -> str:
        """Return the text that the model is given for a prompt, image placeholders included.

        Args:
            prompt: the prompt.

        Returns:
            The user's turn in the chat template, ready for the model's answer; the bare prompt
            where a text model has no template.

        Raises:
            GenerationError: if the prompt has images and the model, or its template, takes none.
        """
        if prompt.images and not self.multimodal:
            raise GenerationError(
                f"prompt {prompt.id!r} has an image, but {self.folder} is a text-only model; "
                "leave the images out or use a multimodal target"
            )
        if self._template is None:
            return prompt.prompt
        parts = [{"type": "image"} for _ in prompt.images]
        content = [*parts, {"type": "text", "text": prompt.prompt}]
        turn = {"role": "user", "content": content if self.multimodal else prompt.prompt}
        from jinja2 import TemplateError

        try:
            text: str = self._processor.apply_chat_template(
                [turn],
                chat_template=self._template,
                add_generation_prompt=True,
                tokenize=False,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise GenerationError(
                f"the chat template of {self.folder} fails on prompt {prompt.id!r} "
                f"({one_line(error)}); use the template published with the model"
            ) from error
        self._check_placeholders(prompt, text)
        return text

    def encode(self, prompts: Sequence[Prompt], texts: Sequence[str] | None = None) -> Any:
        """Encode prompts that all have the same number of images as one batch.

        Args:
            prompts: the prompts; all with images, or all without.
            texts: their rendered texts, if they are at hand.

        Returns:
            A transformers `BatchFeature` of tensors, padded on the left; ``input_ids`` is
            ``(prompts, tokens)``.

        Raises:
            PromptError: if an image cannot be decoded.
            GenerationError: if the processor refuses the batch.
        """
        texts = [self.render(prompt) for prompt in prompts] if texts is None else list(texts)
        options: dict[str, Any] = {"padding": True, "return_tensors": "pt"}
        bos = self.tokenizer.bos_token
        templated = self._template is not None
        if (templated and not self.multimodal) or (bos and texts[0].startswith(bos)):
            options["add_special_tokens"] = False
        if not self.multimodal:
            return self.tokenizer(texts, **options)
        images = [[open_image(path, prompt.id) for path in prompt.images] for prompt in prompts]
        try:
            return self._processor(text=texts, images=images if any(images) else None, **options)
        except (ValueError, TypeError, IndexError, KeyError, RuntimeError) as error:
            names = ", ".join(repr(prompt.id) for prompt in prompts[:3])
            raise GenerationError(
                f"the processor of {self.folder} refuses the prompts {names} ({one_line(error)}); "
                "check their text for special tokens and their images for size"
            ) from error

    def length(self, text: str) -> int:
        """Return how many tokens a rendered text has, with one per image placeholder.

        Args:
            text: from `render`.

        Returns:
            The number of tokens.
        """
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of generated tokens, without special tokens, stripped.

        Args:
            tokens: token ids.

        Returns:
            The text.
        """
        text: str = self.tokenizer.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text.strip()

    def _check_placeholders(self, prompt: Prompt, text: str) -> None:
        """Refuse a template that drops images or writes them out as text."""
        names = ("image_token", "boi_token", "start_image_token")
        found = [
            getattr(owner, n, None) for n in names for owner in (self._processor, self.tokenizer)
        ]
        tokens = [token for token in found if isinstance(token, str) and token]
        if prompt.images and tokens and not any(token in text for token in tokens):
            raise GenerationError(
                f"the chat template of {self.folder} has no place for images (no {tokens[0]!r} for "
                f"prompt {prompt.id!r}); use the multimodal chat_template.jinja of the model"
            )


def open_image(path: Path, prompt_id: str) -> Image:
    """Read an image as RGB, turned upright as its EXIF data say.

    Args:
        path: the image file.
        prompt_id: the prompt it belongs to, for the message.

    Returns:
        The image, fully decoded.

    Raises:
        PromptError: if the file is missing, truncated or no image.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise PromptError(
            f"prompt {prompt_id!r}: image {path} cannot be decoded ({one_line(error)}); replace "
            "the file or leave the prompt out"
        ) from error


@contextmanager
def without_video() -> Iterator[None]:
    """Let processors be built without their video part, inside the block only.

    Yields:
        Nothing; transformers is as before at the end.
    """
    from transformers.models.auto import video_processing_auto
    from transformers.processing_utils import ProcessorMixin

    check = ProcessorMixin.check_argument_for_proper_class
    loader = video_processing_auto.AutoVideoProcessor

    def absent_is_fine(self: Any, name: str, part: Any) -> Any:
        return None if part is None and "video" in name else check(self, name, part)

    ProcessorMixin.check_argument_for_proper_class = absent_is_fine
    video_processing_auto.AutoVideoProcessor = _NoVideo
    try:
        yield
    finally:
        ProcessorMixin.check_argument_for_proper_class = check
        video_processing_auto.AutoVideoProcessor = loader


class _NoVideo:
    """Stands in for transformers' AutoVideoProcessor: there is none."""

    @classmethod
    def from_pretrained(cls, *_args: Any, **_options: Any) -> None:
        return None


def one_line(error: BaseException) -> str:
    """Return the first line of an error's message, cut to about 200 characters.

    Args:
        error: any exception.

    Returns:
        Text for the inside of a longer message.
    """
    lines = str(error).strip().splitlines()
    return shorten(lines[0] if lines else type(error).__name__, 200, placeholder=" ...")


def _check_vocabulary(folder: Path, trust_remote_code: bool) -> None:
    """Refuse a folder without a tokenizer: transformers makes an empty one, without a word."""
    known = any(any(folder.glob(pattern)) for pattern in _VOCABULARIES)
    if not known and not trust_remote_code:
        raise GenerationError(
            f"{folder} has no tokenizer (none of {', '.join(_VOCABULARIES)}); add the tokenizer "
            "files that were published with the model"
        )


def _has_torchvision() -> bool:
    return importlib.util.find_spec("torchvision") is not None


def _chat_template(processor: Any, tokenizer: Any) -> str | None:
    """The default template, wherever transformers put it."""
    for owner in (processor, tokenizer):
        template = getattr(owner, "chat_template", None)
        if isinstance(template, dict):
            template = template.get("default")
        if isinstance(template, str) and template:
            return template
    return None

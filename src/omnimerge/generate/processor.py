"""Prompts to model inputs: chat template, media, tokens; with or without torchvision.

Video processors of transformers exist for torchvision only, and most image models ask for one
even where no video is ever shown to them. `without_video` lets such a processor be assembled from
its other parts. Image processors fall back to their PIL variant by themselves.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omnimerge.errors import GenerationError, one_line
from omnimerge.generate.media import open_audio, open_image, open_video

if TYPE_CHECKING:
    from omnimerge.generate.sources.prompt import Prompt

__all__ = ["InputProcessor", "open_image", "without_video"]

_VOCABULARIES = (
    "tokenizer.json",
    "vocab.*",
    "*.model",  # SentencePiece
    "tekken.json",
    "*.tiktoken",
)
_SAMPLING_RATE = 16_000
_MEDIA = ("image", "audio", "video")
_A = {"image": "an image", "audio": "audio", "video": "a video"}
_PARTS = {  # of a transformers processor
    "image": ("image_processor",),
    "audio": ("feature_extractor", "audio_processor"),
    "video": ("video_processor",),
}
_PLACEHOLDERS = {  # attributes of a processor or its tokenizer
    "image": ("image_token", "boi_token", "start_image_token"),
    "audio": ("audio_token", "boa_token"),
    "video": ("video_token",),
}


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
            GenerationError: if the prompt has images, audio or videos and the model, or its
                template, takes none.
        """
        given = [kind for kind in _MEDIA for _ in _files(prompt, kind)]
        for kind in dict.fromkeys(given):
            self._check_takes(prompt, kind)
        if self._template is None:
            return prompt.prompt
        text = self._rendered(prompt, given)
        for kind in dict.fromkeys(given):
            others = [other for other in given if other != kind]
            self._check_placeholders(prompt, kind, text, others)
        return text

    def encode(self, prompts: Sequence[Prompt], texts: Sequence[str] | None = None) -> Any:
        """Encode prompts that all have the same number of images, sounds and videos as one batch.

        Args:
            prompts: the prompts.
            texts: their rendered texts, if they are at hand.

        Returns:
            A transformers `BatchFeature` of tensors, padded on the left; ``input_ids`` is
            ``(prompts, tokens)``.

        Raises:
            PromptError: if an image, sound or video cannot be decoded.
            GenerationError: if the processor refuses the batch.
        """
        texts = [self.render(prompt) for prompt in prompts] if texts is None else list(texts)
        tokens: dict[str, Any] = {"padding": True}
        bos = self.tokenizer.bos_token
        templated = self._template is not None
        if (templated and not self.multimodal) or (bos and texts[0].startswith(bos)):
            tokens["add_special_tokens"] = False
        if not self.multimodal:
            return self.tokenizer(texts, return_tensors="pt", **tokens)
        images = [[open_image(path, prompt.id) for path in prompt.images] for prompt in prompts]
        sounds = self._sounds(prompts) | _videos(prompts)
        # Padding set for everything would replace what the audio part pads its features to.
        options = {"text_kwargs": tokens, **sounds} if sounds else tokens
        try:
            return self._processor(
                text=texts, images=images if any(images) else None, return_tensors="pt", **options
            )
        except (ValueError, TypeError, IndexError, KeyError, RuntimeError) as error:
            names = ", ".join(repr(prompt.id) for prompt in prompts[:3])
            raise GenerationError(
                f"the processor of {self.folder} refuses the prompts {names} ({one_line(error)}); "
                "check their text for special tokens, the number of their images, sounds and "
                "videos, and their size"
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

    def _rendered(self, prompt: Prompt, given: Sequence[str]) -> str:
        """The user's turn in the chat template, with a placeholder for each of `given`."""
        parts = [{"type": kind} for kind in given]
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
        return text

    def _check_takes(self, prompt: Prompt, kind: str) -> None:
        """Refuse what the processor would pass over without a word."""
        has = f"prompt {prompt.id!r} has {_A[kind]}, but"
        if not self.multimodal:
            raise GenerationError(
                f"{has} {self.folder} is a text-only model; leave the {kind}s out or use a "
                "multimodal target"
            )
        name = type(self._processor).__name__
        parts = [part for part in _PARTS[kind] if hasattr(self._processor, part)]
        if any(getattr(self._processor, part) is not None for part in parts):
            if kind == "audio" and not _takes_audio(self._processor):
                raise GenerationError(
                    f"{has} the processor of {self.folder} ({name}) takes sounds in a chat format "
                    "of its own only, which is not supported; use another target"
                )
        elif kind == "video" and parts and not _has_torchvision():
            raise GenerationError(
                f"{has} the video part of {name} needs torchvision; install the release that fits "
                "your torch, from the same index (another one breaks transformers), or give the "
                "frames as images"
            )
        elif _is_library_class(self._processor):
            raise GenerationError(
                f"{has} the processor of {self.folder} ({name}) has no part for it; leave it out "
                "or use another target"
            )

    def _check_placeholders(
        self, prompt: Prompt, kind: str, text: str, others: Sequence[str]
    ) -> None:
        """Refuse a template that drops images or the like, or writes them out as text."""
        found = [
            getattr(owner, name, None)
            for name in _PLACEHOLDERS[kind]
            for owner in (self._processor, self.tokenizer)
        ]
        tokens = [token for token in found if isinstance(token, str) and token]
        if tokens:
            dropped = not any(token in text for token in tokens)
        else:
            dropped = text == self._rendered(prompt, others)
        if dropped:
            looked_for = f"no {tokens[0]!r} " if tokens else "it drops them "
            raise GenerationError(
                f"the chat template of {self.folder} has no place for {kind}s ({looked_for}"
                f"for prompt {prompt.id!r}); use the multimodal chat_template.jinja of the model"
            )

    def _sounds(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """Options of the processor for the sounds of all prompts, in one list as it takes them."""
        if not any(prompt.audios for prompt in prompts):
            return {}
        parts = [getattr(self._processor, name, None) for name in _PARTS["audio"]]
        rate = next((part.sampling_rate for part in parts if part is not None), _SAMPLING_RATE)
        sounds = [open_audio(path, prompt.id, rate) for prompt in prompts for path in prompt.audios]
        return {"audio": sounds, "audio_kwargs": {"sampling_rate": rate}}


def _videos(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Options of the processor for the videos of all prompts: every frame is shown."""
    if not any(prompt.videos for prompt in prompts):
        return {}
    opened = [[open_video(path, prompt.id) for path in prompt.videos] for prompt in prompts]
    facts = [
        {
            "total_num_frames": len(video.frames),
            "fps": video.fps,
            "duration": len(video.frames) / video.fps,
            "frames_indices": list(range(len(video.frames))),
        }
        for videos in opened
        for video in videos
    ]
    return {
        "videos": [[video.frames for video in videos] for videos in opened],
        "videos_kwargs": {"do_sample_frames": False, "video_metadata": facts},
    }


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


def _files(prompt: Prompt, kind: str) -> tuple[Path, ...]:
    return {"image": prompt.images, "audio": prompt.audios, "video": prompt.videos}[kind]


def _takes_audio(processor: Any) -> bool:
    """Whether sounds can be given beside a rendered text."""
    return "audio" in inspect.signature(type(processor).__call__).parameters


def _is_library_class(processor: Any) -> bool:
    """Whether the names of the processor's parts are known; remote code may have others."""
    return type(processor).__module__.startswith("transformers.models.")


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

"""The processor of a composed model: text with placeholders, images, sounds and videos."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, AutoTokenizer, BatchFeature
from transformers.processing_utils import ProcessorMixin

from omnimerge.checkpoint.locate import locate
from omnimerge.checkpoint.small_file import read_json, read_text
from omnimerge.compose.configuration import MODALITIES, OmniConfig
from omnimerge.compose.options import Options, cut, options_of
from omnimerge.compose.part_processor import PartProcessor
from omnimerge.compose.videos import videos_in

PARTS_FOLDER = "parts"
_SETTINGS = "processor_config.json"
_TEMPLATE = "chat_template.jinja"


class OmniProcessor(ProcessorMixin):  # type: ignore[misc]
    """Puts media of several modalities, and text, into inputs of `OmniForConditionalGeneration`.

    Every medium goes through the processor that its model was published with, alone on a line; the
    tokens that this gives take the place of the medium's placeholder in the text. So a prompt may
    hold any number of media of any modality, in any order.

    Args:
        tokenizer: the composed model's tokenizer.
        parts: name -> the part's processor.
        chat_template: Jinja source.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        parts: Mapping[str, PartProcessor] | None = None,
        chat_template: str | None = None,
    ) -> None:
        self.parts = dict(parts or {})
        super().__init__(tokenizer, chat_template=chat_template)
        places = {m: (n, p.tokens[p.placeholders[m]]) for n, p in self.parts.items()
                  for m in p.placeholders}  # fmt: skip
        self._part_of = {modality: name for modality, (name, _) in places.items()}
        self.placeholders = {modality: token for modality, (_, token) in places.items()}
        self._ids = {m: tokenizer.convert_tokens_to_ids(t) for m, t in self.placeholders.items()}
        for modality in MODALITIES:
            setattr(self, f"{modality}_token", self.placeholders.get(modality))
        found = {k: v for part in self.parts.values() for k, v in part.component.items()}
        self._components = found
        self.image_processor = found.get("image")
        self.feature_extractor = found.get("audio")
        self.video_processor = found.get("video")

    @classmethod
    def get_attributes(cls) -> list[str]:
        """Return what transformers loads and saves by itself: the tokenizer."""
        return ["tokenizer"]

    def __call__(
        self,
        images: Any = None,
        text: Any = None,
        videos: Any = None,
        audio: Any = None,
        **options: Any,
    ) -> BatchFeature:
        """Make the model's inputs.

        Args:
            images: a Pillow image, or (nested) lists of them, in the order of their placeholders.
            text: one text or a list; each medium has its placeholder (`placeholders`) in it.
            videos: a list of frames, or (nested) lists of those.
            audio: one-dimensional arrays of samples at the part's rate, one or a (nested) list.
            **options: of the tokenizer (``padding``, ``truncation``, ``return_tensors``, ...), also
                as ``text_kwargs``; of the parts' own processors (``sampling_rate``, ``size``, ...),
                also as ``images_kwargs``, ``audio_kwargs`` and ``videos_kwargs``.

        Returns:
            ``input_ids`` and ``attention_mask`` of shape ``(texts, tokens)``, and the inputs of the
            parts, each named after its part.

        Raises:
            ValueError: if there are other numbers of media than of placeholders, an option is
                unknown, or media would be truncated.
        """
        texts = [text] if isinstance(text, str) else list(text or [])
        given = options_of(options, self._components)
        limit = given.limit(self.tokenizer)
        rows: list[list[int]] = self.tokenizer(texts, **given.encoding)["input_ids"]
        media = {"image": _flat(images), "audio": _flat(audio), "video": videos_in(videos)}
        self._check(rows, media)
        expanded, inputs = self._encode(media, given)
        places = {number: modality for modality, number in self._ids.items()}
        rows = [cut(self._expand(row, expanded), limit, places, self.tokenizer) for row in rows]
        if given.padding["padding"] or given.tensors:
            made = self.tokenizer.pad({"input_ids": rows}, **given.padding)
        else:
            made = {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
        return BatchFeature({**made, **inputs}, tensor_type=given.tensors)

    def _check(self, rows: Sequence[Sequence[int]], media: Mapping[str, Sequence[Any]]) -> None:
        for modality, items in media.items():
            if modality not in self._ids:
                if items:
                    raise ValueError(f"this model takes no {modality}; it takes {self._known}")
                continue
            count = sum(row.count(self._ids[modality]) for row in map(list, rows))
            if count != len(items):
                token = self.placeholders[modality]
                raise ValueError(
                    f"{len(items)} media of modality {modality} for {count} of {token!r}"
                )

    @property
    def _known(self) -> str:
        return ", ".join(self._ids)

    def _encode(
        self, media: Mapping[str, Sequence[Any]], options: Options
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        expanded: dict[str, list[list[int]]] = {}
        inputs: dict[str, Any] = {}
        for name, part in self.parts.items():
            given = {kind: media[kind] for kind in part.placeholders if media.get(kind)}
            if not given:
                continue
            found, values = part.encode(given, options.media)
            inputs |= {f"{name}_{key}": value for key, value in values.items()}
            for kind, rows in found.items():
                expanded[kind] = [self._ours(part, row) for row in rows]
        return expanded, inputs

    def _ours(self, part: PartProcessor, row: Sequence[int]) -> list[int]:
        """Tokens of a part's tokenizer in the composed model's."""
        theirs = part.inner.tokenizer
        special = {
            number: str(token)
            for number, token in theirs.added_tokens_decoder.items()
            if str(token) in part.tokens
        }
        found: list[int] = []
        words: list[int] = []
        for number in [*row, None]:
            if number is not None and number not in special:
                words.append(number)
                continue
            if words:
                text = theirs.decode(words, skip_special_tokens=False)
                found += self.tokenizer(text, add_special_tokens=False)["input_ids"]
                words = []
            if number is not None:
                ours = part.tokens[special[number]]
                found.append(self.tokenizer.convert_tokens_to_ids(ours))
        return found

    def _expand(self, row: Sequence[int], expanded: Mapping[str, list[list[int]]]) -> list[int]:
        """Put the tokens of media in place of placeholders; takes them from the front."""
        modality_of = {number: modality for modality, number in self._ids.items()}
        found: list[int] = []
        for number in row:
            modality = modality_of.get(number)
            found += expanded[modality].pop(0) if modality else [number]
        return found

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, **kwargs: Any
    ) -> OmniProcessor:
        """Load the processor of a composed model.

        Args:
            pretrained_model_name_or_path: folder, or Hub id with an optional ``@revision``.
            **kwargs: ``revision`` is looked at, the others play no part.

        Returns:
            The processor.

        Raises:
            CheckpointError: if the processor of a part cannot be loaded.
        """
        reference = str(pretrained_model_name_or_path)
        if kwargs.get("revision") and not Path(reference).exists():
            reference = f"{reference}@{kwargs['revision']}"
        folder = locate(reference)
        settings = read_json(folder / _SETTINGS)
        parts = {
            name: PartProcessor.load(folder / PARTS_FOLDER / name, **part)
            for name, part in settings["parts"].items()
        }
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        template = folder / _TEMPLATE
        text = read_text(template) if template.is_file() else None
        return cls(tokenizer, parts, chat_template=text)

    def save_pretrained(
        self, save_directory: str | Path, push_to_hub: bool = False, **_: Any
    ) -> list[str]:
        """Save the processor: tokenizer, chat template, and the parts' files as they were.

        Args:
            save_directory: the folder; made if it does not exist.
            push_to_hub: not supported.

        Returns:
            The files written.

        Raises:
            ValueError: if it is to be pushed; upload the folder instead.
        """
        if push_to_hub:
            raise ValueError("save to a folder, and upload that")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        written = [folder / _SETTINGS]
        parts = {n: {"placeholders": p.placeholders, "tokens": p.tokens}
                 for n, p in self.parts.items()}  # fmt: skip
        settings = {"processor_class": type(self).__name__, "parts": parts}
        text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        written[0].write_text(text, encoding="utf-8")
        if self.chat_template:
            written.append(folder / _TEMPLATE)
            written[-1].write_text(self.chat_template, encoding="utf-8")
        for name, part in self.parts.items():
            home = folder / PARTS_FOLDER / name
            home.mkdir(parents=True, exist_ok=True)
            for file, content in part.files.items():
                (home / file).write_bytes(content)
                written.append(home / file)
        return [str(file) for file in written]

    @property
    def model_input_names(self) -> list[str]:
        """Names of the inputs that a text alone gives."""
        return list(self.tokenizer.model_input_names)


def _flat(value: Any) -> list[Any]:
    """Single media of nested lists; a list of numbers is one sound."""
    if value is None:
        return []
    if not isinstance(value, (list, tuple)) or (value and isinstance(value[0], (int, float))):
        return [value]
    return [each for part in value for each in _flat(part)]


AutoProcessor.register(OmniConfig, OmniProcessor, exist_ok=True)

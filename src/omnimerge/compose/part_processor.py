"""The processor of a part: media to features' inputs, and to the tokens that stand for them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omnimerge.checkpoint.small_file import read_bytes
from omnimerge.compose.options import MEDIA_KWARGS
from omnimerge.compose.videos import FrameProcessor, without_torchvision
from omnimerge.errors import CheckpointError

_OF_THE_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
_RENAMED = {"pixel_values_images": "pixel_values"}  # Video-LLaVA's processor and its model differ
_KEYWORD = {"image": "images", "audio": "audio", "video": "videos"}
_WORDS = {"image": ("image", "vision"), "video": ("video", "vision"), "audio": ("audio",)}


@dataclass
class PartProcessor:
    """One part's own processor, asked for its media only.

    Attributes:
        inner: the transformers processor.
        placeholders: modality -> the original's placeholder, for every modality provided.
        tokens: token of the original -> the same in the composed model's vocabulary.
        files: name -> content of what it was loaded from, to save it again as it was.
    """

    inner: Any
    placeholders: dict[str, str]
    tokens: dict[str, str]
    files: dict[str, bytes]

    @classmethod
    def load(
        cls, folder: Path, placeholders: Mapping[str, str], tokens: Mapping[str, str]
    ) -> PartProcessor:
        """Load the processor of a checkpoint.

        Args:
            folder: the checkpoint, or a folder with its files other than weights.
            placeholders: see the class.
            tokens: see the class.

        Returns:
            The processor.

        Raises:
            CheckpointError: if the folder has none that transformers can load.
        """
        from transformers import AutoProcessor

        try:
            with without_torchvision():
                inner = AutoProcessor.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
            raise CheckpointError(
                f"{folder} has no processor that transformers loads ({_first_line(error)}); add "
                "the tokenizer and processor files that were published with the model"
            ) from error
        if getattr(inner, "tokenizer", None) is None:
            raise CheckpointError(
                f"{folder} has no complete processor (found {type(inner).__name__}); add the "
                "preprocessor files that were published with the model"
            )
        if "video" in placeholders and getattr(inner, "video_processor", None) is None:
            inner.video_processor = FrameProcessor.load(folder)
        return cls(inner, dict(placeholders), dict(tokens), processor_files(folder))

    def encode(
        self,
        media: Mapping[str, Sequence[Any]],
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Process media, each on its own line of text.

        Args:
            media: modality -> images, sounds or videos, in order.
            options: modality -> options of the original's processor.

        Returns:
            Modality -> the original's token ids per item; and name -> the model's input.

        Raises:
            ValueError: if sounds are said to have another rate than the original hears.
        """
        given = {kind: list(items) for kind, items in media.items() if items}
        lines = [self.placeholders[kind] for kind in _KEYWORD if kind in given for _ in given[kind]]
        keywords: dict[str, Any] = {}
        for kind in given:
            listed = given[kind] if kind == "audio" else [[item] for item in given[kind]]
            keywords[_KEYWORD[kind]] = listed
            keywords[MEDIA_KWARGS[kind]] = self._options(kind, (options or {}).get(kind, {}))
        made = self.inner(
            text=lines,
            return_tensors="pt",
            text_kwargs={"padding": True, "add_special_tokens": False},
            **keywords,
        )
        masks = made["attention_mask"].bool()
        rows = [ids[mask].tolist() for ids, mask in zip(made["input_ids"], masks, strict=True)]
        expanded = {}
        for kind in _KEYWORD:
            if kind in given:
                expanded[kind], rows = rows[: len(given[kind])], rows[len(given[kind]) :]
        dropped = {*_OF_THE_TEXT, *getattr(self.inner, "unused_input_names", ())}
        inputs = {_RENAMED.get(n, n): v for n, v in made.items() if n not in dropped}
        return expanded, inputs

    def _options(self, kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
        found = {key: value for key, value in given.items() if value is not None}
        if kind == "audio":
            rate = getattr(self._hearing(), "sampling_rate", 16_000)
            if found.setdefault("sampling_rate", rate) != rate:
                raise ValueError(
                    f"sounds are given at {found['sampling_rate']} Hz, and this model hears at "
                    f"{rate}; resample them"
                )
        elif kind == "video":
            found["do_sample_frames"] = False
            if isinstance(self.inner.video_processor, FrameProcessor):
                found.pop("video_metadata", None)
        return found

    def _hearing(self) -> Any:
        found = getattr(self.inner, "feature_extractor", None)
        return found if found is not None else getattr(self.inner, "audio_processor", None)

    @property
    def component(self) -> dict[str, Any]:
        """Modality -> the object that processes it."""
        found = {
            "image": getattr(self.inner, "image_processor", None),
            "audio": self._hearing(),
            "video": getattr(self.inner, "video_processor", None),
        }
        return {kind: found[kind] for kind in self.placeholders}

    def snippet(self, modality: str) -> str:
        """Return what the original's chat template writes for one medium.

        Args:
            modality: one that is provided.

        Returns:
            Text with the original's tokens; ``{n}`` where it counts the media.
        """
        plain = self._rendered([])
        one = _inserted(plain, self._rendered([modality]))
        if plain is None or not one or self.placeholders[modality] not in one:
            return f"{self.placeholders[modality]}\n"
        two = _inserted(self._rendered([modality]), self._rendered([modality, modality]))
        counted = re.sub(r"(?<![\w|])1(?![\w|])", "{n}", one)
        return counted if two and two != one and counted.replace("{n}", "2") == two else one

    def _rendered(self, media: Sequence[str]) -> str | None:
        content = [*({"type": kind} for kind in media), {"type": "text", "text": "\x00"}]
        try:
            text: str = self.inner.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False
            )
        except Exception:  # noqa: BLE001 - no template, or one that takes no lists: both are fine
            return None
        return text

    def brought(self) -> list[str]:
        """Return the tokens that this part needs in a vocabulary, its placeholders first.

        Returns:
            Tokens of the original that its chat template writes around media, or that its
            processor names for the modalities provided.
        """
        added = {str(token) for token in self.inner.tokenizer.added_tokens_decoder.values()}
        found = list(self.placeholders.values())
        for kind in self.placeholders:
            found += [token for token in added if token in self.snippet(kind)]
            for name, value in sorted(vars(self.inner).items()):
                ours = any(word in name for word in _WORDS[kind]) and name.endswith("_token")
                found += [value] if ours and isinstance(value, str) and value in added else []
        others = [kind for kind in _KEYWORD if kind not in self.placeholders]
        foreign = {getattr(self.inner, f"{kind}_token", None) for kind in others}
        foreign -= set(self.placeholders.values())
        return [token for token in dict.fromkeys(found) if token not in foreign]


def processor_files(folder: Path) -> dict[str, bytes]:
    """Read the files that a processor is loaded from.

    Args:
        folder: a checkpoint.

    Returns:
        Name -> content.
    """
    patterns = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
    files = sorted({file for pattern in patterns for file in folder.glob(pattern)})
    left_out = (
        "index.json",
        "generation_config.json",
        "merge_manifest.json",
        "adapter_config.json",
    )
    return {f.name: read_bytes(f) for f in files if not f.name.endswith(left_out)}


def _inserted(without: str | None, having: str | None) -> str | None:
    """What the longer of two texts has in addition, in one place."""
    if without is None or having is None or len(having) <= len(without):
        return None
    start = next((i for i, c in enumerate(without) if having[i] != c), len(without))
    length = len(having) - len(without)
    inserted = having[start : start + length]
    return inserted if having[:start] + having[start + length :] == without else None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__

"""Options of a composed processor: which are for the text, which for which media, which unknown."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers.processing_utils import AudioKwargs, ImagesKwargs, VideosKwargs

from omnimerge.compose.videos import FrameProcessor
from omnimerge.errors import suggestion

MEDIA_KWARGS = {"image": "images_kwargs", "audio": "audio_kwargs", "video": "videos_kwargs"}
_TYPED = {"image": ImagesKwargs, "audio": AudioKwargs, "video": VideosKwargs}
_TEXT = (
    "add_special_tokens", "max_length", "pad_to_multiple_of", "padding", "padding_side",
    "return_tensors", "truncation",
)  # fmt: skip
# Media become tensors always; which frames of a video are shown is decided before.
_NO_OPTIONS = frozenset({"return_tensors", "raw_speech", "fps", "num_frames", "return_metadata"})
_CUTS = (True, "longest_first", "only_first")
_CUTS_NOT = (None, False, "do_not_truncate")


@dataclass(frozen=True)
class Options:
    """What a call asks for.

    Attributes:
        text: tokenizer's options, of `_TEXT`.
        media: modality -> options of its processor.
    """

    text: dict[str, Any] = field(default_factory=dict)
    media: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def encoding(self) -> dict[str, Any]:
        """What the tokenizer is told before media are put into the text."""
        return {k: v for k, v in self.text.items() if k == "add_special_tokens"}

    @property
    def padding(self) -> dict[str, Any]:
        """What the tokenizer is told after that."""
        given = {k: v for k, v in self.text.items() if k in ("padding_side", "pad_to_multiple_of")}
        padding = self.text.get("padding") or False
        if padding == "max_length":
            given["max_length"] = self.text.get("max_length")
        return {"padding": padding, **given}

    @property
    def tensors(self) -> Any:
        """The framework whose tensors are wanted, or None for lists."""
        return self.text.get("return_tensors")

    def limit(self, tokenizer: Any) -> int | None:
        """Return how many tokens a text may have before it is cut.

        Args:
            tokenizer: says so where only truncation is asked for.

        Returns:
            The number; None if nothing is to be cut.

        Raises:
            ValueError: if truncation is none of what a single text can have.
        """
        wanted = self.text.get("truncation")
        if wanted in _CUTS_NOT:
            return None
        if wanted not in _CUTS:
            raise ValueError(f"truncation={wanted!r} is none of {', '.join(map(repr, _CUTS))}")
        longest = self.text.get("max_length")
        return int(tokenizer.model_max_length if longest is None else longest)


def options_of(given: Mapping[str, Any], components: Mapping[str, Any]) -> Options:
    """Sort the options of a call.

    Args:
        given: as for any processor of transformers: flat, or in `text_kwargs`, `images_kwargs`,
            `audio_kwargs`, `videos_kwargs` and `common_kwargs`.
        components: modality -> the object that processes it.

    Returns:
        The options.

    Raises:
        ValueError: if one is unknown, or belongs to a modality that the model does not take.
    """
    found = Options(media={modality: {} for modality in components})
    known = {modality: _known(modality, each) for modality, each in components.items()}
    groups = {MEDIA_KWARGS[modality]: modality for modality in components}
    for key, value in given.items():
        if key in ("text_kwargs", "common_kwargs"):
            allowed = _TEXT if key == "text_kwargs" else ("return_tensors",)
            _refuse(value or {}, allowed, f"{key}: ")
            found.text.update(value or {})
        elif key in groups:
            _refuse(value or {}, known[groups[key]], f"{key}: ")
            found.media[groups[key]].update(value or {})
        elif key in _TEXT:
            found.text[key] = value
        else:
            takers = [modality for modality in known if key in known[modality]]
            if not takers:
                _refuse([key], {*_TEXT, "text_kwargs", *groups}.union(*known.values()), "")
            for modality in takers:
                found.media[modality][key] = value
    if found.media.get("video", {}).get("do_sample_frames"):
        raise ValueError("do_sample_frames: every frame of a video is shown; give fewer frames")
    return found


def cut(
    row: Sequence[int], limit: int | None, placeholders: Mapping[int, str], tokenizer: Any
) -> list[int]:
    """Cut a row of tokens, but neither the special tokens around it nor media.

    Args:
        row: the tokens, with media in it.
        limit: how many may be left; None for all.
        placeholders: token -> modality.
        tokenizer: says at which side, and which tokens are put around a text.

    Returns:
        The row, or what is left of it.

    Raises:
        ValueError: if tokens of media would be cut away.
    """
    if limit is None or len(row) <= limit:
        return list(row)
    row, around = list(row), list(tokenizer("")["input_ids"])
    first = next((i for i, each in enumerate(around) if row[i : i + 1] != [each]), len(around))
    last = len(row) - (len(around) - first)
    if row[last:] != around[first:]:  # the text has no special tokens around it
        first, last = 0, len(row)
    gone = len(row) - limit
    right = tokenizer.truncation_side == "right"
    start, stop = (last - gone, last) if right else (first, first + gone)
    if start < first or stop > last:
        raise ValueError(f"max_length={limit} leaves no room beside the special tokens; raise it")
    lost = next((placeholders[each] for each in row[start:stop] if each in placeholders), None)
    if lost is not None:
        raise ValueError(
            f"truncation to {limit} of {len(row)} tokens would cut into media ({lost}); raise "
            "max_length, or give fewer media"
        )
    return [*row[:start], *row[stop:]]


def _known(modality: str, component: Any) -> frozenset[str]:
    if isinstance(component, FrameProcessor):
        return component.options
    own = getattr(getattr(component, "valid_kwargs", None), "__annotations__", {})
    return frozenset({*_TYPED[modality].__annotations__, *own}) - _NO_OPTIONS


def _refuse(given: Iterable[str], known: Collection[str], where: str) -> None:
    for key in given:
        if key not in known:
            hint = suggestion(key, known)
            raise ValueError(f"{where}{key!r} is no option of this model's processor{hint}")

"""The configuration of a composed model: one text model, and the parts that feed it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from omnimerge.compose.names import MODEL_TYPE

MODALITIES = ("image", "audio", "video")
"""What a part can provide, in the order in which they are listed."""


class OmniConfig(PreTrainedConfig):  # type: ignore[misc]
    """Configuration of `OmniForConditionalGeneration`.

    Attributes:
        text_config: the text model's configuration; ``vocab_size`` counts the rows of all tokens,
            those that the parts bring included.
        parts: name -> ``config`` (of the original model, without dtypes), ``provides`` (a list of
            `MODALITIES`) and ``placeholders``: modality -> ``id`` (the token in this model's
            vocabulary that features are put in place of) and ``native`` (the one in the part's).
        text_class: the text model's class, where `AutoModel` has none for `text_config`.
        text_conversions: the model (a ``model_type`` or a class) by whose rules transformers
            stacks the text model's tensors, such as experts; empty for none but its own.
        tie_word_embeddings: whether the head is the embedding.
        head_bias: whether the head has a bias.
    """

    model_type = MODEL_TYPE

    text_config: dict | PreTrainedConfig | None = None  # type: ignore[type-arg]
    parts: dict | None = None  # type: ignore[type-arg]
    text_class: str = ""
    text_conversions: str = ""
    tie_word_embeddings: bool = False
    head_bias: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Make the text model's configuration of what was read."""
        self.text_config = _configured(self.text_config or {"model_type": "llama"})
        self.parts = dict(self.parts or {})
        super().__post_init__(**kwargs)

    @property
    def placeholders(self) -> dict[str, int]:
        """Modality -> token id that stands for it."""
        return {
            modality: int(place["id"])
            for part in (self.parts or {}).values()
            for modality, place in part["placeholders"].items()
        }

    def part_config(self, name: str) -> Any:
        """Return the configuration of a part's original model.

        Args:
            name: a key of `parts`.

        Returns:
            A configuration of the original's class.
        """
        return _configured((self.parts or {})[name]["config"])


def _configured(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    given = dict(value)
    return AutoConfig.for_model(given.pop("model_type"), **given)


def plain(config: Any) -> dict[str, Any]:
    """Return a configuration as JSON, without what belongs to a checkpoint and not to a model.

    Args:
        config: a transformers configuration.

    Returns:
        The mapping; ``model_type`` is in it, dtypes, architectures and file names are not.
    """
    found: dict[str, Any] = _without(config.to_dict())
    return found


_LEFT_OUT = ("dtype", "torch_dtype", "architectures", "transformers_version", "_name_or_path")


def _without(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without(each) for key, each in value.items() if key not in _LEFT_OUT}
    return value


AutoConfig.register(MODEL_TYPE, OmniConfig, exist_ok=True)

"""What a checkpoint is to a composition: which modalities it offers, and where its tensors go."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel

from omnimerge.checkpoint.small_file import check_small_files
from omnimerge.compose.configuration import MODALITIES
from omnimerge.compose.part import PartError, decoder_path
from omnimerge.compose.renaming import conversions_of, renamed
from omnimerge.compose.text import text_class
from omnimerge.errors import CheckpointError, NotMergeableError

_FEATURES = {kind: f"get_{kind}_features" for kind in MODALITIES}
_SCALED_HEAD = ("logit_scale", "logits_scaling", "final_logit_softcapping")


@dataclass(frozen=True)
class Source:
    """A checkpoint's architecture, built without memory.

    Attributes:
        folder: the checkpoint.
        config: its configuration.
        model: its base model, on the meta device.
    """

    folder: Path
    config: Any
    model: Any

    @classmethod
    def open(cls, folder: Path) -> Source:
        """Build the architecture of a checkpoint.

        Args:
            folder: the checkpoint.

        Returns:
            The source.

        Raises:
            CheckpointError: if transformers does not know it, or a small file is none to be opened.
                A checkpoint's own code is never run.
        """
        check_small_files(folder)
        try:
            config = AutoConfig.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
            if not _has_base_model(config):
                raise CheckpointError(
                    f"transformers has no base model of {config.model_type}, which a composition "
                    "takes features from (its parts may have one, each in a checkpoint of its own)"
                )
            with torch.device("meta"):
                model = AutoModel.from_config(config)
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {error}") from None
        except Exception as error:
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise CheckpointError(
                f"transformers does not know the architecture of {folder} ({reason}); give a "
                "checkpoint in the layout of transformers"
            ) from error
        return cls(folder, config, model)

    @cached_property
    def placeholders(self) -> dict[str, int]:
        """Modality -> the token that the configuration names for it."""
        found = {}
        for kind in MODALITIES:
            names = (f"{kind}_token_id", f"{kind}_token_index")
            ids = [getattr(self.config, name, None) for name in names]
            number = next((each for each in ids if isinstance(each, int)), None)
            if number is not None:
                found[kind] = number
        return found

    @cached_property
    def offers(self) -> tuple[str, ...]:
        """The modalities that the model makes features of."""
        takes = inspect.signature(self.model.forward).parameters
        found = []
        for kind in MODALITIES:
            # Qwen2-Audio makes them inside its forward pass.
            heard = kind == "audio" and "input_features" in takes
            if kind in self.placeholders and (hasattr(self.model, _FEATURES[kind]) or heard):
                found.append(kind)
        return tuple(found)

    def silence(self) -> str:
        """Return why a model that has no modality to offer has none."""
        named = [kind for kind in MODALITIES if hasattr(self.model, _FEATURES[kind])]
        if not named:
            return "offers no image, audio or video features"
        return (
            f"has no placeholder token for {' or '.join(named)} in its configuration "
            f"({named[0]}_token_id), so its features have no place in a prompt"
        )

    def obstacle(self) -> str:
        """Return why the towers cannot be taken out of this architecture; empty if they can."""
        kind = self.config.model_type
        text = self.config.get_text_config(decoder=True)
        seeing = getattr(self.config, "vision_config", None)
        if getattr(seeing, "deepstack_visual_indexes", None):
            return (
                f"{kind} adds features to several layers of its language model (deepstack), which "
                "a composed model does not do"
            )
        if getattr(text, "cross_attention_layers", None):
            return f"{kind} attends to features across, instead of having them among its tokens"
        if hasattr(self.model, "get_image_tokens"):
            return f"{kind} turns pictures into tokens of its own vocabulary, instead of features"
        if "token_type_ids" in inspect.signature(self.model.forward).parameters:
            return f"the language model of {kind} attends to features in both directions"
        if self.has_inner_head:
            return self.inner_head
        try:
            decoder_path(self.model)
        except PartError as error:
            return str(error)
        return ""

    @property
    def has_inner_head(self) -> bool:
        """Whether the base model holds the language model together with its head."""
        return self.model.get_decoder().get_output_embeddings() is not None

    @property
    def inner_head(self) -> str:
        """Why a model with such a base model is refused."""
        return (
            f"{self.config.model_type} has its language model and the head in one, which a "
            "composed model keeps apart"
        )

    @property
    def has_mrope(self) -> bool:
        """Whether the text model takes positions in three dimensions."""
        rope = getattr(self.config.get_text_config(decoder=True), "rope_parameters", None) or {}
        return "mrope_section" in rope

    @cached_property
    def decoder(self) -> str:
        """Prefix of the text model's tensors in memory, with its dot; empty for a plain LLM."""
        inside = self.model.get_decoder() is not self.model
        return f"{decoder_path(self.model)}." if inside else ""

    @property
    def text_class(self) -> str:
        """The text model's class, where it has to be named."""
        return text_class(self.model.get_decoder(), self.config.get_text_config(decoder=True))

    @property
    def conversions(self) -> str:
        """By which name transformers knows how the text model's tensors are stacked or split."""
        return conversions_of(self.model) if self.decoder else ""

    def memory(self, names: Sequence[str]) -> dict[str, str]:
        """Bring tensor names on disk to names in the base model.

        What transformers stacks or splits when it loads keeps its own leaf, as on disk; the
        composed model is loaded by the same rules (`conversions`).

        Args:
            names: as on disk.

        Returns:
            Disk -> memory; names that the model has no place for are left out.
        """
        state = self.model.state_dict()
        places = {name: each for name, each in renamed(self.model, names).items()
                  if all(final in state for final in each.final)}  # fmt: skip
        self._check({final for each in places.values() for final in each.final}, state)
        return {name: each.plain for name, each in places.items()}

    def _check(self, found: Collection[str], state: Mapping[str, Any]) -> None:
        """Refuse a checkpoint whose towers, projectors or language model are not all there."""
        missing = sorted(set(state) - set(found))
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise CheckpointError(
                f"{self.folder} lacks {len(missing)} tensors of its architecture: "
                f"{', '.join(missing[:3])}{more}; check it with `omnimerge inspect`"
            )


def _has_base_model(config: Any) -> bool:
    """Whether `AutoModel` knows a class for a configuration."""
    return type(config) in AutoModel._model_mapping


def check_head(source: Source) -> None:
    """Refuse a language model whose logits are more than its head's product.

    Args:
        source: the target.

    Raises:
        NotMergeableError: if the logits are scaled or capped, or the head is in the base model.
    """
    text = source.config.get_text_config(decoder=True)
    odd = [name for name in _SCALED_HEAD if getattr(text, name, None) not in (None, 1, 1.0)]
    if odd:
        raise NotMergeableError(
            [f"{source.folder}: the logits of {text.model_type} are changed by {odd[0]}, which a "
             "composed model does not do"]
        )  # fmt: skip
    if source.has_inner_head:
        raise NotMergeableError([f"{source.folder}: {source.inner_head}; give another target"])

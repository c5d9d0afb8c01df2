"""Whether transformers will load what is about to be written: asked before it is written."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from omnimerge.checkpoint import OutputTensor
from omnimerge.compose.configuration import OmniConfig
from omnimerge.compose.modeling import OmniForConditionalGeneration
from omnimerge.compose.names import HEAD
from omnimerge.compose.renaming import renamed
from omnimerge.errors import NotMergeableError


def check_loads(config: OmniConfig, outputs: Sequence[OutputTensor], target: Path) -> None:
    """Refuse a composition whose tensors would not be the composed model's.

    The model is built without memory, so this costs about a second.

    Args:
        config: the composed model's configuration.
        outputs: the tensors to be written.
        target: the checkpoint whose text model it is, for the message.

    Raises:
        NotMergeableError: if the model cannot be built, lacks tensors, or has others.
    """
    kind = config.get_text_config(decoder=True).model_type
    try:
        with torch.device("meta"):
            model = OmniForConditionalGeneration(config)
    except Exception as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise NotMergeableError(
            [f"{target}: no composed model can be built over {kind} ({reason}); give another "
             "target"]
        ) from error  # fmt: skip
    problem = _difference(model, outputs)
    if problem:
        raise NotMergeableError(
            [f"{target}: a composed model over {kind} would not load: {problem}; give another "
             "target, or leave that model out"]
        )  # fmt: skip


def _difference(model: OmniForConditionalGeneration, outputs: Sequence[OutputTensor]) -> str:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        expected.pop(f"{HEAD}.weight", None)
    places = renamed(model, [tensor.name for tensor in outputs])
    stacked: Counter[tuple[str, ...]] = Counter()
    for tensor in outputs:
        place = places[tensor.name]
        if any(name not in expected for name in place.final):
            return f"transformers would look for {place.final[0]!r}, which there is not"
        if place.converted:
            stacked[place.final] += math.prod(tensor.shape)
        elif expected[place.final[0]] != tuple(tensor.shape):
            wanted = list(expected[place.final[0]])
            return f"{tensor.name!r} has shape {list(tensor.shape)}, {wanted} is needed"
    for final, numbers in stacked.items():
        if numbers != sum(math.prod(expected[name]) for name in final):
            return f"the tensors that are stacked to {final[0]!r} are not all there"
    lacking = set(expected) - {name for place in places.values() for name in place.final}
    return f"it would lack {min(lacking)!r}" if lacking else ""

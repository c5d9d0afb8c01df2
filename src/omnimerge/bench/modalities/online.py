"""The online composition: every modality has a language model of its own, kept beside the others.

The reference of the paper's Table 5 (after NaiveMC and DAMC of ModelCompose), defined here as
follows. Every weight of the language model's layers is kept once per expert. A token that stands
for a picture, a sound or a frame goes through its own expert's weights, every other token through
the mean of all experts' weights; queries meet keys and values of all tokens as usual. So nothing
of an expert is averaged where its own modality is read, at the price of one language model per
modality, and one more for the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from omnimerge.bench.modalities import models


class _Routed(nn.Module):
    """A linear layer with one weight per modality and one for text."""

    def __init__(self, plain: nn.Linear, weights: Mapping[str, Tensor], router: Router) -> None:
        super().__init__()
        self.bias = plain.bias
        self.weights = dict(weights)
        self.text = torch.stack(list(weights.values())).mean(dim=0)
        self.router = router

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the layer's output, ``(batch, tokens, features)``."""
        found = nn.functional.linear(hidden, self.text, self.bias)
        for modality, weight in self.weights.items():
            mask = self.router.masks.get(modality)
            if mask is not None and bool(mask.any()):
                own = nn.functional.linear(hidden, weight, self.bias)
                found = torch.where(mask.unsqueeze(-1), own, found)
        return found


class Router:
    """Tells which tokens of the batch at hand are of which modality.

    Args:
        placeholders: modality -> its token.
    """

    def __init__(self, placeholders: Mapping[str, int]) -> None:
        self.placeholders = dict(placeholders)
        self.masks: dict[str, Tensor] = {}

    @contextmanager
    def batch(self, ids: Tensor) -> Iterator[None]:
        """Look at a batch inside the block.

        Args:
            ids: ``(batch, tokens)``.

        Yields:
            Nothing.
        """
        self.masks = {name: ids == token for name, token in self.placeholders.items()}
        try:
            yield
        finally:
            self.masks = {}


def route(model: Any, experts: Mapping[str, Mapping[str, Tensor]]) -> Router:
    """Put the experts' weights side by side into a composed model.

    Args:
        model: an `OmniForConditionalGeneration`; its matrices are replaced.
        experts: modality -> name of a layer's matrix in the text model -> weight.

    Returns:
        What has to be told of each batch.
    """
    router = Router(model.config.placeholders)
    text = model.get_decoder()
    for name in next(iter(experts.values())):
        path = name.removesuffix(".weight")
        weights = {modality: found[name] for modality, found in experts.items()}
        text.set_submodule(path, _Routed(text.get_submodule(path), weights, router))
    return router


def experts_of(folder: Path, names: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """Read the matrices of the experts' language models.

    Args:
        folder: a built folder.
        names: the experts.

    Returns:
        Expert -> name in the text model -> weight.
    """
    found = {}
    for name in names:
        layers = models.load(name, folder / name).get_decoder().state_dict()
        found[name] = {k: v for k, v in layers.items() if k.startswith("layers.") and v.ndim == 2}
    return found

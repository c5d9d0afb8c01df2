"""What the parts give the text model for a batch of prompts: computed once, used in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from omnimerge.compose.part import Fed


@dataclass(frozen=True)
class Encoded:
    """Features of all parts, in the places of their placeholders.

    Batched like the prompts, not like the media: it can be repeated for beams and cut into chunks,
    which the inputs of a tower (patches in a row, pictures of several prompts) cannot.

    Attributes:
        start: how many tokens are before the first that this is about.
        embeds: ``(batch, tokens, hidden)``; meaningful where `mask` is True.
        mask: ``(batch, tokens)``, True where features stand.
        shifts: ``(3, batch, tokens)``: by how much each token lies away from where it would as
            text; None without M-RoPE.
        after: ``(batch, 1)``: the same for all tokens that follow; None without M-RoPE.
    """

    start: int
    embeds: Tensor
    mask: Tensor
    shifts: Tensor | None = None
    after: Tensor | None = None

    @property
    def stop(self) -> int:
        """One past the last token that this is about."""
        return self.start + self.mask.shape[1]

    def repeated(self, times: int) -> Encoded:
        """Return the same for prompts that each stand there several times in a row.

        Args:
            times: how often.

        Returns:
            What holds for the repeated batch.
        """
        if times == 1:
            return self
        return replace(
            self,
            embeds=self.embeds.repeat_interleave(times, dim=0),
            mask=self.mask.repeat_interleave(times, dim=0),
            shifts=None if self.shifts is None else self.shifts.repeat_interleave(times, dim=1),
            after=None if self.after is None else self.after.repeat_interleave(times, dim=0),
        )

    def put(self, words: Tensor, past: int) -> Tensor:
        """Put features in place of placeholders.

        Args:
            words: ``(batch, tokens, hidden)``, embeddings of the tokens after the first `past`.
            past: how many tokens are before them.

        Returns:
            The embeddings; unchanged where this is about none of the tokens.
        """
        first, last = max(past, self.start), min(past + words.shape[1], self.stop)
        if first >= last:
            return words
        mine = slice(first - self.start, last - self.start)
        features = self.embeds[:, mine].to(words.device, words.dtype)
        place = self.mask[:, mine].unsqueeze(-1).to(words.device)
        changed = torch.where(place, features, words[:, first - past : last - past])
        return torch.cat([words[:, : first - past], changed, words[:, last - past :]], dim=1)

    def shifts_of(self, past: int, tokens: int) -> Tensor | None:
        """Return by how much tokens lie away from where they would as text.

        Args:
            past: how many tokens are before them.
            tokens: how many they are.

        Returns:
            ``(3, batch, tokens)``; None without M-RoPE.
        """
        if self.shifts is None or self.after is None:
            return None
        mine = self.shifts[..., max(0, past - self.start) : max(0, past + tokens - self.start)]
        later = self.after.expand(3, -1, -1).repeat(1, 1, tokens - mine.shape[-1])
        return torch.cat([mine, later], dim=-1)


def put_together(
    fed: Sequence[Fed], mask: Tensor | None, start: int, before: Tensor | None
) -> Encoded | None:
    """Put together what several parts give for the same tokens.

    Args:
        fed: one per part that has a place among them.
        mask: ``(batch, tokens)``, the attention mask of these tokens; None for all.
        start: how many tokens are before them.
        before: ``(batch, 1)``, the shift of the token before the first, if it has one.

    Returns:
        The whole; None if no part has anything to give.
    """
    if not fed:
        return None
    embeds, place = fed[0].embeds, fed[0].mask
    for each in fed[1:]:
        own = each.mask.to(place.device)
        embeds = torch.where(own.unsqueeze(-1), each.embeds.to(embeds.device), embeds)
        place = place | own
    moved = [each.positions for each in fed if each.positions is not None]
    if not moved:
        return Encoded(start, embeds, place)
    device = moved[0].device
    real = torch.ones_like(place) if mask is None else mask.bool()
    real = real.to(device)
    text = (real.long().cumsum(-1) - 1).clamp(min=0)
    shifts = torch.zeros_like(moved[0])
    for positions in moved:
        shifts = shifts + torch.where(real, positions.to(device) - text, 0)
    highest = (text + shifts).masked_fill(~real, -1).amax(dim=(0, 2))
    after = (highest + 1 - real.sum(-1)).unsqueeze(-1)
    if before is not None:
        # Padding has no position of its own, so it may be moved as well.
        shifts, after = shifts + before.to(device), after + before.to(device)
    return Encoded(start, embeds, place, shifts, after)


def fitted(deltas: Tensor, batch: int) -> Tensor:
    """Bring one shift per prompt to a batch with other numbers of copies of each prompt.

    Args:
        deltas: ``(prompts, 1)``, each prompt's copies in a row.
        batch: how many rows are wanted.

    Returns:
        ``(batch, 1)``.
    """
    rows = torch.arange(batch, device=deltas.device) * deltas.shape[0] // batch
    return deltas[rows]

"""What a model answered to one prompt, and what answering took."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Response:
    """One answer.

    Attributes:
        id: the prompt's id.
        text: the answer, without special tokens, stripped of white space at both ends.
        tokens: ids of the tokens that were generated, without the one that ended the answer.
    """

    id: str
    text: str
    tokens: tuple[int, ...] = ()


@dataclass(slots=True)
class GenerationStats:
    """What a `Generator` did since it was loaded, in counts.

    Attributes:
        samples_answered: answers given.
        forward_passes: calls of the model, a batch at a time: the measure of what was saved.
        tokens_decoded: tokens of answers that were decoded step by step.
        tokens_verified: tokens of drafts that were found to be the model's own.
        samples_verified: answers that equal their draft to the end, so that nothing was decoded.
        samples_redone: answers that left their draft and were decoded from there.
        drafts_taken: calls whose drafts were verified.
        drafts_in_16_bits: those of them that were, in a type in which no batching is exact.
        drafts_refused: calls whose drafts were not looked at; `refusal` says why the last was.
        inputs_encoded: batches that were rendered and processed.
        inputs_reused: batches whose inputs were still there.
        features_computed: calls of a tower, or of what turns media into features.
        features_reused: such calls answered from memory.
        batches_halved: batches that did not fit into memory.
        refusal: why drafts were refused last; empty if they never were.
    """

    samples_answered: int = 0
    forward_passes: int = 0
    tokens_decoded: int = 0
    tokens_verified: int = 0
    samples_verified: int = 0
    samples_redone: int = 0
    drafts_taken: int = 0
    drafts_in_16_bits: int = 0
    drafts_refused: int = 0
    inputs_encoded: int = 0
    inputs_reused: int = 0
    features_computed: int = 0
    features_reused: int = 0
    batches_halved: int = 0
    refusal: str = ""

    def to_dict(self) -> dict[str, float]:
        """Return the counts; `refusal`, which is none, is left out."""
        return {name: value for name, value in asdict(self).items() if name != "refusal"}

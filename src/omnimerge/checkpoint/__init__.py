"""Bytes to tensors and back: headers, reads of any part, streamed writes, locations."""

from omnimerge.checkpoint.adapted import AdaptedCheckpoint
from omnimerge.checkpoint.adapter import Adapter, unresolved
from omnimerge.checkpoint.headers import TensorMeta
from omnimerge.checkpoint.locate import locate
from omnimerge.checkpoint.mapped import MappedCheckpoint, Segment
from omnimerge.checkpoint.reader import Checkpoint
from omnimerge.checkpoint.writer import CheckpointWriter, OutputTensor

__all__ = [
    "AdaptedCheckpoint",
    "Adapter",
    "Checkpoint",
    "CheckpointWriter",
    "MappedCheckpoint",
    "OutputTensor",
    "Segment",
    "TensorMeta",
    "locate",
    "unresolved",
]

"""Merge multimodal LLMs: map, merge and search, without training and without labels."""

__version__ = "0.1.0"

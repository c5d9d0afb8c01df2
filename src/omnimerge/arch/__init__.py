"""Tensor names to slots, slots to an alignment between checkpoints."""

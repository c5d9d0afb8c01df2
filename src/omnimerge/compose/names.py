"""Names in composed models."""

MODEL_TYPE = "omnimerge_omni"
"""``model_type`` in the config.json of a composed model."""

TEXT_PREFIX = "model.language_model."
"""What the text model's tensors begin with."""

HEAD = "lm_head"
"""The head's module."""

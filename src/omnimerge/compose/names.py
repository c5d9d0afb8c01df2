"""The name that composed models go by."""

MODEL_TYPE = "omnimerge_omni"
"""``model_type`` in the config.json of a composed model."""

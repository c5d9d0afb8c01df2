"""Where a built folder of the line keeps what; the experts are in folders of their own names."""

TOWERS = "towers"
"""Each tower and projector before the base's language model."""

ADAPTERS = "adapters"
"""What each expert's language model learned: a PEFT adapter on the same of `TOWERS`."""

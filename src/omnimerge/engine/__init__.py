"""Recipe to plan to streamed execution."""

"""Model and prompts to responses."""

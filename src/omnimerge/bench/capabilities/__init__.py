"""Five capabilities as generated tasks, and two lines of models that learn them."""

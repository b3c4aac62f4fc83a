"""What a model folder means: its configuration and weights, before any backend loads it."""

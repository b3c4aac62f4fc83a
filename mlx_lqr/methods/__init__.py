"""The steering methods."""

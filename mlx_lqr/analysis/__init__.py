"""Why steering works on a model, and how well: measured, not assumed."""

"""MLX: Metal on a Mac, the CPU elsewhere."""

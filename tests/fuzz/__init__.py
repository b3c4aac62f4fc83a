"""Damaged and hostile files of every kind that the library reads, made from sound ones by a seed.

`make fuzz` runs it; see `__main__.py`.
"""

import mlx_lqr  # noqa: F401 - before MLX, which then takes a tuned BLAS

"""`python -m mlx_lqr`: the command line."""

from mlx_lqr.commands import main

if __name__ == "__main__":
    main(prog_name="mlx-lqr")

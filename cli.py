"""A launcher for the checkout: `python cli.py chat ...` is `mlx-lqr chat ...` with the code that stands here."""

import importlib.util
import sys
from pathlib import Path

spec = importlib.util.find_spec("mlx_lqr")
assert spec is not None
assert spec.loader is not None
assert spec.submodule_search_locations is not None
spec.submodule_search_locations.append(str(Path(__file__).parent))  # where runtime/ and convert/ stand
package = sys.modules["mlx_lqr"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)

if __name__ == "__main__":
    from mlx_lqr.commands import main

    main(prog_name="python cli.py")

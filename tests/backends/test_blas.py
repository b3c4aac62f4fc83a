"""The tuned BLAS on Linux, what is said without one (each case in a fresh process, as a user would start it), and how
weights are laid out for it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mlx_lqr.backends.mlx.model import MLXModel

CPU = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace") if sys.platform == "linux" else ""
linux = pytest.mark.skipif(sys.platform != "linux", reason="macOS uses Accelerate")


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, **environment}
    )


@linux
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the installation brings a BLAS on x86-64 only")
def test_the_installation_brings_a_tuned_blas_which_mlx_then_uses() -> None:
    done = run(
        "import mlx_lqr, mlx.core as mx\n"
        "a = mx.ones((512, 512))\nmx.eval(a @ a)\n"
        "print([line.split('/')[-1] for line in open('/proc/self/maps') if 'libmkl' in line])"
    )
    assert "libmkl_rt" in done.stdout
    assert "libmkl_core" in done.stdout, "the library is loaded but MLX's products do not reach it"


@linux
@pytest.mark.parametrize(
    "code",
    [
        "import mlx_lqr.backends.blas as blas\nimport mlx_lqr",
        "import mlx.core\nimport mlx_lqr",
    ],
    ids=["none found", "mlx imported first"],
)
def test_without_one_it_works_and_says_once_what_it_costs(code: str) -> None:
    load = "\nmlx_lqr.generate(mlx_lqr.load('demo'), 'Hi', max_tokens=1)\nmlx_lqr.load('demo')\nprint('works')"
    note = "none found" if "mlx.core" not in code else ""
    done = run(code + load, MLX_LQR_BLAS="/no/such/library.so" if note else "")
    assert done.stdout == "works\n"
    assert done.stderr.count("no tuned BLAS in use") == 1


@linux
@pytest.mark.skipif("AuthenticAMD" not in CPU, reason="MKL suits Intel's processors by itself")
@pytest.mark.parametrize(("asked", "mode"), [({}, 2), ({"MKL_CBWR": "COMPATIBLE"}, 3)], ids=["auto", "the user's"])
def test_mkl_is_in_the_mode_that_suits_processors_of_amd(
    asked: dict[str, str], mode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MKL_CBWR", raising=False)
    code = "import ctypes, mlx_lqr.backends.blas as blas\nprint(ctypes.CDLL(blas.preload()).MKL_CBWR_Get(1))"
    assert run(code, **asked).stdout == f"{mode}\n"


@linux
def test_it_can_be_switched_off() -> None:
    done = run(
        "import mlx_lqr\nmlx_lqr.load('demo')\nprint('mkl' in open('/proc/self/maps').read())", MLX_LQR_BLAS="off"
    )
    assert done.stdout == "False\n"
    assert "BLAS" not in done.stderr


@pytest.mark.parametrize("rows", [1, 16])
def test_a_head_laid_out_for_single_tokens_gives_the_logits_of_its_weight(rows: int, smollm2: MLXModel) -> None:
    import mlx.core as mx  # after mlx_lqr, so that MLX gets its BLAS

    x = mx.random.normal((rows, 1, smollm2.hidden_size), key=mx.random.key(rows))
    logits = np.asarray(smollm2.module.model.embed_tokens.as_linear(x))
    weight = np.asarray(smollm2.module.model.embed_tokens.weight).astype(np.float64)
    expected = np.asarray(x).astype(np.float64) @ weight.T
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())

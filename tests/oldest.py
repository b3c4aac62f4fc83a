"""The compatibility run: every package of pyproject.toml at the oldest version that it allows, and what is tested so.

    python tests/oldest.py constraints > constraints.txt
    pip install --editable '.[torch,test-oldest]' --constraint constraints.txt
    python -m pytest $(python tests/oldest.py tests)

Packages that only tests need may be of any version.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
_GROUPS = ("dependencies", "torch")

TESTS: dict[str, tuple[str, ...]] = {
    "tests/backends/test_borrowed.py": (),
    "tests/backends/test_torch_generate.py": (),
    "tests/backends/test_tokenizer.py": (),
    "tests/test_golden.py": ("test_direction", "test_jacobians", "test_logits_and_tokens_unsteered"),
    "tests/runtime/test_steer.py": (
        "test_mlx_lm_generates_what_our_loop_generates",
        "test_each_prompt_of_batch_generate_is_steered_as_if_alone",
        "test_generation_from_a_prompt_cache_equals_that_from_the_whole_prompt",
        "test_speculative_decoding_changes_no_token",
        "test_other_threads_are_steered_too",
    ),
    "tests/backends/test_torch.py": (
        "test_transformers_generates_what_our_loop_generates",
        "test_each_prompt_of_a_padded_batch_is_steered_as_if_alone",
        "test_assisted_decoding_changes_no_token",
        "test_jacobian_equals_finite_differences",
    ),
    "tests/families/test_any_torch_model.py": (
        "test_numbers_are_those_of_a_pass_without_a_cache",
        "test_steered_tokens_are_those_of_transformers_hooked_by_hand",
        "test_transformers_own_generation_is_steered_in_place",
    ),
    "tests/backends/test_backends.py": ("test_numbers_agree", "test_steered_tokens_agree"),
    "tests/commands/test_cli.py": ("test_fit_then_show", "test_python_runs_the_package"),
    "tests/convert/test_huggingface.py": (
        "test_logits_equal_torch",
        "test_quantised_logits_are_those_of_the_dequantised_weights",
    ),
    "tests/convert/test_gguf_model.py": ("test_logits_equal_transformers_with_the_same_weights",),
}
"""What the versions of other libraries can change: file -> its tests, or all of them where none is named."""


def oldest(pyproject: str) -> dict[str, str]:
    """Package -> the oldest version that the dependencies and the torch backend allow.

    Raises:
        ValueError: a package without a lower bound.
    """
    versions: dict[str, str] = {}
    for group in _GROUPS:  # Python 3.10 has no parser of TOML, and pip cannot have installed one yet
        listed = re.search(rf"^{group} = \[(.*?)\]$", pyproject, re.MULTILINE | re.DOTALL)
        assert listed is not None, group
        for requirement in re.findall(r'"([^"]+)"', listed[1]):
            bound = re.match(r"([\w.-]+)(?:\[[\w,-]+\])?>=([\d.]+)", requirement)
            if bound is None:
                raise ValueError(f"{requirement!r} has no lower bound")
            versions[bound[1]] = bound[2]
    return versions


if __name__ == "__main__":
    if sys.argv[1:] == ["constraints"]:
        print(*(f"{name}=={version}" for name, version in oldest(PYPROJECT.read_text("utf-8")).items()), sep="\n")
    elif sys.argv[1:] == ["tests"]:
        print(*(f"{file}::{test}" for file, tests in TESTS.items() for test in tests))
        print(*(file for file, tests in TESTS.items() if not tests))
    else:
        sys.exit(__doc__)

"""The callback in C steers as the one in Python does, and where it cannot be there the one in Python does it all."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.platforms import posix
from helpers.tiny_gguf import write

from mlx_lqr import InputError
from mlx_lqr.backends.protocol import Affine, AffineLaw

pytest.importorskip("llama_cpp")

from mlx_lqr.backends.llama import native
from mlx_lqr.backends.llama.hook import Hook, PythonHook, Rows, hook_for
from mlx_lqr.backends.llama.library import llama, parameters
from mlx_lqr.backends.llama.load import Loaded

pytestmark = posix


class RandomLaw:
    """Affine, with random numbers: R where it `reads` z, S where it reads y."""

    site = "block"
    replayable = True

    def __init__(self, layers: Sequence[int], width: int, concepts: int = 1, reads: str = "z", seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.layers, self.acts, self.calls = tuple(layers), True, 0
        self.numbers = {
            k: Affine(
                random.normal(size=concepts).astype(np.float32),
                random.normal(size=(width, concepts)).astype(np.float32) * 0.3,
                *(
                    random.normal(size=(width, concepts)).astype(np.float32) * 0.1 if of in reads else None
                    for of in "zy"
                ),
            )
            for k in self.layers
        }

    def to(self, *_: Any, **__: Any) -> RandomLaw:
        return self

    def aim(self) -> None: ...

    def affine(self) -> dict[int, Affine] | None:
        return self.numbers

    def __call__(self, layer: int, z: np.ndarray, output: np.ndarray) -> np.ndarray:
        self.calls += 1
        one = self.numbers[layer]
        error = one.target - (0 if one.read_input is None else z @ one.read_input)
        return output + (error - (0 if one.read_output is None else output @ one.read_output)) @ one.gain.T


class Opaque(RandomLaw):
    """One that has to be called."""

    def affine(self) -> None:
        return None


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return Loaded(write(tmp_path_factory.mktemp("tiny") / "tiny.gguf", request.param).path)


TOKENS = list(range(5, 28))


class Decoding:
    """A context with a hook, in which the tokens of a few sequences are run side by side."""

    def __init__(self, loaded: Loaded, hook: Hook, ubatch: int) -> None:
        self._hook, self._loaded = hook, loaded
        asked: dict[str, Any] = {
            "n_ctx": 256,
            "n_batch": 64,
            "n_ubatch": ubatch,
            "n_seq_max": 4,
            "n_threads": 1,
            "n_threads_batch": 1,
        }
        asked |= {"kv_unified": True, "type_k": 0, "type_v": 0}
        asked |= {"cb_eval": hook.callback, "cb_eval_user_data": hook.user_data}
        self._context = llama().llama_init_from_model(loaded.pointer, parameters("context", asked))
        self._lengths = [0] * 4

    def run(self, rows: Sequence[tuple[int, int]], outputs: Sequence[int], steered: Sequence[Rows]) -> np.ndarray:
        """Append rows of (sequence, token); the logits (n, V) of the outputs."""
        batch = llama().llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for i, (sequence, token) in enumerate(rows):
            batch.token[i], batch.pos[i] = token, self._lengths[sequence]
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, sequence, i in outputs
            self._lengths[sequence] += 1
        self._hook.prepare(steered, len(rows), outputs)
        assert llama().llama_decode(self._context, batch) == 0
        llama().llama_batch_free(batch)
        self._hook.finish()
        logits = llama().llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, (len(outputs), self._loaded.vocab_size)).copy()


def hooks(loaded: Loaded, ubatch: int) -> list[Hook]:
    """In Python, and in C"""
    sizes = loaded.num_layers, loaded.hidden_size
    return [PythonHook(*sizes), native.NativeHook(*sizes, ubatch)]


@pytest.mark.parametrize("ubatch", [64, 5])
def test_affine_laws_do_what_their_calls_do(loaded: Loaded, ubatch: int) -> None:
    """Laws of every kind, at prompts in one batch or in parts, with outputs here and there; then token by token."""
    last, width = loaded.num_layers - 1, loaded.hidden_size
    kinds: list[Any] = [(range(last + 1), width, 3, "z", 1), ([last], width, 1, "y", 2), ([0], width, 2, "zy", 3)]
    kinds.append(([0, last], width, 1, "", 4))
    prompt = [(i % 4, token) for i, token in enumerate(TOKENS)]
    own = [[i for i, (sequence, _) in enumerate(prompt) if sequence == number] for number in range(4)]
    results = []
    python, native_hook = hooks(loaded, ubatch)
    for kind, hook in ((Opaque, python), (RandomLaw, python), (RandomLaw, native_hook)):
        laws = [kind(*arguments) for arguments in kinds]
        decoding = Decoding(loaded, hook, ubatch)
        first = [Rows(law, rows) for law, rows in zip(laws, (own[0], own[1][-1:], own[2][2:], own[3]), strict=True)]
        logits = [decoding.run(prompt, [2, *range(15, 23)], first)]
        logits.append(decoding.run(prompt[:9], [8], []))
        for step in range(3):
            logits.append(
                decoding.run(
                    [(i, 9 + step) for i in range(4)], range(4), [Rows(law, [i]) for i, law in enumerate(laws)]
                )
            )
            laws[0].numbers = RandomLaw(range(last + 1), width, 3, "z", 10 + step).numbers  # as a strength is set
        results.append(np.concatenate(logits))
        assert any(law.calls for law in laws) == (kind is Opaque)
    called, *affine = results
    unsteered = Decoding(loaded, PythonHook(last + 1, width), ubatch).run(prompt, [2, *range(15, 23)], [])
    assert np.abs(called[:9] - unsteered).max() > 0.1
    for one in affine:
        np.testing.assert_allclose(one, called, atol=1e-3 * np.abs(called).max())
        assert np.array_equal(one.argmax(1), called.argmax(1))


def test_a_law_that_has_to_be_called_is_called(loaded: Loaded) -> None:
    law = Opaque(range(loaded.num_layers), loaded.hidden_size, 2)
    rows = [(0, token) for token in TOKENS]
    python, mixed = (
        Decoding(loaded, hook, 64).run(rows, [22], [Rows(law, range(20)), Rows(RandomLaw([1], 64), [20, 22])])
        for hook in hooks(loaded, 64)
    )
    assert law.calls == 2 * loaded.num_layers
    assert np.array_equal(python, mixed)


def test_what_a_law_raises_is_reported(loaded: Loaded) -> None:
    class Broken(Opaque):
        def __call__(self, layer: int, z: np.ndarray, output: np.ndarray) -> np.ndarray:
            raise ZeroDivisionError("nothing to divide by")

    hook = hooks(loaded, 64)[1]
    with pytest.raises(ZeroDivisionError):
        Decoding(loaded, hook, 64).run([(0, 5)], [0], [Rows(Broken([1], loaded.hidden_size), [0])])
    assert list(hook.failures) == [0]


@pytest.mark.parametrize("mistake", ["layers", "width", "rows at once"])
def test_steering_that_has_not_happened_is_an_error(loaded: Loaded, mistake: str) -> None:
    """As where another version of llama.cpp names or computes things in another way."""
    layers, width, ubatch = loaded.num_layers, loaded.hidden_size, 8
    hook = {
        "layers": lambda: native.NativeHook(layers + 1, width, ubatch),
        "width": lambda: native.NativeHook(layers, width // 2, ubatch),
        "rows at once": lambda: native.NativeHook(layers, width, ubatch + 1),
    }[mistake]()
    law = RandomLaw([layers] if mistake == "layers" else [0], width // 2 if mistake == "width" else width)
    with pytest.raises(InputError, match=r"shown 0 of 1|other rows"):
        Decoding(loaded, hook, ubatch).run([(0, token) for token in TOKENS], [22], [Rows(law, [22])])


def test_rows_that_overflow_are_named_until_the_next_batch(loaded: Loaded) -> None:
    for hook in hooks(loaded, 5):
        decoding, law = Decoding(loaded, hook, 5), RandomLaw([1], loaded.hidden_size)
        law.numbers = {1: Affine(np.full(1, 1e30, np.float32), law.numbers[1].gain)}
        rows = [(i % 4, token) for i, token in enumerate(TOKENS)]
        decoding.run(rows, range(23), [Rows(law, [3, 21])])
        assert sorted(hook.overflowed) == [3, 21]
        decoding.run(rows, range(23), [])
        assert not list(hook.overflowed)


def test_it_is_the_hook_of_a_context_where_a_compiler_is(loaded: Loaded) -> None:
    assert native.why_not() == ""
    assert isinstance(hook_for(loaded.num_layers, loaded.hidden_size, 64), native.NativeHook)
    assert isinstance(RandomLaw([0], 4), AffineLaw)


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Nothing compiled yet, in a cache folder of its own; afterwards as before."""
    monkeypatch.setenv("MLX_LQR_CACHE", str(tmp_path / "cache"))
    native._built.cache_clear()
    yield tmp_path / "cache" / "native"
    native._built.cache_clear()


def compiler(folder: Path, script: str) -> str:
    """A folder in which `cc` is this shell script."""
    folder.mkdir(exist_ok=True)
    (folder / "cc").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "cc").chmod(0o755)
    return str(folder)


def test_it_is_compiled_once_into_a_private_file(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.native() is not None
    (file,) = fresh.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o700
    assert stat.S_IMODE(fresh.stat().st_mode) == 0o700
    native._built.cache_clear()
    monkeypatch.setenv("PATH", compiler(tmp_path / "bin", "exit 1"))
    assert native.native() is not None


@pytest.mark.parametrize(
    ("trouble", "says"),
    [
        ("off", "MLX_LQR_NATIVE is off"),
        ("no compiler", "no C compiler"),
        ("a compiler that fails", "cannot compile it (no such header)"),
        ("a compiler that makes nothing", "no file"),
        ("a folder of everybody's", "others may write"),
        ("a file of everybody's", "not yours alone"),
        ("another file", "file too short"),
        ("another library", "mlx_lqr_size"),
    ],
)
def test_without_it_python_steers(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str, says: str
) -> None:
    def elsewhere(script: str) -> None:
        monkeypatch.setenv("PATH", compiler(tmp_path / "bin", script))

    if trouble == "off":
        monkeypatch.setenv("MLX_LQR_NATIVE", "off")
    elif trouble == "no compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
    elif "compiler" in trouble:
        elsewhere("echo no such header >&2; exit 1" if "fails" in trouble else "exit 0")
    elif trouble == "a folder of everybody's":
        fresh.mkdir(parents=True)
        fresh.chmod(0o777)
    elif trouble == "a file of everybody's":
        assert native.native() is not None
        (file,) = fresh.iterdir()
        native._built.cache_clear()
        file.chmod(0o777)
    else:
        linked = 'echo "int none;" | PATH=/usr/bin:/bin cc -shared -x c -o $2 -'
        made = "echo none > $2" if trouble == "another file" else linked
        elsewhere(f'while [ "$1" != -o ]; do shift; done\n{made}')
    assert native.native() is None
    assert says in native.why_not()
    assert isinstance(hook_for(2, 8, 4), PythonHook)

"""Sound files of every kind, each with what it is mutated by and what is done with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from helpers.backends import BACKENDS, tiny_folder
from helpers.tiny import FAMILY
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

import mlx_lqr
from fuzz import uses
from fuzz.gguf_mutations import mutate_gguf
from fuzz.mutations import Mutator, mutate_lines, mutate_object, mutate_tensors, mutate_text
from mlx_lqr.files.control_vectors import ControlVectors, write_control_vectors
from mlx_lqr.lqr.strength import BUDGETS, Calibration
from mlx_lqr.methods.registry import METHODS

POSITIVE, NEGATIVE = [[1, 2, 3], [4, 5], [2, 9, 11]], [[6, 7], [8, 9, 10], [13, 12]]
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' or loop.first %}{{ bos_token }}{{ message['content'] }}"
    "{% else %}{{ raise_exception('no') if message.content is none else message.content | trim }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@dataclass(frozen=True)
class Specimen:
    """A file in a folder of its own kind, which stands whole in each worker."""

    kind: str
    folder: str
    file: str
    mutate: Mutator
    use: Callable[[Path, Path], object]
    """Called with the folder and the file; a use is cheap and ends in `InputError` where it refuses."""
    weight: int = 1
    """How often it has its turn."""


def made(place: Path, *, light: bool = False) -> list[Specimen]:
    """Write the sound files, and say what they are.

    Args:
        light: those alone that need neither torch nor a conversion.
    """
    mx.random.seed(0)
    model = _model(place / "llama", "llama")
    found = [*_steering(place / "steering", model), *_texts(place / "texts"), *_chat(place / "chat", model)]
    backends = BACKENDS[:1] if light else BACKENDS
    for family in ("llama",) if light else ("llama", "gemma3_text", "qwen3_moe"):
        if family != "llama" and family in FAMILY:
            _model(place / family, family)
        found += [one for backend in backends for one in _folder(family, backend)]
    found += [one for backend in backends for one in _adapters(place, backend)]
    if not light:
        from fuzz.heavy_specimens import made_heavy

        found += made_heavy(place)
    return found


def _steering(place: Path, model: Any) -> list[Specimen]:
    place.mkdir()
    fitted = mlx_lqr.fit(model, POSITIVE, NEGATIVE, concept="one", layers="all")
    other = mlx_lqr.fit(model, [[1, 30], [2, 31, 3]], [[40, 4], [41, 5]], concept="two", layers="all", cost="feature")
    strengths = {budget: 1.0 + number for number, budget in enumerate(BUDGETS)}
    calibration = Calibration(strengths, {budget: 0.1 * strength for budget, strength in strengths.items()})
    fitted.calibrated(calibration).save(place / "controller.safetensors")
    mlx_lqr.Controller.combine(fitted, other).save(place / "two.safetensors")
    mlx_lqr.linearize(model, POSITIVE, store=place / "jacobians.safetensors")
    for name in METHODS:
        if name != "alqr":
            mlx_lqr.fit_baseline(model, name, POSITIVE, NEGATIVE, concept="one").save(place / f"{name}.safetensors")
    vectors = {1: np.ones(model.hidden_size, np.float32), 2: np.full(model.hidden_size, -0.5, np.float32)}
    write_control_vectors(place / "vector.gguf", ControlVectors(vectors, "llama", 3, "one", "", model.fingerprint))
    made = [
        Specimen(
            "steering",
            place.name,
            file.name,
            mutate_gguf if file.suffix == ".gguf" else mutate_tensors,
            uses.steering,
        )
        for file in sorted(place.iterdir())
        if file.name != "jacobians.safetensors"
    ]
    return [*made, Specimen("jacobians", place.name, "jacobians.safetensors", mutate_tensors, uses.jacobians, 3)]


def _texts(place: Path) -> list[Specimen]:
    place.mkdir()
    (place / "prompts.txt").write_text("Once upon a time\nA man walks\n\n  The sea\n", "utf-8")
    (place / "concept.positive.txt").write_text("".join(f"The dog number {n} barks.\n" for n in range(9)), "utf-8")
    rows: dict[str, dict[str, str | list[str]]] = {
        "prompts": {"prompt": "Once upon a time"},
        "toxicity": {"prompt": "They said"},
        "truthfulness": {"question": "Is it?", "best": "Yes.", "correct": ["Yes.", "It is."], "incorrect": ["No."]},
        "refusal": {"prompt": "How do I", "type": "a", "label": "safe"},
        "chat": {"question": "What is", "answers": ["a", "b"]},
        "capability": {"prompt": "Two and two is", "answer": "four", "others": ["five", "six"]},
    }
    for name, row in rows.items():
        content = [row if name == "prompts" else {**row, "number": str(n)} for n in range(4)]
        (place / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in content), "utf-8")
    uses.begin_records(place / "records.jsonl")
    lines = [
        Specimen("rows", place.name, f"{name}.jsonl", mutate_lines, uses.rows_of(row))
        for name, row in rows.items()
        if name != "prompts"
    ]
    return [
        *lines,
        Specimen("prompts", place.name, "prompts.txt", mutate_text, uses.prompts, 2),
        Specimen("prompts", place.name, "concept.positive.txt", mutate_text, uses.prompts),
        Specimen("prompts", place.name, "prompts.jsonl", mutate_lines, uses.prompts, 3),
        Specimen("records", place.name, "records.jsonl", mutate_lines, uses.records, 4),
    ]


def _chat(place: Path, model: Any) -> list[Specimen]:
    place.mkdir()
    transcript = {
        "format": "mlx-lqr transcript 2",
        "model": "tiny",
        "strengths": {"one": 1.0},
        "messages": [
            {"role": "system", "content": "Be w1."},
            {"role": "user", "content": "w2 w3"},
            {
                "role": "assistant",
                "content": "w4",
                "strengths": {"one": 0.5},
                "changes": [{"token": 2, "strengths": {"one": 1.5}}],
            },
            {"role": "user", "content": "w5"},
            {"role": "assistant", "content": "w6 w7"},
        ],
    }
    (place / "transcript.json").write_text(json.dumps(transcript, indent=2), "utf-8")
    session = {
        **transcript,
        "options": {"temperature": 0.5, "max_tokens": 4, "seed": None, "stop": ["w9"], "overflow": "roll"},
        "steering": [{"concept": "one", "file": "one.safetensors", "strength": 1.0, "on": True}],
    }
    (place / "session.json").write_text(json.dumps(session, indent=2), "utf-8")
    return [
        Specimen("transcript", place.name, "transcript.json", mutate_object, uses.transcript, 4),
        Specimen("session", place.name, "session.json", mutate_object, uses.session, 2),
    ]


_OLDER = ("llama",)
"""Families whose folders are as older ones: no `added_tokens_decoder`, so that two more files count."""
_IN_SETTINGS = ("llama", "qwen3_moe")
"""Those with the chat template in tokenizer_config.json; the others have a file of its own, which would come first."""
_JSON_FILES = (
    ("config.json", 8),
    ("generation_config.json", 2),
    ("tokenizer_config.json", 6),
    ("tokenizer.json", 6),
    ("model.safetensors.index.json", 2),
)


def _folder(family: str, backend: str) -> list[Specimen]:
    """A model's files. What does not depend on the backend is tried on the first alone."""
    use = uses.model_on(backend)
    kind = f"model on {backend}"
    if backend != BACKENDS[0]:
        return [Specimen(kind, family, "config.json", mutate_object, use, 4)]
    names = [*_JSON_FILES]
    if family in _OLDER:
        names += [("special_tokens_map.json", 4), ("added_tokens.json", 2)]
    shared = [Specimen(kind, family, name, mutate_object, use, weight) for name, weight in names]
    if family not in _IN_SETTINGS:
        shared.append(Specimen(kind, family, "chat_template.jinja", mutate_text, use, 10))
    return [
        *shared,
        Specimen(kind, family, "model-00001-of-00002.safetensors", mutate_tensors, use, 3),
        Specimen("conversion of a folder", family, "config.json", mutate_object, uses.converted_folder, 3),
        Specimen("conversion of a folder", family, "tokenizer_config.json", mutate_object, uses.converted_folder, 1),
    ]


def _adapters(place: Path, backend: str) -> list[Specimen]:
    random = np.random.default_rng(0)
    a, b = (random.normal(size=shape).astype(np.float32) for shape in ((4, 32), (32, 4)))
    lora, peft = place / "lora", place / "peft"
    if not lora.is_dir():
        lora.mkdir()
        peft.mkdir()
        parameters = {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
        config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters, "model": "a/tiny"}
        (lora / "adapter_config.json").write_text(json.dumps(config))
        names = [f"model.layers.{k}.self_attn.q_proj" for k in (1, 2)]
        weights = {f"{name}.lora_a": a.T for name in names} | {f"{name}.lora_b": b.T for name in names}
        save_file({name: np.ascontiguousarray(part) for name, part in weights.items()}, lora / "adapters.safetensors")
        config = {
            "peft_type": "LORA",
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj"],
            "bias": "none",
            "base_model_name_or_path": "a/tiny",
            "rank_pattern": {},
            "alpha_pattern": {"q_proj": 3},
            "use_rslora": False,
            "layers_to_transform": None,
        }
        (peft / "adapter_config.json").write_text(json.dumps(config))
        names = [f"base_model.model.model.layers.{k}.self_attn.q_proj" for k in range(3)]
        weights = {f"{name}.lora_A.weight": a for name in names} | {f"{name}.lora_B.weight": b for name in names}
        save_file(weights, peft / "adapter_model.safetensors")
    use = uses.adapter_on(backend)
    return [
        Specimen("adapter", "lora", "adapter_config.json", mutate_object, use, 2),
        Specimen("adapter", "lora", "adapters.safetensors", mutate_tensors, use),
        Specimen("adapter", "peft", "adapter_config.json", mutate_object, use, 2),
        Specimen("adapter", "peft", "adapter_model.safetensors", mutate_tensors, use),
    ]


def _model(place: Path, family: str) -> Any:
    """A tiny model in shards, with every file that a folder may have beside its weights; returns it, loaded."""
    tiny_folder(family, vocab_size=320, seed=0).rename(place)
    weights, names = load_file(place / "model.safetensors"), []
    (place / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for number, half in enumerate((sorted(weights)[::2], sorted(weights)[1::2]), 1):
        names.append(f"model-0000{number}-of-00002.safetensors")
        save_file({name: weights[name] for name in half}, place / names[-1], {"format": "mlx"})
        weight_map |= dict.fromkeys(half, names[-1])
    index = {"metadata": {"total_size": sum(part.nbytes for part in weights.values())}, "weight_map": weight_map}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((place / "config.json").read_text())
    config |= {"bos_token_id": 1, "eos_token_id": [2], "torch_dtype": "float32", "hidden_act": "silu"}
    if family == "gemma3_text":
        config["hidden_activation"] = "gelu_pytorch_tanh"
        del config["hidden_act"]
    if family == "llama":
        config["rope_scaling"] = {"rope_type": "linear", "factor": 2.0}
    (place / "config.json").write_text(json.dumps(config))
    _tokenizer(byte_level=family != "gemma3_text").save(str(place / "tokenizer.json"))
    token = {"content": "<e>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    settings: dict[str, Any] = {
        "bos_token": "<s>",
        "eos_token": token,
        "pad_token": None,
        "clean_up_tokenization_spaces": True,
        "model_max_length": 1000,
        "chat_template": TEMPLATE if family in _OLDER else [{"name": "default", "template": TEMPLATE}],
        "tokenizer_class": "PreTrainedTokenizerFast",
        "extra_special_tokens": [],
    }
    if family not in _OLDER:
        settings["added_tokens_decoder"] = {"1": {**token, "content": "<s>", "special": True}}
        settings["additional_special_tokens"] = ["<x>"]
    (place / "tokenizer_config.json").write_text(json.dumps(settings))
    if family in _OLDER:
        (place / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": token}))
        (place / "added_tokens.json").write_text(json.dumps({"<x>": 310}))
    (place / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3], "temperature": 0.5}))
    if family not in _IN_SETTINGS:
        (place / "chat_template.jinja").write_text(TEMPLATE)
    return mlx_lqr.load(place, backend=BACKENDS[0], dtype="float32")  # type: ignore[arg-type]


def _tokenizer(*, byte_level: bool) -> Tokenizer:
    """Of one of the two kinds that most models have."""
    special = ["<unk>", "<s>", "<e>", "<x>"]
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    if byte_level:
        tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "ll", "hell", "hello", "Ġw"]
        merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w")]
        tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.normalizer = normalizers.NFC()
    else:
        tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters, "▁a", "▁the"]
        merges = [("▁", "a")]
        vocabulary = {token: i for i, token in enumerate(tokens)}
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B:1", special_tokens=[("<s>", 1)]
    )
    return tokenizer

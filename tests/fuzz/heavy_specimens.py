"""Specimens that need torch or a conversion: models that are measured, and GGUF files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from gguf.constants import GGMLQuantizationType as Kind
from helpers.backends import BACKENDS
from helpers.tiny_gguf import write
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from fuzz import uses
from fuzz.gguf_mutations import mutate_gguf
from fuzz.mutations import mutate_object
from fuzz.specimens import Specimen
from mlx_lqr.convert import convert

GGUFS = {"llama": Kind.Q8_0, "gemma3": Kind.F32, "qwen3moe": Kind.F32}


def made_heavy(place: Path) -> list[Specimen]:
    """Write them, and say what they are."""
    found = []
    (place / "gguf").mkdir()
    for name, kind in GGUFS.items():
        write(place / "gguf" / f"{name}.gguf", name, kind)
        found.append(Specimen("gguf", "gguf", f"{name}.gguf", mutate_gguf, uses.gguf, 4))
    _packed(place / "packed", place / "llama")
    for name, weight in (("config.json", 3), ("tokenizer.json", 2)):
        found.append(Specimen("packed model on mlx", "packed", name, mutate_object, uses.model_on("mlx"), weight))
    _measured(place / "starcoder2", place / "llama")
    for backend in BACKENDS:
        use = uses.model_on(backend)
        found.append(Specimen(f"measured model on {backend}", "starcoder2", "config.json", mutate_object, use, 3))
    return found


def _packed(place: Path, sound: Path) -> None:
    """Another folder's model in 4 bits, with a tokenizer of the third kind that models have."""
    convert(sound, place, quantize=4, group_size=32)
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("<e>", 0.0), ("<x>", 0.0), ("▁", -2.0), ("▁he", -3.0), ("llo", -3.5)]
    pieces += [(chr(code), -5.0 - 0.01 * code) for code in range(ord("a"), ord("z") + 1)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace("  ", " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<unk>", "<s>", "<e>", "<x>"])
    tokenizer.save(str(place / "tokenizer.json"))


def _measured(place: Path, sound: Path) -> None:
    """A model of no listed family as transformers saves it, with the tokenizer of another folder."""
    import torch
    from transformers import AutoModelForCausalLM, Starcoder2Config
    from transformers.utils import logging

    torch.manual_seed(0)
    logging.disable_progress_bar()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = Starcoder2Config(
        vocab_size=320, num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, **sizes
    )
    AutoModelForCausalLM.from_config(config).eval().save_pretrained(place)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(sound / name, place / name)
    (place / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))

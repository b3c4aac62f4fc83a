"""Files that are almost another's, by their format: bytes, texts, JSON lines, safetensors and GGUF."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from math import prod
from random import Random
from typing import Any

from fuzz.json_mutations import RAW, mutate_json

Mutation = tuple[bytes, str]
"""The content, and what was changed."""
COUNTS = (0, 1, 2, 3, 255, 256, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**60, 2**63, 2**64 - 1)
SIZES = {"BOOL": 1, "I8": 1, "U8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "F16": 2, "BF16": 2, "F32": 4, "I32": 4}
SIZES |= {"F64": 8, "I64": 8}
"""Bytes of a value, by safetensors' names of dtypes."""
_NASTY = (
    *("{{ 1/0 }}", "{{ 2**(2**40) }}", "{{ 'x' * 2**33 }}", "{{ range(10**9)|list }}", "{% for i in range(10**9) %}"),
    *("{{ ().__class__.__mro__ }}", "{{ messages[9].content }}", "{{ lipsum(n=10**7) }}", "{% endfor %}", "{%", "{{"),
    *("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ 'x'.encode('nope') }}", "{{ '\\ud800' }}", "{# "),
    *(
        "{{ strftime_now(3) }}",
        "{{ raise_exception(3) }}",
        "{{ " + "(" * 300 + "1" + ")" * 300 + " }}",
        "{{ 1 < 'a' }}",
    ),
    *("{{ messages|tojson(indent=10**9) }}", "{{ 'abc'|center(10**8) }}", "{{ '%999999999d'|format(1) }}", "\0", "\r"),
    *("{% set x = namespace(a=1) %}{% set x.__class__ = 3 %}", "{{ dict.fromkeys(range(10**8)) }}", "\u2028", "\ufeff"),
)


def mutate_bytes(content: bytes, random: Random) -> Mutation:
    """Cut short, flipped, inserted, doubled or overwritten."""
    start = random.randrange(len(content) + 1)
    length = random.choice((1, 1, 2, 4, 8, 64, 1000))
    kind = random.choice(("truncate", "flip", "insert", "delete", "double", "zero", "count", "prefix", "empty"))
    if kind == "truncate":
        return content[:start], f"truncate {start}"
    if kind == "flip" and content:
        changed = bytearray(content)
        for _ in range(random.choice((1, 1, 3, 20))):
            changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
        return bytes(changed), "flip"
    if kind == "insert":
        return content[:start] + random.randbytes(length) + content[start:], f"insert {start} {length}"
    if kind == "delete":
        return content[:start] + content[start + length :], f"delete {start} {length}"
    if kind == "double":
        return content[: start + length] + content[start:], f"double {start} {length}"
    if kind == "zero":
        return content[:start] + bytes(length) + content[start + length :], f"zero {start} {length}"
    if kind == "count":
        place = start if random.random() < 0.5 else min(start, random.randrange(64))
        return content[:place] + struct.pack("<Q", random.choice(COUNTS)) + content[place + 8 :], f"count at {place}"
    if kind == "prefix":
        before = random.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\n", b" " * 9, b"\x80\x04", b"PK\3\4", b"\0"))
        return before + content, f"prefix {before!r}"
    return b"", "empty"


def mutate_text(content: bytes, random: Random) -> Mutation:
    """A text with something nasty in it, another encoding, or lines that are long, many or doubled."""
    text = content.decode()
    start = random.randrange(len(text) + 1)
    kind = random.choices(("splice", "encode", "long", "many", "bytes"), (6, 1, 1, 1, 3))[0]
    if kind == "splice":
        part = random.choice(_NASTY + RAW)
        return (text[:start] + part + text[start:]).encode("utf-8", "surrogatepass"), f"splice {start} {part[:40]}"
    if kind == "encode":
        name = random.choice(("utf-16", "utf-32", "utf-16-le", "utf-8-sig", "utf-7"))
        return text.encode(name), name
    if kind == "long":
        return (text[:start] + "x y " * 20_000 + text[start:]).encode(), "long"
    if kind == "many":
        return (text + "\n" * random.choice((1, 100_000)) + text).encode(), "many"
    return mutate_bytes(content, random)


def mutate_object(content: bytes, random: Random) -> Mutation:
    """A JSON file."""
    if random.random() < 0.15:
        return mutate_bytes(content, random)
    text, what = mutate_json(content.decode(), random)
    return text.encode(), what


def mutate_lines(content: bytes, random: Random) -> Mutation:
    """JSON lines: a line as JSON, the order of lines, or the whole as text."""
    lines = content.decode().splitlines()
    number = random.randrange(len(lines))
    kind = random.choices(("json", "raw", "move", "text"), (6, 2, 2, 1))[0]
    if kind == "text":
        return mutate_text(content, random)
    if kind == "json":
        lines[number], what = mutate_json(lines[number], random)
    elif kind == "raw":
        lines[number] = what = random.choice(RAW)
    else:
        other = random.randrange(len(lines) + 1)
        lines.insert(other, lines[number] if random.random() < 0.5 else lines.pop(number))
        what = f"to {other}"
    return ("\n".join(lines) + "\n" * random.randrange(2)).encode(), f"line {number} {kind} {what}"[:200]


def mutate_tensors(content: bytes, random: Random) -> Mutation:
    """A safetensors file, whose bytes agree with its header again in most cases."""
    length = int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    entries: dict[str, str] = header.pop("__metadata__", {})
    start = 8 + length
    data = {name: content[slice(*(start + at for at in one["data_offsets"]))] for name, one in header.items()}
    name = random.choice(sorted(header))
    one = header[name]
    # most of what is read of our own files stands in their metadata; weights have next to none
    weight = 8 if len(entries) > 2 else 1
    kinds = ("metadata", "dtype", "shape", "size", "values", "names", "header", "bytes")
    kind = random.choices(kinds, (weight, 3, 2, 3, 3, 2, 2, 3))[0]
    if kind == "bytes":
        return mutate_bytes(content, random)
    if kind == "header":
        text, what = mutate_json(content[8:start].decode(), random)
        return len(text.encode()).to_bytes(8, "little") + text.encode() + content[start:], f"header {what}"
    if kind == "metadata":
        what = _change_entry(entries, random)
    elif kind == "dtype":
        one["dtype"] = what = random.choice(sorted(SIZES))
        data[name] = _resized(data[name], prod(one["shape"]) * SIZES[what])
    elif kind == "shape":
        what = str(random.choice(([], [0], one["shape"][::-1], [*one["shape"], 1], [prod(one["shape"])], [1])))
        one["shape"] = json.loads(what)
        data[name] = _resized(data[name], prod(one["shape"]) * SIZES[one["dtype"]])
    elif kind == "size":
        what = _change_size(header, entries, data, random)
    elif kind == "values":
        what = random.choice(("nan", "inf", "-inf", "3e38", "-1", "0", "1e-40", "random"))
        count = len(data[name]) // 4
        data[name] = random.randbytes(4 * count) if what == "random" else struct.pack("<f", float(what)) * count
        data[name] = _resized(data[name], prod(one["shape"]) * SIZES.get(one["dtype"], 4))
    else:
        other = random.choice((name[:-1], name + ".x", "", "jacobian.99", name.replace("0", "1"), "\ud800"))
        header[other], data[other] = header.pop(name), data.pop(name)
        what = f"as {other!r}"
    return _written(header, entries, data), f"{kind} {name} {what}"[:200]


def _change_entry(entries: dict[str, str], random: Random) -> str:
    name = random.choice(sorted(entries) or ["format"])
    if random.random() < 0.1:
        entries.pop(name, None)
        return f"without {name}"
    try:
        entries[name], _ = mutate_json(entries[name], random) if random.random() < 0.7 else (random.choice(RAW), "")
    except (KeyError, ValueError):  # a text and no JSON
        raw = random.choice(RAW)
        entries[name] = random.choice((raw, raw.strip('"'), entries.get(name, "") + "x", "\ud800", "\0", "4294967296"))
    return f"{name}={entries[name][:60]}"


def _change_size(header: dict[str, Any], entries: dict[str, str], data: dict[str, bytes], random: Random) -> str:
    """One size wherever it is: of no layers, no width, no concepts, or a few more."""
    sizes = sorted({size for one in header.values() for size in one["shape"]} or {1})
    old, new = random.choice(sizes), random.choice((0, 0, 1, 2, 3, 5))
    for name, one in header.items():
        one["shape"] = [new if size == old else size for size in one["shape"]]
        data[name] = _resized(data[name], prod(one["shape"]) * SIZES[one["dtype"]])
    for name, text in entries.items():
        if text == str(old):
            entries[name] = str(new)
    if "concepts" in entries and old == 1 and random.random() < 0.5:
        entries["concepts"] = json.dumps([f"c{i}" for i in range(new)])
        entries["prompt_counts"] = json.dumps([[1, 1]] * new)
    return f"{old} -> {new}"


def _resized(data: bytes, length: int) -> bytes:
    return (data + bytes(max(0, length - len(data))))[:length]


def _written(header: dict[str, Any], entries: dict[str, str], data: dict[str, bytes]) -> bytes:
    place, parts = 0, {"__metadata__": entries, **header}
    for name, one in header.items():
        one["data_offsets"] = [place, place := place + len(data[name])]
    text = json.dumps(parts).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text + b"".join(data[name] for name in header)


Mutator = Callable[[bytes, Random], Mutation]

"""GGUF files that are almost another's: metadata of other types and sizes, tensors elsewhere, damaged bytes."""

from __future__ import annotations

import struct
from random import Random

from fuzz.mutations import COUNTS, Mutation, mutate_bytes

_FIXED = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value, by the number of its type."""
_STRING, _ARRAY, _ALIGNMENT = 8, 9, 32
_Key = tuple[str, int, bytes]
"""Name, type, value"""


def mutate_gguf(content: bytes, random: Random) -> Mutation:
    """A file whose tensors stand where its header says again in most cases."""
    if random.random() < 0.25:
        return mutate_bytes(content, random)
    version, tensors, count = struct.unpack_from("<IQQ", content, 4)
    keys, place = _keys(content, 24, count)
    table, end = _table(content, place, tensors)
    data = content[-(-end // _ALIGNMENT) * _ALIGNMENT :]
    kind = random.choices(("value", "drop", "double", "entry", "counts"), (8, 2, 1, 4, 1))[0]
    if kind == "entry":
        number = random.randrange(len(table))
        table[number], what = _changed_entry(table[number], random)
    elif kind == "counts":
        place, number = random.choice(((0, 4), (1, tensors), (2, count)))[0], random.choice(COUNTS)
        version, tensors, count = (
            number % 2**32 if place == 0 else version,
            number if place == 1 else tensors,
            number if place == 2 else count,
        )
        what = f"{place} {number}"
    else:
        number = random.randrange(len(keys))
        name, type_, value = keys[number]
        what = name
        if kind == "drop":
            del keys[number]
        elif kind == "double":
            keys.append(keys[number])
        else:
            type_, value, what = _changed_value(type_, value, random)
            keys[number] = (name, type_, value)
            what = f"{name} {what}"
        count = len(keys)
    head = b"GGUF" + struct.pack("<IQQ", version, tensors, count)
    head += b"".join(_string(name.encode()) + struct.pack("<I", type_) + value for name, type_, value in keys)
    head += b"".join(table)
    return head.ljust(-(-len(head) // _ALIGNMENT) * _ALIGNMENT, b"\0") + data, f"{kind} {what}"[:200]


def _changed_value(type_: int, value: bytes, random: Random) -> tuple[int, bytes, str]:
    if type_ == _ARRAY and random.random() < 0.6:
        return _changed_array(value, random)
    if type_ in _FIXED and random.random() < 0.5:
        number = random.choice(COUNTS)
        return type_, struct.pack("<Q", number)[: _FIXED[type_]].ljust(_FIXED[type_], b"\0"), f"number {number}"
    other = random.choice((*_FIXED, _STRING, _ARRAY))
    if other == _STRING:
        text = random.choice(
            (b"", b"a", b"\xff\xfe", b"gpt2", b"llama", b"\0", b"x" * 100_000, b"../../x", b"{{ 1/0 }}")
        )
        return other, _string(text), f"text {text[:20]!r}"
    if other == _ARRAY:
        item = random.choice((*_FIXED, _STRING))
        length = random.choice((0, 1, 2, 300))
        items = _string(b"a") * length if item == _STRING else random.randbytes(_FIXED[item] * length)
        return other, struct.pack("<IQ", item, length) + items, f"array of {length} of type {item}"
    special = random.choice((struct.pack("<d", float("nan")), struct.pack("<d", float("inf")), random.randbytes(8)))
    if other == 6:
        special = struct.pack("<f", random.choice((float("nan"), float("inf"), -1.0, 0.0, 1e38)))
    return other, special[: _FIXED[other]], f"type {other}"


def _changed_array(value: bytes, random: Random) -> tuple[int, bytes, str]:
    """One with fewer items, or one of them another."""
    item, count = struct.unpack_from("<IQ", value)
    if item == _STRING:
        items, place = [], 12
        for _ in range(count):
            length = struct.unpack_from("<Q", value, place)[0]
            items.append(value[place : place + 8 + length])
            place += 8 + length
    else:
        items = [value[12 + i : 12 + i + _FIXED[item]] for i in range(0, count * _FIXED[item], _FIXED[item])]
    kind, number = random.choice(("cut", "item", "double", "claim")), random.randrange(max(1, count))
    claimed = None
    if kind == "cut":
        items = items[:number]
    elif kind == "double":
        items += items
    elif kind == "claim":
        claimed = random.choice(COUNTS)
    elif items:
        texts = (b"", b" ", b"a", b"\xff", b"a b c", b"<0x41>", b"x" * 10_000, "Ġ".encode())
        items[number] = _string(random.choice(texts)) if item == _STRING else random.randbytes(_FIXED[item])
    written = struct.pack("<IQ", item, len(items) if claimed is None else claimed) + b"".join(items)
    return _ARRAY, written, f"{kind} {number}"


def _changed_entry(entry: bytes, random: Random) -> tuple[bytes, str]:
    """A tensor of another name, shape, type or place."""
    length = struct.unpack_from("<Q", entry)[0]
    name, rest = entry[8 : 8 + length], entry[8 + length :]
    kind = random.choice(("name", "dimensions", "shape", "type", "offset"))
    if kind == "name":
        name = random.choice((b"", name[:-1], name + b"x", b"\xff", b"blk.99.attn_q.weight", name.replace(b"0", b"1")))
    elif kind == "dimensions":
        rest = struct.pack("<I", random.choice((0, 1, 3, 4, 5, 2**32 - 1))) + rest[4:]
    elif kind == "shape":
        rest = rest[:4] + struct.pack("<Q", random.choice(COUNTS)) + rest[12:]
    elif kind == "type":
        rest = rest[:-12] + struct.pack("<I", random.choice((*range(42), 2**32 - 1))) + rest[-8:]
    else:
        rest = rest[:-8] + struct.pack("<Q", random.choice(COUNTS))
    return _string(name) + rest, f"{kind} of {name[:60]!r}"


def _keys(content: bytes, place: int, count: int) -> tuple[list[_Key], int]:
    keys = []
    for _ in range(count):
        length = struct.unpack_from("<Q", content, place)[0]
        name, place = content[place + 8 : place + 8 + length].decode(), place + 8 + length
        type_ = struct.unpack_from("<I", content, place)[0]
        end = _end(content, place + 4, type_)
        keys.append((name, type_, content[place + 4 : end]))
        place = end
    return keys, place


def _end(content: bytes, place: int, type_: int) -> int:
    if type_ in _FIXED:
        return place + _FIXED[type_]
    if type_ == _STRING:
        return place + 8 + int(struct.unpack_from("<Q", content, place)[0])
    item, count = struct.unpack_from("<IQ", content, place)
    place += 12
    for _ in range(count):
        place = _end(content, place, item)
    return place


def _table(content: bytes, place: int, count: int) -> tuple[list[bytes], int]:
    """The entries of the tensors."""
    entries = []
    for _ in range(count):
        length = struct.unpack_from("<Q", content, place)[0]
        dimensions = struct.unpack_from("<I", content, place + 8 + length)[0]
        end = place + 8 + length + 4 + 8 * dimensions + 12
        entries.append(content[place:end])
        place = end
    return entries, place


def _string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text

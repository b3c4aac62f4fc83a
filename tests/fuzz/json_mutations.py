"""JSON texts that are almost another's: values of the wrong type or size, keys too few or twice, nested too deeply."""

from __future__ import annotations

import json
from random import Random
from typing import Any

DEEP = "[" * 4000 + "]" * 4000
DEEPER_OBJECTS = '{"a":' * 4000 + "1" + "}" * 4000
RAW = (
    *("null", "true", "false", "0", "-1", "1", "2", "3", "7", "0.5", "-0.0", "1e-320", "1e300", "1e400", "-1e400"),
    *("NaN", "Infinity", "-Infinity", "127", "256", "65536", "2147483647", "2147483648", "4294967296", "1e9"),
    *("9223372036854775808", "-9223372036854775809", "9" * 400, "1" + "0" * 5000),
    *('""', '" "', '"a"', '"0"', '"\\ud800"', '"\\udfff\\ud800"', '"\\u0000"', '"\\u001b[2J"', '"\\n"', '"../x"'),
    *('"/etc/passwd"', '"{{ 1/0 }}"', '"' + "x" * 100_000 + '"', '"\\u202e"', '"nan"', '"1e999"', '"cpu"', '"auto"'),
    *("[]", "[0]", "[-1]", "[null]", '["a"]', '[""]', "[[]]", "[[0, 0]]", "[0.5]", "[" + "0," * 50_000 + "0]"),
    *("{}", '{"a": 1}', '{"": null}', '{"content": 3}', '{"content": "\\ud800"}', '{"type": "Sequence"}'),
    *('{"rope_type": "yarn"}', '{"rope_type": "dynamic", "factor": 0}', '{"type": 3}', DEEP, DEEPER_OBJECTS),
)
"""Values as they are written, some of which no parser should take."""
_MARK = "\x01%d\x01"
_Path = list[Any]


def mutate_json(text: str, random: Random) -> tuple[str, str]:
    """A text with one to three changes, and what they are."""
    value = json.loads(text)
    raws: list[str] = []
    notes = [_change(value, random, raws) for _ in range(random.choice((1, 1, 1, 2, 3)))]
    if notes[-1] == "root":
        return random.choice(RAW), "root"
    written = json.dumps(value)
    for number, raw in enumerate(raws):
        written = written.replace(json.dumps(_MARK % number), raw)
    return written, "; ".join(notes)


def _change(value: Any, random: Random, raws: list[str]) -> str:
    holder, key, path = _chosen(value, random)
    if holder is None:
        return "root"
    place = "/".join(map(str, path))[:120]
    kind = random.choices(("set", "delete", "double", "rename", "swap", "count", "wrap"), (10, 3, 1, 2, 3, 5, 1))[0]
    if kind == "delete":
        del holder[key]
    elif kind == "double" and isinstance(holder, dict):
        raws.append(f"0, {json.dumps(key)}: {random.choice(RAW)}")
        holder[key] = _MARK % (len(raws) - 1)
    elif kind == "double":
        holder.extend(holder * random.choice((1, 10, 1000) if len(holder) < 1000 else (1,)))
    elif kind == "rename" and isinstance(holder, dict):
        holder[random.choice((key[:-1], key.upper(), "", key + "s", "__class__"))] = holder.pop(key)
    elif kind == "swap":
        other, name, _ = _chosen(value, random)
        if other is not None:
            holder[key] = json.loads(json.dumps(other[name]))
    elif kind == "count" and isinstance(holder[key], (int, float)):
        number = holder[key]
        holder[key] = random.choice((number + 1, number - 1, -number, 2 * number, number * 2**20, number + 0.5, 0))
    elif kind == "wrap":
        holder[key] = random.choice(([holder[key]], {"a": holder[key]}, [[holder[key]] * 3], str(holder[key])[:1000]))
    else:
        raws.append(random.choice(RAW))
        holder[key] = _MARK % (len(raws) - 1)
        return f"set {place} {raws[-1][:40]}"
    return f"{kind} {place}"


def _chosen(value: Any, random: Random) -> tuple[Any, Any, _Path]:
    """A place among the values, the nearer to the root the likelier: its holder, its key or index, and the path."""
    holder: Any = None
    key: Any = None
    path: _Path = []
    while isinstance(value, (dict, list)) and value and (holder is None or random.random() < 0.65):
        holder, key = value, random.choice(sorted(value) if isinstance(value, dict) else range(len(value)))
        value = holder[key]
        path.append(key)
    return holder, key, path

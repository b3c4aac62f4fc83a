"""Output as a page shows it, against what is printed."""

from __future__ import annotations

import re

NUMBER = r"-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?"
_APART = rf"(?<![\w.-]){NUMBER}(?![\w]|\.\d)"


def difference(shown: str, printed: str) -> str | None:
    """Why a text is not what is printed, or None where it is.

    "..." stands for anything. Decimals may differ by 5 % or by two of their last digit, and how wide gaps are does not
    matter.
    """
    pattern, numbers = "", []
    for part in re.split(rf"(\.\.\.|{_APART})", _squeezed(shown)):
        if part == "...":
            pattern += ".*?"
        elif re.fullmatch(NUMBER, part):
            pattern += f"({NUMBER})"
            numbers.append(part)
        else:
            pattern += re.escape(part)
    match = re.fullmatch(pattern, _squeezed(printed), re.DOTALL)
    if match is None:
        return f"shown:\n{shown}\nprinted:\n{printed}"
    for expected, number in zip(numbers, match.groups(), strict=True):
        if not _near(expected, number):
            return f"{expected} is shown where {number} is printed:\n{printed}"
    return None


def unlike(shown: str, printed: str) -> str | None:
    """Why a table of numbers that took long to measure is none that the command prints, or None where it is.

    Lines of words are printed, whatever numbers are among them. Rows have the columns of a printed row: numbers,
    intervals and words in the same order.
    """
    lines = printed.splitlines()
    rows = {_columns(line) for line in lines}
    words = [_without_numbers(line) for line in lines]
    for line in shown.strip().splitlines():
        if _columns(line).count("#") + _columns(line).count("# to #") > 3:
            if _columns(line) not in rows:
                return f"no row has the columns of: {line}\n{printed}"
            continue
        pattern = ".*".join(re.escape(part) for part in _without_numbers(line).split("..."))
        if not any(re.fullmatch(pattern, other) for other in words):
            return f"no line reads: {line}\n{printed}"
    return None


def _near(expected: str, printed: str) -> bool:
    wanted, got = (float(number.replace(",", "")) for number in (expected, printed))
    if "." not in expected and abs(wanted) < 100:
        return wanted == got
    digits = len(expected.partition(".")[2])
    return abs(wanted - got) <= max(0.05 * abs(wanted), 2 * 10.0**-digits)


def _squeezed(text: str) -> str:
    return "\n".join(" ".join(line.split()) for line in text.strip().splitlines() if line.strip())


def _without_numbers(line: str) -> str:
    return re.sub(_APART, "#", " ".join(line.split()))


def _columns(line: str) -> tuple[str, ...]:
    """What a row has, from left to right; neighbouring words are one, and a remark at its end is left out."""
    kinds: list[str] = []
    for part in re.finditer(rf"\({_APART} to {_APART}\)|\(?{_APART}\)?|\S+", line.strip()):
        kind = re.sub(_APART, "#", part[0]).strip("()") if "#" in re.sub(_APART, "#", part[0]) else "word"
        kind = "#" if part[0] in ("-", ">3", "inf", "nan", "none") else kind
        if kind != "word" or kinds[-1:] != ["word"]:
            kinds.append(kind)
    return tuple(kinds[:-1] if kinds[-1:] == ["word"] else kinds)

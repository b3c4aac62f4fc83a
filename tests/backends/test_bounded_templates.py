"""A chat template from a stranger ends, and takes little memory, whatever is in it."""

from __future__ import annotations

import json
import sys
import threading

import pytest

from mlx_lqr import InputError
from mlx_lqr.backends.text import bounded_template
from mlx_lqr.backends.text.chat_template import rendered

MESSAGES = [{"role": "user", "content": "Hello"}]
INDENTED = len(json.dumps(MESSAGES, indent=1))
GROWING = "{%% set ns = namespace(x=%s) %%}{%% for a in range(99) %%}%s{%% endfor %%}{{ ns.x }}"
AT_ONCE = [
    "{{ 2**(2**40) }}",
    "{{ 2.0**5000 }}",
    "{{ 'x' * 2**33 }}",
    "{{ 2**33 * 'x' }}",
    "{{ (1,) * 10**8 }}",
    "{{ ([1] * 10**6) * 10**6 }}",
    "{{ lipsum(n=10**7) }}",
    "{{ range(10**9)|list }}",
    "{{ 'x'.ljust(2**33) }}",
    "{{ 'x'.zfill(2**33) }}",
    "{{ 'x'|center(2**33) }}",
    "{{ 'a\nb'|indent(10**9) }}",
    "{{ '%99999999999d' % 1 }}",
    "{{ '%*d' % (10**10, 1) }}",
    "{{ '%99999999999d'|format(1) }}",
    "{{ '{:99999999999}'.format(1) }}",
    "{{ '{:{}}'.format(1, 10**10) }}",
    "{{ messages|tojson(indent=10**9) }}",
    "{{ 'x'|batch(10**9, 'y')|list }}",
    "{{ '%s%s%s' % (('x' * 10**7,) * 3) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
]
BY_DOUBLING = [
    GROWING % ("'xxxxxxxxxx'", "{% set ns.x = ns.x ~ ns.x %}"),
    GROWING % ("'xxxxxxxxxx'", "{% set ns.x = ns.x + ns.x %}"),
    GROWING % ("'xxxxxxxxxx'", "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"),
    GROWING % ("'xxxxxxxxxx'", "{% set ns.x = ns.x.replace('x', ns.x) %}"),
    GROWING % ("'xxxxxxxxxx'", "{% set ns.x = ns.x|replace('x', ns.x) %}"),
    GROWING % ("'xxxxxxxxxx'", "{% set ns.x = ns.x.join(ns.x) %}"),
    GROWING % ("[1]", "{% set ns.x = ns.x + ns.x %}"),
    GROWING % ("[1]", "{% set ns.x = [ns.x, ns.x] %}"),
    GROWING % ("7", "{% set ns.x = ns.x * ns.x %}"),
]
FOR_EVER = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% for i in range(9) %}{% if n %}{{ f(n - 1) }}{% endif %}{% endfor %}{% endmacro %}{{ f(99) }}",
    "{{ ([[1] * 10**6] * 10**5)|sum(start=[]) }}",
]


@pytest.mark.parametrize("template", AT_ONCE + BY_DOUBLING + FOR_EVER)
def test_a_bomb_is_one_line(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")  # which Windows has not
    monkeypatch.setattr(bounded_template, "SECONDS", 0.3)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match="chat template") as refusal:
        rendered(template, MESSAGES, {})
    assert "\n" not in str(refusal.value)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown / (1 << 20 if sys.platform == "darwin" else 1 << 10) < 500  # MiB


@pytest.mark.parametrize("template", FOR_EVER[:1])
def test_a_thread_is_stopped_too_and_no_other(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_template, "SECONDS", 0.3)
    refused: list[str] = []

    def work() -> None:
        try:
            rendered(template, MESSAGES, {})
        except InputError as error:
            refused.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    others = 0
    while thread.is_alive():
        others += rendered("{{ messages[0].content }}", MESSAGES, {}) == "Hello"
    assert "longer than 0.3 s" in refused[0]
    assert others


def test_whoever_watched_before_watches_again() -> None:
    def watch(*_: object) -> None:
        return None

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        rendered("x", MESSAGES, {})
        assert sys.gettrace() is watch
    finally:
        sys.settrace(before)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ 'a' ~ 1 ~ none ~ 'b' }}", "a1Noneb"),
        ("{{ 'a' ~ nothing ~ 'b' }}", "ab"),
        ("{{ 2**10 + 3 * 4 }} {{ 7 % 4 }} {{ '%05.1f|%s' % (2.25, 'x') }}", "1036 3 002.2|x"),
        ("{{ [1] + [2] }} {{ 'ab' * 3 }} {{ 3 * [0] }}", "[1, 2] ababab [0, 0, 0]"),
        ("{{ '{:>5}{}'.format('a', 'b') }} {{ '-'.join(['a', 'b']) }}", "    ab a-b"),
        (
            "{{ messages|tojson(indent=1)|length }} {{ 'x'|center(5) }}|",
            f"{len(json.dumps(MESSAGES, indent=1))}   x  |",
        ),
    ],
)
def test_what_templates_do_is_as_before(template: str, text: str) -> None:
    assert rendered(template, MESSAGES, {}) == text


def test_a_long_conversation_is_no_bomb() -> None:
    """A million characters, each message changed in several ways."""
    long = [{"role": "user", "content": "word " * 200} for _ in range(1000)]
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content | trim | replace('word', 'Word') + '\n' }}"
        "{{ m.content.split(' ')|join('-') ~ m|tojson }}{% endfor %}"
    )
    assert len(rendered(template, long, {})) > 3_000_000

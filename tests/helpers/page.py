"""A page of mixed text for the tokenizer tests."""

# ruff: noqa: RUF001 - other scripts, with all their look-alikes, are the point

PROSE = """Once upon a time, the year was 1984; they'd said it's "impossible" -- but we've done it (sure YOU'LL agree).

def fizz(n: int) -> str:
\tif n % 15 == 0:
\t\treturn "FizzBuzz"  # a comment   with   gaps
    for i in range(0x1F, 1_000_000, 3):
        print(f"{i:>08d}\\t{3.14159e-10}")\r\n
    return {'a': [1, 2, 3], "b": None}


中文字符和标点，测试。日本語のテキスト、カタカナ。한국어 문장입니다.
العربية تُكتب من اليمين إلى اليسار — हिन्दी में कुछ शब्द, ภาษาไทยไม่มีช่องว่าง
Ελληνικά, русский текст, עברית, ქართული, Tiếng Việt, naïve café über Straße
🙂 👨‍👩‍👧‍👦 👍🏽 🏳️‍🌈 🇩🇪 ❤️ \u00e9 \u200b\u200d\ufeff \u3000\u00a0 end
          ten spaces, trailing   
\t\t\ttabs\n\n\n\n\n<div class="x">&amp;</div> http://example.com/a?b=c&d=%20 @user #tag $5.00 100% ~/path\\to
"""

# digits beyond ASCII, where SmolLM2's pre-tokenizer parts a number from the space before it
NUMERALS = "١٢٣٤ and १२३ and ๑๒๓, ½ cup, m ² or Ⅷ"

CHAT = "<|im_start|>user\nHi there!<|im_end|>\n<|im_start|>assistant\n"
GEMMA_CHAT = "<start_of_turn>user\nHi there!<end_of_turn>\n<start_of_turn>model\n"

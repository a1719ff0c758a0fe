#!/usr/bin/env python3
"""Makes tokenizer_stories.json: what Hugging Face's Rust tokenizer says of weights/stories.

    pip install tokenizers && python3 tests/golden/make_tokenizer_golden.py

"encode": bytes (hex), their ids, and the text of these ids. Bytes that are not UTF-8 reach
the library as every Rust program reads them, with U+FFFD in their place.
"decode": ids, many of which break off characters, and their text with and without special
tokens. No character is younger than Unicode 9, so that any version of the library agrees.
"""

import json
import pathlib
import random

from tokenizers import Tokenizer

HERE = pathlib.Path(__file__).resolve().parent
TEXTS = [
    "", " ", "  ", "\n", "\n\n  \n", "a", " a", "a ", "Hello world", " Hello  world ",
    "   three", "Once upon a time, there was a little girl named Lily.",
    "It's we'll they've I'M DON'T 'S ''s", "''ll 'llama 're've 'd'm't", "x'", "'", "' s",
    "\t\ttabs \t mixed\t ", "line\r\nline\r\n\r\n", "trailing   ",
    "12345 1 23 4,567.89 x1y2", "3½ ² Ⅷ ٣٤", "_under_score_ - -- --- ...!?",
    "<|endoftext|>", "a<|endoftext|>b", " <|endoftext|> ", "<|endoftext|><|endoftext|>\n",
    "<|endoftext", "<|<|endoftext|>|>", "é e\u0301 e\u0301\u0323 e\u0323\u0301",
    "a\u0301\u0302\u0323b", "\u0301x", "Å \u212b A\u030a Ω \u2126",
    "\u1e9b\u0323 \u0344 \u0958 \ufb1d", "\uac00 \u1100\u1161 \u1100\u1161\u11a8 \uac01",
    "日本語のテキスト。 が か\u3099", "Привет, мир!", "שָׁלוֹם", "مرحبا بالعالم", "हिन्दी नमस्ते",
    "ไทย", "🙂👍🏽 👨‍👩‍👧 🇩🇪", "\u00a0nbsp\u00a0 \u2003em\u3000ideographic",
    "\u200bzero\u200dwidth\ufeff", "\u0085next\u2028line\u2029", "\x00\x01\x7f\u0080",
    "\U0010ffff\ufffe\ufffd", "ſ ı İ ß ǅ ﬁ", "“quotes” – dash — … it’s", "a" * 70,
    "ab" * 500, " " * 300, "\n" * 65, "the " * 40, "!" * 100,
]
RAW = [
    "80", "ff", "c3", "61c3", "c328", "c3a9", "c0af", "e28261", "e282", "e0809f",
    "eda080", "edbfbf", "f09f99", "f09f9982", "f0808080", "f4908080", "f5808080",
    "6180ffc3a9e2", "f09f99e29c93", "c3c3a9", "f0f0f0", "e2e28280", "fefe", "61f1808061",
    "3c7c656e646f66746578747c3eff3c7c656e646f66746578747c3e",
]


def main():
    stories = HERE.parent.parent / "weights/stories/tokenizer.json"
    tokenizer = Tokenizer.from_file(str(stories))
    chance = random.Random(1)
    alphabet = [t for t in TEXTS if 0 < len(t) < 14] + list(" \n'stredvl09é\u0301\u0323.,")
    texts = TEXTS[:]
    for _ in range(60):
        texts.append("".join(chance.choices(alphabet, k=chance.randrange(2, 12))))
    raw = [bytes.fromhex(h) for h in RAW]
    for _ in range(30):
        raw.append(bytes(chance.randrange(256) for _ in range(chance.randrange(1, 24))))
    encode = []
    for data in [t.encode() for t in texts] + raw:
        ids = tokenizer.encode(data.decode("utf-8", "replace"), add_special_tokens=False).ids
        text = tokenizer.decode(ids, skip_special_tokens=False)
        encode.append({"bytes": data.hex(), "ids": ids, "text": text})
    decode = []
    for _ in range(60):
        # Ids 1 to 256 are single bytes.
        pool = [chance.randrange(257), chance.randrange(4096), 0, chance.randrange(128, 257)]
        ids = chance.choices(pool + [chance.randrange(257)], k=chance.randrange(1, 16))
        text, plain = (tokenizer.decode(ids, skip_special_tokens=s) for s in (False, True))
        decode.append({"ids": ids, "text": text, "without_special": plain})
    with open(HERE / "tokenizer_stories.json", "w") as file:
        rows = lambda part: ",\n".join(json.dumps(r, separators=(",", ":")) for r in part)
        file.write('{"encode": [\n%s\n], "decode": [\n%s\n]}\n' % (rows(encode), rows(decode)))


if __name__ == "__main__":
    main()

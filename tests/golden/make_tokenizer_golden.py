#!/usr/bin/env python3
"""Makes tokenizer_stories.json and tokenizer_variants.json: what Hugging Face's Rust tokenizer
says of weights/stories, and of files that differ from it in how they split, change and decode.

    pip install tokenizers && python3 tests/golden/make_tokenizer_golden.py

"encode": bytes (hex), their ids, and the text of these ids. Bytes that are not UTF-8 reach
the library as every Rust program reads them, with U+FFFD in their place.
"decode": ids, many of which break off characters, and their text with and without special
tokens. A variant is a merge patch (RFC 7396) to weights/stories or to "fallback", a small BPE
with byte fallback. No character is younger than Unicode 9, so that any version of the library
agrees.
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


GPT4 = (  # Llama 3's; Qwen's takes one digit at a time
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+")
BEHAVIORS = ["Isolated", "Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous"]


def byte_level(prefix=False, regex=False):
    return {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True,
            "use_regex": regex}


def split(pattern, behavior="Isolated", invert=False, kind="Regex"):
    return {"type": "Split", "pattern": {kind: pattern}, "behavior": behavior, "invert": invert}


def replace(pattern, content, kind="String"):
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def metaspace(scheme, split=True):
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}


def sequence(members, *steps):
    return {"type": "Sequence", members: list(steps)}


def words(*steps):
    return {"pre_tokenizer": sequence("pretokenizers", *steps, byte_level())}


def template(*ids):
    single = [{"SpecialToken": {"id": str(i), "type_id": 0}} for i in ids]
    single.insert(1, {"Sequence": {"id": "A", "type_id": 0}})
    return {"type": "TemplateProcessing", "single": single, "pair": [],
            "special_tokens": {str(i): {"id": str(i), "ids": [i, 3], "tokens": ["x", "y"]}
                               for i in ids}}


def added(first_id, *tokens):
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return [{"id": first_id + i, "content": content, **{n: n in flags for n in names}}
            for i, (content, *flags) in enumerate(tokens)]


STEPS = [{"type": "ByteFallback"}, {"type": "Fuse"}]
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
LLAMA = {
    "normalizer": sequence("normalizers", {"type": "Prepend", "prepend": "▁"}, replace(" ", "▁")),
    "pre_tokenizer": None,
    "decoder": sequence("decoders", replace("▁", " "), *STEPS, STRIP),
    "post_processor": template(1),
}
VARIANTS = {
    "Llama 3": ("stories", {**words(split(GPT4)), "normalizer": None,
                            "model": {"ignore_merges": True}}),
    "Qwen": ("stories", words(split(GPT4.replace("{1,3}", "")))),
    "cl100k": ("stories", words(split(CL100K, "Removed", True))),
    "digits": ("stories", words({"type": "Digits", "individual_digits": True},
                                byte_level(False, True))),
    "runs of digits": ("stories", words({"type": "Digits", "individual_digits": False})),
    "DeepSeek": ("stories", words(split(r"[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"))),
    "words": ("stories", words(split(r"[\p{L}\p{N}]+|[^\p{L}\p{N}\s]+", "Removed", True))),
    "prefix": ("stories", {"pre_tokenizer": byte_level(True, True), "post_processor": template(0, 5)}),
    "no words": ("stories", {"pre_tokenizer": None, "decoder": None}),
    "replace": ("stories", {
        "normalizer": sequence("normalizers", replace(r"\s+", " ", "Regex"), replace("a", "")),
        "added_tokens": added(0, ["<|endoftext|>", "special"]) + added(
            4096, ["<e\u0301 a>", "normalized"])}),
    "added": ("stories", {"added_tokens": added(0, ["<|endoftext|>", "special"]) + added(
        4096, ["<l>", "lstrip"], ["<r>", "rstrip"], ["<b>", "lstrip", "rstrip"],
        ["éa", "single_word", "normalized"], ["<r", "rstrip"], ["   ", "normalized"],
        ["\n", "rstrip"])}),
    "Llama": ("fallback", LLAMA),
    "Codestral": ("fallback", {**LLAMA, "normalizer": None,
                               "pre_tokenizer": metaspace("first", False)}),
    "Metaspace": ("fallback", {**LLAMA, "normalizer": None, "pre_tokenizer": metaspace("always"),
                               "model": {"fuse_unk": False}}),
    "Gemma": ("fallback", {**LLAMA, "normalizer": replace(" ", "▁"),
                           "decoder": sequence("decoders", replace("▁", " "), *STEPS),
                           "post_processor": sequence("processors", byte_level(), template(2))}),
    "no bytes": ("fallback", {**LLAMA, "model": {"byte_fallback": False}}),
    "no unknown": ("fallback", {**LLAMA, "model": {"byte_fallback": False, "unk_token": None}}),
    "no decoder": ("fallback", {**LLAMA, "decoder": None}),
}
for behavior in BEHAVIORS:
    for invert in (False, True):
        VARIANTS[f"{behavior} {invert}"] = ("stories", words(
            split(r"\s|(?<=a)" if invert else r"[\p{L}']+", behavior, invert),
            split(" ", behavior, not invert, "String")))


def fallback():
    """A BPE with byte fallback that merges these words from left to right."""
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]
    tokens += sorted(set(" ▁abcdehilnoprstuwxOLTH'!.,09é日本🙂\n"))
    merges = []
    for word in ("▁the", "▁Once", "▁up", "▁on", "hello", "▁world", "three", "ing", "'s", "▁▁", "ll",
                 "00", "日本", "▁L", "▁time", "<s>"):
        for end in range(2, len(word) + 1):
            left, right = word[:end - 1], word[end - 1]
            if left in tokens and right in tokens:
                merges.append([left, right])
                tokens += [word[:end]] * (word[:end] not in tokens)
    model = {"type": "BPE", "dropout": None, "unk_token": "<unk>", "fuse_unk": True,
             "continuing_subword_prefix": None, "end_of_word_suffix": None,
             "byte_fallback": True, "ignore_merges": False,
             "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges}
    return {"version": "1.0", "truncation": None, "padding": None, "normalizer": None,
            "pre_tokenizer": None, "post_processor": None, "decoder": None, "model": model,
            "added_tokens": added(0, *([token, "special"] for token in tokens[:3]))}


def merged(file, patch):
    if not isinstance(patch, dict):
        return patch
    file = dict(file) if isinstance(file, dict) else {}
    for key, value in patch.items():
        file[key] = merged(file.get(key), value)
    return file


def make_variants(stories, texts):
    bases = {"stories": json.loads(stories.read_text()), "fallback": fallback()}
    out = {"fallback": bases["fallback"], "variants": []}
    for name, (base, patch) in VARIANTS.items():
        tokenizer = Tokenizer.from_str(json.dumps(merged(bases[base], patch)))
        chance = random.Random(name)
        rows, decoded = [], []
        for text in chance.sample(texts, 16):
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            prompt = tokenizer.encode(text).ids
            row = {"text": text, "ids": ids, "decoded": tokenizer.decode(ids, False)}
            rows.append({**row, "prompt": prompt} if prompt != ids else row)
        for _ in range(8):
            ids = [chance.choice([chance.randrange(300), chance.randrange(3, 259), 0, 196, 175])
                   for _ in range(chance.randrange(9))]
            decoded.append({"ids": ids, "text": tokenizer.decode(ids, False),
                            "without_special": tokenizer.decode(ids, True)})
        out["variants"].append({"name": name, "base": base, "patch": patch, "encode": rows,
                                "decode": decoded})
    with open(HERE / "tokenizer_variants.json", "w") as file:
        variants = ",\n".join(json.dumps(v, separators=(",", ":")) for v in out["variants"])
        file.write('{"fallback": %s,\n"variants": [\n%s\n]}\n' % (
            json.dumps(out["fallback"], separators=(",", ":")), variants))


def main():
    stories = HERE.parent.parent / "weights/stories/tokenizer.json"
    tokenizer = Tokenizer.from_file(str(stories))
    chance = random.Random(1)
    alphabet = [t for t in TEXTS if 0 < len(t) < 14] + list(" \n'stredvl09é\u0301\u0323.,")
    texts = TEXTS[:]
    for _ in range(60):
        texts.append("".join(chance.choices(alphabet, k=chance.randrange(2, 12))))
    marked = [t + m for t in TEXTS[:30] for m in ("<l> ", " <r>\n", " <b> éa", "<s>", "▁", "<0x0A>")]
    make_variants(stories, [t for t in texts + marked if len(t) < 50])
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

#!/usr/bin/env python3
"""Claims about the program as a user meets it: what it prints, where, and with which exit status.

Usage: test_command_line.py PROGRAM      (standard library only; run from the repository's root)
"""
import array
import json
import math
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib

PROGRAM = os.path.abspath(sys.argv[1])
STORIES = "weights/stories"
passed = failed = 0


def run(*arguments, stdin=""):
    r = subprocess.run([PROGRAM, *map(str, arguments)], input=stdin.encode(), capture_output=True)
    return r.returncode, r.stdout.decode(), r.stderr.decode()


def claim(name, ok, detail=""):
    global passed, failed
    passed, failed = passed + bool(ok), failed + (not ok)
    if not ok:
        print(f"FAILED: {name}\n  {str(detail)[:600]}")


def refuses(name, status, fragment, *arguments, stdin=""):
    """One line on stderr that holds the fragment, nothing on stdout, and this exit status."""
    code, out, err = run(*arguments, stdin=stdin)
    claim(f"refuses: {name}", code == status and fragment in err and err.count("\n") == 1 and not out,
          f"expected exit {status} and {fragment!r}; found exit {code}, {err!r}, stdout {out[:80]!r}")


def read_safetensors(path):
    with open(path, "rb") as f:
        (n,) = struct.unpack("<Q", f.read(8))
        header, data = json.loads(f.read(n)), f.read()
    return header, data


def read_numbers(path):
    """The tensors of a safetensors file of F32 and F64: name -> (shape, numbers)."""
    header, data = read_safetensors(path)
    header.pop("__metadata__", None)
    kinds = {"F32": "f", "F64": "d"}
    return {name: (t["shape"], array.array(kinds[t["dtype"]], data[slice(*t["data_offsets"])]))
            for name, t in header.items()}


def read_png(path):
    """Width, height and pixel(x, y) of a PNG of 8-bit RGB."""
    data, at, idat = open(path, "rb").read(), 8, b""
    while at < len(data):
        n, kind = struct.unpack(">I4s", data[at:at + 8])
        if kind == b"IHDR":
            width, height, *kinds = struct.unpack(">IIBBBBB", data[at + 8:at + 21])
        if kind == b"IDAT":
            idat += data[at + 8:at + 8 + n]
        at += 12 + n
    raw, stride, above = zlib.decompress(idat), 3 * width, bytes(3 * width)
    rows = []
    for y in range(height):
        filter, line = raw[y * (stride + 1)], bytearray(raw[y * (stride + 1) + 1:(y + 1) * (stride + 1)])
        for i in range(stride):
            a, b, c = (line[i - 3], above[i], above[i - 3]) if i >= 3 else (0, above[i], 0)
            paeth = min((abs(b - c), 0, a), (abs(a - c), 1, b), (abs(a + b - 2 * c), 2, c))[2]
            line[i] = (line[i] + (0, a, b, (a + b) // 2, paeth)[filter]) % 256
        rows.append(above := bytes(line))
    assert kinds[:2] == [8, 2] and data[:8] == b"\x89PNG\r\n\x1a\n"
    return width, height, lambda x, y: tuple(rows[y][3 * x:3 * x + 3])


GREEDY = ("-n", 30, "--temperature", 0)
with tempfile.TemporaryDirectory() as folder:
    at = lambda name: os.path.join(folder, name)

    # --- text in, text out ---
    code, out, err = run("Once upon a time", *GREEDY)
    claim("a bare prompt tells a story", code == 0 and out.startswith("Once upon a time, there was a little girl"), out)
    claim("a story ends in one newline", out.endswith("\n") and not out.endswith("\n\n"), repr(out))
    claim("statistics go to stderr", "tokens out" in err, err)
    claim("generate is the default", run("generate", "Once upon a time", *GREEDY)[1] == out)
    claim("--prompt is the same", run("generate", "--prompt", "Once upon a time", *GREEDY)[1] == out)
    claim("--prompt - reads standard input", run("generate", "--prompt", "-", *GREEDY, stdin="Once upon a time")[1] == out)
    claim("a bare - reads standard input", run("-", *GREEDY, stdin="Once upon a time")[1] == out)
    claim("top-k 1 is greedy", run("Once upon a time", "-n", 30, "--top-k", 1)[1] == out)
    sampled = run("Once upon a time", "-n", 30, "--seed", 7)[1]
    claim("the same seed gives the same text", run("Once upon a time", "-n", 30, "--seed", 7)[1] == sampled)
    claim("another seed gives another", run("Once upon a time", "-n", 30, "--seed", 8)[1] != sampled)
    code, out0, _ = run("Hello", "-n", 0)
    claim("-n 0 prints the prompt", code == 0 and out0 == "Hello\n", repr(out0))
    code, none, _ = run("", "-n", 20, "--temperature", 0)
    claim("an empty prompt begins a text", code == 0 and len(none) > 10, repr(none))

    # --- several at once ---
    with open(at("prompts"), "w") as f:
        f.write("Once upon a time\nThe little dog was sad because\nLily\n")
    code, several, _ = run("generate", "--prompt-file", at("prompts"), *GREEDY)
    alone = "".join(run(p, *GREEDY)[1] for p in ("Once upon a time", "The little dog was sad because", "Lily"))
    claim("several prompts are each as if alone", code == 0 and several == alone, several)
    prompts = ["Once upon a time", "Lily said:\n\n", "Caf\u00e9"]
    code, texts, _ = run("generate", "--json", "--prompt-file", "-", *GREEDY, stdin="".join(json.dumps(p) + "\n" for p in prompts))
    claim("with --json prompts may hold any characters, and continuations come alone", code == 0 and
          [p + json.loads(t) + "\n" for p, t in zip(prompts, texts.splitlines())] == [run("-", *GREEDY, stdin=p + "\n")[1]
                                                                                    for p in prompts], texts)
    code, batch, _ = run("Lily", "-n", 12, "--batch", 3, "--ids")
    lines = batch.splitlines()
    claim("--batch continues a prompt in several ways", len(lines) == 3 and len(set(lines)) == 3, batch)
    claim("--ids prints ids alone", all(w.isdigit() for w in batch.split()), batch)

    # --- state ---
    whole = run("Once upon a time", "-n", 40, "--seed", 3)[1]
    code, first, _ = run("Once upon a time", "-n", 17, "--seed", 3, "--save-state", at("state"))
    code2, second, _ = run("generate", "-n", 23, "--seed", 3, "--load-state", at("state"))
    claim("a saved state goes on as if it had never stopped",
          code == code2 == 0 and first[:-1] + second == whole, (first, second, whole))
    run("Once upon a time", "-n", 0, "--save-state", at("state"))
    run("generate", ", there was a cat.", "-n", 0, "--load-state", at("state"), "--save-state", at("state"))
    code, rest, _ = run("generate", *GREEDY, "--load-state", at("state"))
    want = run("Once upon a time, there was a cat.", *GREEDY)[1]
    claim("text can be added to a saved state", "Once upon a time, there was a cat." + rest == want, (rest, want))

    # --- tokenizer, logits, perplexity, info, convert ---
    text = "Lily's café\n\n  two  spaces\n"
    code, ids, _ = run("tokenize", stdin=text)
    claim("tokenize takes line by line", code == 0 and len(ids.splitlines()) == 3 and ids.splitlines()[1] == "", ids)
    claim("tokenize --decode gives the text back", run("tokenize", "--decode", stdin=ids)[1] == text, ids)
    for mode in ("parallel", "recurrent", "chunked=2"):
        code, _, err = run("logits", "--ids", "5 17 3", "--mode", mode, "--out", at("l"))
        header, data = read_safetensors(at("l"))
        claim(f"logits --mode {mode}", code == 0 and header["ids"]["shape"] == [3] and header["ids"]["dtype"] == "I32"
              and header["logits"]["shape"] == [3, 4096] and header["logits"]["dtype"] == "F32", err)
    with open(at("ids"), "w") as f:
        f.write(" ".join(str(i % 90) for i in range(100)))
    code, table, _ = run("perplexity", "--ids-file", at("ids"))
    claim("perplexity scores ids 2 to n", code == 0 and table.splitlines()[1].split()[:2] == ["100", "99"], table)
    code, table, _ = run("perplexity", "--ids-file", at("ids"), "--lengths", "10,100", "--csv", at("csv"))
    claim("perplexity by length", code == 0 and [r.split()[1] for r in table.splitlines()[1:]] == ["90", "99"], table)
    claim("perplexity writes csv", open(at("csv")).read().startswith("length,tokens,nll,perplexity,delta_ratio\n10,90,"))
    whole = run("perplexity", "--ids-file", at("ids"))[1]
    claim("a length of the whole text is the whole text", run("perplexity", "--ids-file", at("ids"), "--lengths", 100)[1] == whole, whole)
    text = open(STORIES + "/README.md").read()
    for name, part in (("one", text[:1500]), ("two", text[500:2500]), ("short", text[:40])):
        with open(at(name), "w") as f:
            f.write(part)
    code, table, err = run("perplexity", "--text", at("one"), at("two"), at("short"), "--lengths", "64,128", "--truncate", "--delta-ratio", "1,0.5")
    rows = [r.split() for r in table.splitlines()[1:]]
    claim("perplexity --truncate scores one window of each long document, for every ratio", code == 0
          and [r[:2] + r[4:] for r in rows] == [["64", "126", "1"], ["128", "254", "1"], ["64", "126", "0.5"], ["128", "254", "0.5"]], table)
    claim("a document that is too short is left out aloud", "short" in err and "left out" in err and err.count("\n") == 1, err)
    alone = [float(run("perplexity", "--text", at(n), "--lengths", 64, "--truncate")[1].split()[-3]) for n in ("one", "two")]
    claim("documents are scored each from a fresh state", abs(float(rows[0][2]) - sum(alone) / 2) < 2e-4, (rows, alone))

    # --- gradients ---
    for version in (1, 2) if os.path.basename(PROGRAM) == "mamba" else ():  # mamba_cuda: test_programs.py
        grads = {}
        for layout, *flags in (("hf",), ("original",), ("hf", "--double")):
            model = f"tests/golden/mamba{version}-{layout}"
            code, _, err = run("gradients", "--model", model, "--ids", "5 17 3 9 9 1 30", "--out", at("g"), *flags)
            claim(f"gradients of {model} {flags}", code == 0, err)
            grads[(layout, *flags)] = read_numbers(at("g"))
        truth = grads["hf", "--double"]
        stored = read_safetensors(f"tests/golden/mamba{version}-hf/model.safetensors")[0]
        claim("gradients have the names and shapes of the file", {name: shape for name, (shape, _) in truth.items()} == {
            "loss": [], **{n: t["shape"] for n, t in stored.items() if n not in ("__metadata__", "lm_head.weight")}})
        for layout in ("hf", "original"):
            named = {n.replace("embedding.", "embeddings."): g for n, (_, g) in grads[layout,].items()}
            worst = {n: max(abs(a - b) for a, b in zip(named[n], want)) / max(map(abs, want))
                     for n, (_, want) in truth.items()}
            claim(f"float32 gradients of mamba{version}-{layout} are within 1e-5 of the largest", max(worst.values()) < 1e-5, worst)
        scored = run("perplexity", "--model", f"tests/golden/mamba{version}-hf", "--ids-file", "-", stdin="5 17 3 9 9 1 30")
        claim("the loss is the mean NLL", f"{truth['loss'][1][0]:.4f}" in scored[1], (truth["loss"], scored))

    # --- score ---
    def by_hand(context, continuation):
        """log p(continuation | context) and greediness from `logits`, texts encoded together."""
        ids = run("tokenize", stdin=context + continuation + "\n")[1].split()
        n = len(run("tokenize", stdin=context + "\n")[1].split())
        run("logits", "--ids", " ".join(ids), "--out", at("l"))
        logits, total, greedy = read_safetensors(at("l"))[1][4 * len(ids):], 0, True
        for t in range(n, len(ids)):
            row = struct.unpack("<4096f", logits[(t - 1) * 16384:t * 16384])
            total += row[int(ids[t])] - max(row) - math.log(sum(math.exp(v - max(row)) for v in row))
            greedy = greedy and row[int(ids[t])] == max(row)
        return total, len(ids) - n, greedy
    pairs = [("Tom and Lily went to the park to play with the big red", " ball"), ("Once upon a time", ", there was a little girl"),
             ("Lily had a", " caf\u00e9")]
    with open(at("requests"), "w") as f:
        f.write("\n".join(json.dumps({"context": c, "continuation": t}) for c, t in pairs) + "\n\n")
    code, table, err = run("score", "--requests", at("requests"), "--out", at("scores"))
    answers = [json.loads(line) for line in open(at("scores"))]
    want = [by_hand(*pair) for pair in pairs]
    claim("score gives log-probability, tokens and greediness, a line each", code == 0 and len(answers) == 3 and all(
        abs(a["logprob"] - w[0]) < 1e-3 and a["tokens"] == w[1] and a["greedy"] is w[2] for a, w in zip(answers, want)), (answers, want, err))
    found = json.loads(table)
    claim("the summary has greedy accuracy and perplexity", list(found) == ["requests", "greedy", "perplexity"] and found["greedy"] == sum(w[2] for w in want) / 3
          and abs(math.log(found["perplexity"]) + sum(w[0] for w in want) / 3) < 1e-3, table)
    code, lines, err = run("score", "--requests", "-", stdin=open(at("requests")).read())
    claim("without --out the answers are on standard output alone", [json.loads(l) for l in lines.splitlines()] == answers and "perplexity" in err, (lines, err))
    score = lambda *requests: [json.loads(l) for l in run("score", "--requests", "-", stdin="".join(json.dumps(r) + "\n" for r in requests))[1].splitlines()]
    one, *same = score({"context": "Lily had a", "continuation": " ball"}, {"prompt": "Lily had a", "answer": " ball"}, {"context": "Lily had a ", "continuation": "ball"},
                       {"context": [int(i) for i in run("tokenize", stdin="Lily had a")[1].split()], "continuation": [int(i) for i in run("tokenize", stdin=" ball")[1].split()]})
    claim("prompt and answer, spaces at the context's end, and ids are the same request", same == [one] * 3, (one, same))
    empty, end, ended = score({"context": "", "continuation": "Lily"}, {"context": "<|endoftext|>", "continuation": "Lily"}, {"context": "", "continuation": "<|endoftext|>Lily"})
    claim("an empty context is the end token", empty == end == ended, (empty, end, ended))
    # one question's choices: 0 is likelier, 1 per character
    long = ", there was a little girl named Lily"
    (a, _, _), (b, _, _) = by_hand("Once upon a time", "!"), by_hand("Once upon a time", long)
    choices = [{"context": "Once upon a time", "continuation": c, "doc": d, "label": l} for d, l in ((7, 0), ("x", 1)) for c in ("!", long)]
    answers = lambda lines: [json.loads(run("score", "--requests", "-", stdin="\n".join(map(json.dumps, lines)))[2])[k] for k in ("questions", "acc", "acc_norm", "acc_bytes")]
    claim("choices of a question are counted, both labels once", answers(choices) == [2, 0.5, 0.5, 0.5], answers(choices))
    want = [1, float(a < b), *[float(a < b / len(long))] * 2]
    claim("acc and acc_norm choose each in its way", answers(choices[2:]) == want, (a, b, answers(choices[2:])))

    # --- hybrids ---
    hybrid = "tests/golden/mamba2attn-original"
    code, table, err = run("info", "--model", hybrid)
    claim("info of a hybrid", code == 0 and "1 layers: 6 heads of 16, 2 of keys and values" in table and "bytes a sequence and 256 for every token" in table, table)
    refuses("a hybrid in the Hugging Face layout", 1, "has no attention layers", "convert", "--model", hybrid, "--out", at("hybrid"))
    refuses("a look into attention", 1, "found one with attention: 1", "inspect", "--model", hybrid, "--prompt", "x", "--layer", 1, "--out", at("hybrid"))

    # --- inspect ---
    for model, heads in ((STORIES, 1), ("tests/golden/mamba2-hf", 8)):
        shutil.copytree(model, at("model"))
        shutil.copy(STORIES + "/tokenizer.json", at("model"))
        code, _, err = run("inspect", "--model", at("model"), "--prompt", "x!z", "--layer", 1, "--out", at("seen"))
        claim(f"inspect {model} writes numbers and heat maps", code == 0 and set(os.listdir(at("seen"))) ==
              {n + ".safetensors" for n in ("attention", "delta", "memory", "state_norm")} | {n + ".png" for n in ("attention", "delta", "memory")}, err)
        header, data = read_safetensors(at("seen/attention.safetensors"))
        numbers = lambda n: struct.unpack(f"<{(header[n]['data_offsets'][1] - header[n]['data_offsets'][0]) // 4}f", data[slice(*header[n]["data_offsets"])])
        M, x, y, mean = numbers("M"), numbers("x"), numbers("y"), numbers("attention")
        (channels, L, _), width = header["M"]["shape"], header["x"]["shape"][1]
        worst = max(abs(sum(M[(c // heads * L + t) * L + s] * x[s * width + c] for s in range(L)) - y[t * width + c])
                    for c in range(width) for t in range(L))
        claim(f"inspect {model}: y = M x", L == len(run("tokenize", stdin="x!z\n")[1].split()) and width == channels * heads
              and worst < 1e-5 * max(map(abs, y)), (worst, header))
        claim("inspect: attention is the mean of |M|", abs(mean[L] - sum(abs(M[c * L * L + L]) for c in range(channels)) / channels) < 1e-6)
        header, data = read_safetensors(at("seen/delta.safetensors"))
        rows, columns = header["delta"]["shape"]
        delta = struct.unpack(f"<{rows * columns}f", data[slice(*header["delta"]["data_offsets"])])
        width, height, pixel = read_png(at("seen/delta.png"))
        cell = width // rows
        shades = [[pixel(cell * t + cell // 2, cell * c + cell // 2) for c in range(columns)] for t in range(rows)]
        flat = [shade for row in shades for shade in row]
        relative = [delta[t * columns + c] * rows / sum(delta[c::columns]) for t in range(rows) for c in range(columns)]
        claim(f"inspect {model}: the map of delta shows it beside each channel's mean", (width, height) == (cell * rows, cell * columns)
              and all((g >= 145 - 2) if r > 1 else (g <= 145 + 2) for r, (_, g, _) in zip(relative, flat))
              and all(x[1] <= y[1] for (_, x), (_, y) in zip(*(lambda s: (s, s[1:]))(sorted(zip(relative, flat))))), (width, height))
        width, height, pixel = read_png(at("seen/attention.png"))
        cell = width // L
        shades = {(t, s): pixel(cell * s + cell // 2, cell * t + cell // 2) for t in range(L) for s in range(L)}
        largest = max(((t, s) for t in range(L) for s in range(t)), key=lambda at: mean[at[0] * L + at[1]])
        claim(f"inspect {model}: the map of the attention leaves the diagonal out, and goes up to the largest weight besides",
              all(shades[t, t] == (170, 170, 170) for t in range(L)) and shades[largest] == (253, 231, 37) and shades[0, L - 1] == (68, 1, 84), shades)
        shutil.rmtree(at("model"))
        shutil.rmtree(at("seen"))

    code, info, _ = run("info")
    claim("info counts the parameters", code == 0 and "4552960" in info and "BF16" in info, info)
    code, _, err = run("convert", "--out", at("copy"))
    claim("convert writes a model that runs", code == 0 and run("Lily", *GREEDY, "--model", at("copy"))[1] == run("Lily", *GREEDY)[1], err)
    refuses("to convert a model onto itself", 1, "another file than the model's own", "convert", "--model", at("copy"), "--out", at("copy"))
    code, _, err = run("convert", "--model", "tests/golden/mamba1-original", "--out", at("hf"))
    same = lambda model: run("logits", "--model", model, "--ids", "1 2 3", "--out", at("l")) and read_safetensors(at("l"))[1]
    claim("convert keeps the logits of an original checkpoint", code == 0 and same(at("hf")) == same("tests/golden/mamba1-original"), err)

    shutil.copy(STORIES + "/tokenizer.json", at("hf"))

    # --- people's own checkpoints: end tokens, vocabulary, tokenizers, prompts ---
    def variant(name, config={}, **files):
        """A copy of the shipped model with some of its config changed, and small files beside it."""
        shutil.copytree(STORIES, at(name))
        whole = json.load(open(at(name + "/config.json")))
        whole.update(config)
        for file, content in {"config": whole, **files}.items():
            with open(at(f"{name}/{file}.json"), "w") as f:
                json.dump(content, f)
        return at(name)
    greedy = lambda model, *more: run("Once upon a time", "--model", model, "-n", 40, "--temperature", 0, "--ids", *more)[1].split()
    tale = greedy(STORIES)
    ends = lambda model: next(line[13:] for line in run("info", "--model", model)[1].splitlines() if line.startswith("end tokens"))
    stop = tale[12]  # ends the first sentence; not among the tokens before it
    cut = tale[:tale.index(stop, 5) + 1]
    claim("the test's own story goes on after its first sentence", 10 < len(cut) < 20 and len(tale) == 44, tale)
    dot = run("tokenize", "--decode", stdin=stop + "\n")[1][:-1]
    for name, source, model in (
            ("a list in config.json", "config.json", variant("ends1", {"eos_token_id": [0, int(stop)]})),
            ("generation_config.json", "generation_config.json", variant("ends2", generation_config={"eos_token_id": int(stop)})),
            ("a list in generation_config.json", "generation_config.json", variant("ends3", generation_config={"eos_token_id": [4095, int(stop)]})),
            ("a name in tokenizer_config.json", "tokenizer_config.json", variant("ends4", tokenizer_config={"eos_token": dot})),
            ("a described name in tokenizer_config.json", "tokenizer_config.json", variant("ends5", tokenizer_config={"eos_token": {"content": dot, "lstrip": False}}))):
        claim(f"end tokens: {name}", greedy(model) == cut, (greedy(model), cut))
        claim(f"info: where an end token comes from: {name}", f"{stop} ({source})" in ends(model) and "0 (config.json)" in ends(model), ends(model))
        claim(f"--ignore-eos ignores {name}", greedy(model, "--ignore-eos") == tale)
    text = run("Once upon a time", "--model", at("ends1"), "-n", 40, "--temperature", 0)[1]
    claim("an end token is not printed", text == run("tokenize", "--decode", stdin=" ".join(cut[:-1]))[1], text)
    claim("null is no end token", ends(variant("ends6", {"eos_token_id": None})) == "none" and greedy(at("ends6")) == tale, ends(at("ends6")))
    claim("an end token named twice is one", ends(variant("ends7", generation_config={"eos_token_id": [0]})) == "0 (config.json, generation_config.json)", ends(at("ends7")))
    small = {"generation_config": {"eos_token_id": [0, 5]}, "tokenizer_config": {"eos_token": dot, "chat_template": "{{ messages }}"}, "special_tokens_map": {"eos_token": dot}}
    variant("full", {"eos_token_id": [0, 7], "pad_token_id": 3, "bos_token_id": 2}, **small)
    with open(at("full/chat_template.jinja"), "w") as f:
        f.write("{% for m in messages %}{{ m }}{% endfor %}\n")
    run("convert", "--model", at("full"), "--out", at("full2"))
    old, new = (json.load(open(at(f"{d}/config.json"))) for d in ("full", "full2"))
    claim("convert writes the token ids of config.json as they were", all(old[k] == new[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")), new)
    claim("convert copies the small files unchanged", all(open(at("full/" + n), "rb").read() == open(at("full2/" + n), "rb").read() for n in
          ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "tokenizer.json")), os.listdir(at("full2")))

    # the first 4,000 rows by config.json, the others by the tokenizer that has them
    last = run("tokenize", "--decode", stdin="4095\n")[1][:-1]
    variant("narrow", {"vocab_size": 4000})
    claim("a token of the tokenizer that has a row exists", run(last, "--model", at("narrow"), "-n", 0, "--ids")[1] == "4095\n" and greedy(at("narrow")) == tale, last)
    shutil.copytree(at("narrow"), at("bare"))
    os.remove(at("bare/tokenizer.json"))
    refuses("a row that no tokenizer names", 1, "below 4000, found 4095", "logits", "--model", at("bare"), "--ids", 4095, "--out", at("x"))
    run("convert", "--model", at("narrow"), "--out", at("wide"))
    claim("convert keeps such rows", json.load(open(at("wide/config.json")))["vocab_size"] == 4096 and greedy(at("wide")) == tale)
    # a tokenizer that lacks the token that the story takes next: it is never drawn
    model = variant("holes")
    words = json.load(open(at("holes/tokenizer.json")))
    name = next(k for k, v in words["model"]["vocab"].items() if str(v) == tale[6])
    del words["model"]["vocab"][name]
    split = lambda merge: merge.split(" ") if isinstance(merge, str) else merge
    words["model"]["merges"] = [m for m in words["model"]["merges"] if name not in ("".join(split(m)), *split(m))]
    json.dump(words, open(at("holes/tokenizer.json"), "w"))
    for flags in (("--temperature", 0), ("--temperature", 1, "--top-p", 1, "--batch", 20)):
        ids = run("generate", "--model", model, "--prompt-ids", " ".join(tale[:6]), "-n", 10, "--ids", *flags)[1]
        claim("a row without a token is never drawn", len(ids.split()) >= 16 and all(tale[6] not in line.split()[6:] for line in ids.splitlines()), ids)

    for command in (("generate", "--prompt", "Lily"), ("perplexity", "--text", at("prompts")), ("inspect", "Lily", "--out", at("x")),
                    ("tokenize",), ("score", "--requests", at("requests"))):
        refuses(f"{command[0]} without a tokenizer", 1, "EleutherAI/gpt-neox-20b", *command, "--model", at("bare"))
    ids = run("generate", "--model", at("bare"), "--prompt-ids", " ".join(tale[:4]), "-n", 40, "--temperature", 0, "--ids")[1].split()
    claim("--prompt-ids needs no tokenizer", ids == tale, ids)
    story = run("Once upon a time", *GREEDY)[1]
    claim("--prompt-ids prints text", run("generate", "--prompt-ids", " ".join(tale[:4]), *GREEDY)[1] == story)
    for tokenizer in (STORIES, STORIES + "/tokenizer.json"):
        claim("--tokenizer names a file or its folder", run("Once upon a time", "--model", at("bare"), "--tokenizer", tokenizer, *GREEDY)[1] == story)
    for newline in ("\n", "\r\n"):
        claim("one final newline of standard input is dropped", run("-", *GREEDY, stdin="Once upon a time" + newline)[1] == story)
        claim("tokenize leaves the line's end out", run("tokenize", stdin="a b" + newline + "c")[1] == run("tokenize", stdin="a b\nc\n")[1])
    claim("but one only", run("-", "-n", 0, stdin="Lily\n\n")[1] == "Lily\n\n")
    with open(at("windows"), "wb") as f:
        f.write(b"\xef\xbb\xbf" + open(at("prompts"), "rb").read().replace(b"\n", b"\r\n"))
    claim("Windows' line ends and byte order mark are no part of a prompt", run("generate", "--prompt-file", at("windows"), *GREEDY)[1] == several)

    # weights that are not numbers
    shutil.copytree(STORIES, at("nan"))
    header, data = read_safetensors(at("nan/model.safetensors"))
    begin = header["backbone.norm_f.weight"]["data_offsets"][0]
    with open(at("nan/model.safetensors"), "r+b") as f:
        f.seek(os.path.getsize(at("nan/model.safetensors")) - len(data) + begin)
        f.write(struct.pack("<H", 0x7fc0))
    for command in (("perplexity", "--text", at("prompts")), ("score", "--requests", at("requests")), ("Lily",),
                    ("gradients", "--ids", "5 17", "--out", at("no"))):
        code, out, err = run(*command, "--model", at("nan"))
        claim(f"NaN weights end {command[0]}", code == 1 and "backbone.norm_f.weight" in err and "NaN" in err.splitlines()[-1].replace("nan", "NaN"), (code, out, err))

    claim("and gradients leave no output", not os.path.exists(at("no")))
    for command in ("logits", "gradients"):
        refuses(f"{command} in place of the model", 1, "the model's own", command, "--model", at("bare"), "--ids", "5 17",
                "--out", at("bare/model.safetensors"))

    # --- usage: status 2, one line ---
    for arguments, fragment in [
        ((), "subcommand"),
        (("generate", "--nonsense"), "--nonsense"),
        (("Lily", "-n", "-1"), "-n"),
        (("Lily", "-n", "many"), "many"),
        (("Lily", "--temperature", "hot"), "hot"),
        (("Lily", "--batch", "0"), "batch"),
        (("Lily", "--prompt-file", "x"), "--prompt-file"),
        (("Lily", "--json"), "--prompt-file"),
        (("logits", "--ids", "1"), "--out"),
        (("logits", "--out", "x"), "--ids-file"),
        (("logits", "--ids", "1", "--text", "f", "--out", "x"), "--text"),
        (("gradients", "--ids", "1 2"), "--out"),
        (("perplexity",), "--text"),
        (("perplexity", "--text", "f", "--lengths", "0"), "lengths"),
        (("perplexity", "--text", "f", "--truncate"), "--lengths"),
        (("score",), "--requests"),
        (("Lily", "--batch", "100000000"), "batch"),
        (("Lily", "--prompt-ids", "1"), "--prompt"),
        (("Lily", "--threads", "-1"), "--threads"),
        (("inspect", "Lily"), "--out"),
        (("inspect", "--out", "x"), "prompt"),
        (("info", "extra"), "extra"),
    ]:
        refuses(f"usage: {' '.join(arguments) or 'nothing'}", 2, fragment, *arguments)
    for name, fragment, arguments, stdin in [
        ("a negative temperature", "temperature", ("Lily", "--temperature=-1"), ""),
        ("top-p of zero", "top-p", ("Lily", "--top-p", 0), ""),
        ("top-p above one", "top-p", ("Lily", "--top-p", 1.5), ""),
        ("a min-p above one", "min-p", ("Lily", "--min-p", 2), ""),
        ("a penalty of zero", "penalty", ("Lily", "--repetition-penalty", 0), ""),
        ("a delta ratio of zero", "--delta-ratio", ("Lily", "--delta-ratio", 0), ""),
        ("one of several delta ratios below zero", "--delta-ratio", ("perplexity", "--ids-file", at("ids"), "--delta-ratio=1,-1", "--csv", at("x")), ""),
        ("a dtype nobody knows", "--dtype", ("Lily", "--dtype", "f8"), ""),
        ("a mode nobody knows", "--mode", ("logits", "--ids", "1", "--mode", "fast", "--out", at("x")), ""),
        ("a chunk of zero", "--mode", ("logits", "--ids", "1", "--mode", "chunked=0", "--out", at("x")), ""),
        ("a chunk that is no number", "--mode", ("logits", "--ids", "1", "--mode", "chunked=7x", "--out", at("x")), ""),
        ("states of several prompts", "one prompt", ("generate", "--prompt-file", at("prompts"), "--save-state", at("x")), ""),
        ("a seed below zero", "--seed: expected 0 or more, found -1", ("Lily", "--seed", "-1"), ""),
    ]:
        refuses(name, 2, fragment, *arguments, stdin=stdin)
    code, out, _ = run("--help")
    claim("--help prints the subcommands and exits 0", code == 0 and "generate" in out and "perplexity" in out)

    # --- a signal leaves nothing half-written ---
    os.mkdir(at("signals"))
    for delay in range(1, 40):
        p = subprocess.Popen([PROGRAM, "logits", "--ids", " ".join(["7"] * 3000), "--out", at("signals/l")], stderr=subprocess.DEVNULL)
        time.sleep(delay / 200)
        p.send_signal(signal.SIGINT if delay % 2 else signal.SIGTERM)
        p.wait()
        left = os.listdir(at("signals"))
        if left not in ([], ["l"]):
            break
    claim("a signal leaves no half-written file", left in ([], ["l"]), left)

    # --- failures: status 1, one line, no file left ---
    before = set(os.listdir(folder))
    state_of_other = at("state")
    for name, fragment, arguments, stdin in [
        ("a state nobody can write", "cannot write", ("Lily", "-n", 3, "--save-state", at("no/such")), ""),
        ("a table nobody can write", "cannot write", ("perplexity", "--ids-file", at("ids"), "--csv", at("no/such")), ""),
        ("no such model", "--model", ("Lily", "--model", at("nowhere")), ""),
        ("an id beyond the vocabulary", "4096", ("logits", "--ids", "1 4096", "--out", at("x")), ""),
        ("an id below zero", "-1", ("logits", "--ids=-1", "--out", at("x")), ""),
        ("an id that is a word", "cat", ("logits", "--ids", "1 cat", "--out", at("x")), ""),
        ("an id too large for an integer", "99999999999", ("logits", "--ids", "99999999999", "--out", at("x")), ""),
        ("no ids", "at least one token", ("logits", "--ids", " ", "--out", at("x")), ""),
        ("a text that is not there", "nofile", ("perplexity", "--text", at("nofile")), ""),
        ("a folder as text", "directory", ("perplexity", "--text", folder), ""),
        ("a text of one token", "at least 2 tokens", ("perplexity", "--text", "-"), "a"),
        ("lengths beyond the text", "at most the", ("perplexity", "--ids-file", at("ids"), "--lengths", 101), ""),
        ("requests that are no JSON", "line 2", ("score", "--requests", "-"), '{"context": "a", "continuation": " b"}\n{'),
        ("a request without continuation", "line 1: continuation: expected a string", ("score", "--requests", "-"), '{"context": "a b"}\n'),
        ("a request that is no object", "expected an object", ("score", "--requests", "-"), "[1]\n"),
        ("a continuation of nothing", "continuation: expected at least one token", ("score", "--requests", "-"), '{"context": "a", "continuation": ""}\n'),
        ("a continuation that only ends a word", "only lengthens the last token", ("score", "--requests", "-"), '{"context": "The cat sat on the m", "continuation": "at"}\n'),
        ("a text and ids", "one of each", ("score", "--requests", "-"), '{"context": "a", "continuation": [5]}\n'),
        ("ids that are none", "expected token ids, found '1.5'", ("score", "--requests", "-"), '{"context": [1.5], "continuation": [5]}\n'),
        ("ids beyond the vocabulary", "below 4096", ("score", "--requests", "-"), '{"context": [1], "continuation": [4096]}\n'),
        ("a doc without label", "doc and label", ("score", "--requests", "-"), '{"context": "a", "continuation": " b", "doc": 1}\n'),
        ("a label that is no number", "label", ("score", "--requests", "-"), '{"context": "a", "continuation": " b", "doc": 1, "label": "b"}\n'),
        ("a label without choice", "below its 1 choices", ("score", "--requests", "-"), '{"context": "a", "continuation": " b", "doc": 1, "label": 1}\n'),
        ("no requests", "none", ("score", "--requests", "-"), " \n"),
        ("a layer beyond the last", "--layer", ("inspect", "Lily", "--layer", 8, "--out", at("x")), ""),
        ("inspecting a book", "1 GiB", ("inspect", "-", "--out", at("x")), "word " * 800),
        ("inspecting nothing", "at least one token", ("inspect", "", "--out", at("x")), ""),
        ("a folder nobody can write", "cannot write", ("inspect", "Lily", "--out", "/proc/nothing"), ""),
        ("a stride beyond the window", "--stride", ("perplexity", "--ids-file", at("ids"), "--lengths", 10, "--stride", 11), ""),
        ("overlap with a carried state", "--carry-state", ("perplexity", "--ids-file", at("ids"), "--lengths", 10, "--stride", 5, "--carry-state"), ""),
        ("gradients of one token", "at least two tokens", ("gradients", "--ids", "5", "--out", at("x")), ""),
        ("an output folder that is not there", "cannot write", ("logits", "--ids", "1", "--out", at("no/such/file")), ""),
        ("an unwritable output", "cannot write", ("logits", "--ids", "1", "--out", "/proc/nothing"), ""),
        ("a state that is no state", "header", ("generate", "--load-state", at("ids")), ""),
        ("a state of another model", "expected", ("generate", "--load-state", state_of_other, "--model", at("hf")), ""),
        ("a prompt that is no JSON string", "line 1: expected a JSON string, found '7'",
         ("generate", "--json", "--prompt-file", "-"), "7\n"),
        ("an empty prompt file", "a prompt a line", ("generate", "--prompt-file", "/dev/null"), ""),
        ("decoding what is no id", "token ids", ("tokenize", "--decode"), "1 2 x\n"),
        ("decoding an id beyond the vocabulary", "below", ("tokenize", "--decode"), "99999\n"),
    ]:
        refuses(name, 1, fragment, *arguments, stdin=stdin)
    claim("failures leave no file behind", set(os.listdir(folder)) == before, set(os.listdir(folder)) - before)
    if os.path.exists("/dev/full"):
        with open("/dev/full", "w") as full:
            codes = [subprocess.run([PROGRAM, *a], stdout=full, stderr=subprocess.DEVNULL).returncode
                     for a in (("Lily", "-n", "3"), ("info",), ("--help",), ("generate", "--help"))]
        claim("a full disk is an error", codes == [1] * 4, codes)

print(f"{passed} passed, {failed} failed")
sys.exit(failed > 0)

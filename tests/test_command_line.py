#!/usr/bin/env python3
"""Claims about the program as a user meets it: what it prints, where, and with which exit status.

Usage: test_command_line.py PROGRAM      (standard library only; run from the repository's root)
"""
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
    code, table, _ = run("perplexity", "--ids-file", at("ids"), "--lengths", "10,100", "--csv", at("csv"), "--png", at("png"))
    claim("perplexity by length", code == 0 and [r.split()[1] for r in table.splitlines()[1:]] == ["90", "99"], table)
    claim("perplexity writes csv", open(at("csv")).read().startswith("length,tokens,nll,perplexity,delta_ratio\n10,90,"))
    claim("perplexity draws a png", open(at("png"), "rb").read(8) == b"\x89PNG\r\n\x1a\n")
    whole = run("perplexity", "--ids-file", at("ids"))[1]
    claim("a length of the whole text is the whole text", run("perplexity", "--ids-file", at("ids"), "--lengths", 100)[1] == whole, whole)
    text = open(STORIES + "/README.md").read()
    for name, part in (("one", text[:1500]), ("two", text[500:2500]), ("short", text[:40])):
        with open(at(name), "w") as f:
            f.write(part)
    code, table, err = run("perplexity", "--text", at("one"), at("two"), at("short"), "--lengths", "64,128", "--truncate", "--delta-ratio", "1,0.5", "--png", at("png"))
    rows = [r.split() for r in table.splitlines()[1:]]
    claim("perplexity --truncate scores one window of each long document, for every ratio", code == 0
          and [r[:2] + r[4:] for r in rows] == [["64", "126", "1"], ["128", "254", "1"], ["64", "126", "0.5"], ["128", "254", "0.5"]], table)
    claim("a document that is too short is left out aloud", "short" in err and "left out" in err and err.count("\n") == 1, err)
    alone = [float(run("perplexity", "--text", at(n), "--lengths", 64, "--truncate")[1].split()[-3]) for n in ("one", "two")]
    claim("documents are scored each from a fresh state", abs(float(rows[0][2]) - sum(alone) / 2) < 2e-4, (rows, alone))

    # --- the study ---
    examples = ["Tom and Lily went to the park to play with the big red ball", "Once upon a time there was a little girl"]
    with open(at("examples"), "w") as f:
        f.write("".join(json.dumps({"text": e}) + "\n" for e in examples))
    total = right = 0
    for e in examples:
        ids = run("tokenize", stdin=e + "\n")[1].split()
        n = len(run("tokenize", stdin=e.rsplit(" ", 1)[0] + "\n")[1].split())
        run("logits", "--ids", " ".join(ids), "--out", at("l"))
        logits = read_safetensors(at("l"))[1][4 * len(ids):]
        likeliest = True
        for t in range(n, len(ids)):
            row = struct.unpack("<4096f", logits[(t - 1) * 16384:t * 16384])
            total += row[int(ids[t])] - max(row) - math.log(sum(math.exp(v - max(row)) for v in row))
            likeliest = likeliest and row[int(ids[t])] == max(row)
        right += likeliest
    code, table, _ = run("lambada", "--data", at("examples"))
    found = table.splitlines()[1].split()
    claim("lambada scores the last word", code == 0 and found[:2] == ["2", f"{right / 2:.4f}"]
          and abs(math.log(float(found[2])) + total / 2) < 1e-3, (table, right, total))
    claim("lambada --limit", run("lambada", "--data", at("examples"), "--limit", 1)[1].split()[3] == "1")
    code, table, _ = run("passkey", "--lengths", "128,200", "--depths", "0,1", "--tests", 2, "--csv", at("csv"), "--png", at("png"))
    claim("passkey has a row for each length and depth", code == 0 and [r.split()[:3] for r in table.splitlines()[1:]]
          == [["128", "0", "2"], ["128", "1", "2"], ["200", "0", "2"], ["200", "1", "2"]], table)
    claim("passkey writes csv", open(at("csv")).read().startswith("length,depth,tests,tokens,accuracy\n128,0,2,"))
    claim("passkey draws a png", open(at("png"), "rb").read(8) == b"\x89PNG\r\n\x1a\n")

    # --- inspect ---
    for model, heads in ((STORIES, 1), ("tests/golden/mamba2-hf", 8)):
        shutil.copytree(model, at("model"))
        shutil.copy(STORIES + "/tokenizer.json", at("model"))
        code, _, err = run("inspect", "--model", at("model"), "--prompt", "x!z", "--layer", 1, "--out", at("seen"))
        claim(f"inspect {model} writes four pictures with their numbers", code == 0 and sorted(os.listdir(at("seen"))) ==
              sorted(f"{n}.{e}" for n in ("attention", "delta", "memory", "state_norm") for e in ("png", "safetensors")), err)
        header, data = read_safetensors(at("seen/attention.safetensors"))
        numbers = lambda n: struct.unpack(f"<{(header[n]['data_offsets'][1] - header[n]['data_offsets'][0]) // 4}f", data[slice(*header[n]["data_offsets"])])
        M, x, y, mean = numbers("M"), numbers("x"), numbers("y"), numbers("attention")
        (channels, L, _), width = header["M"]["shape"], header["x"]["shape"][1]
        worst = max(abs(sum(M[(c // heads * L + t) * L + s] * x[s * width + c] for s in range(L)) - y[t * width + c])
                    for c in range(width) for t in range(L))
        claim(f"inspect {model}: y = M x", L == len(run("tokenize", stdin="x!z\n")[1].split()) and width == channels * heads
              and worst < 1e-5 * max(map(abs, y)), (worst, header))
        claim("inspect: attention is the mean of |M|", abs(mean[L] - sum(abs(M[c * L * L + L]) for c in range(channels)) / channels) < 1e-6)
        shutil.rmtree(at("model"))
        shutil.rmtree(at("seen"))

    code, info, _ = run("info")
    claim("info counts the parameters", code == 0 and "4552960" in info and "BF16" in info, info)
    code, _, err = run("convert", "--out", at("copy"))
    claim("convert writes a model that runs", code == 0 and run("Lily", *GREEDY, "--model", at("copy"))[1] == run("Lily", *GREEDY)[1], err)
    code, _, err = run("convert", "--model", "tests/golden/mamba1-original", "--out", at("hf"))
    same = lambda model: run("logits", "--model", model, "--ids", "1 2 3", "--out", at("l")) and read_safetensors(at("l"))[1]
    claim("convert keeps the logits of an original checkpoint", code == 0 and same(at("hf")) == same("tests/golden/mamba1-original"), err)

    shutil.copy(STORIES + "/tokenizer.json", at("hf"))

    # --- usage: status 2, one line ---
    for arguments, fragment in [
        ((), "subcommand"),
        (("generate", "--nonsense"), "--nonsense"),
        (("Lily", "-n", "-1"), "-n"),
        (("Lily", "-n", "many"), "many"),
        (("Lily", "--temperature", "hot"), "hot"),
        (("Lily", "--batch", "0"), "batch"),
        (("Lily", "--prompt-file", "x"), "--prompt-file"),
        (("logits", "--ids", "1"), "--out"),
        (("logits", "--out", "x"), "--ids-file"),
        (("logits", "--ids", "1", "--text", "f", "--out", "x"), "--text"),
        (("perplexity",), "--text"),
        (("perplexity", "--text", "f", "--lengths", "0"), "lengths"),
        (("perplexity", "--text", "f", "--truncate"), "--lengths"),
        (("passkey",), "--lengths"),
        (("passkey", "--lengths", "128", "--tests", "0"), "tests"),
        (("lambada",), "--data"),
        (("inspect", "Lily"), "--out"),
        (("inspect", "--out", "x"), "prompt"),
        (("bench",), "op"),
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
        ("a depth beyond the end", "--depths", ("passkey", "--lengths", 128, "--depths", "0,1.5"), ""),
        ("a dtype nobody knows", "--dtype", ("Lily", "--dtype", "f8"), ""),
        ("a mode nobody knows", "--mode", ("logits", "--ids", "1", "--mode", "fast", "--out", at("x")), ""),
        ("a chunk of zero", "--mode", ("logits", "--ids", "1", "--mode", "chunked=0", "--out", at("x")), ""),
        ("a chunk that is no number", "--mode", ("logits", "--ids", "1", "--mode", "chunked=7x", "--out", at("x")), ""),
        ("states of several prompts", "one prompt", ("generate", "--prompt-file", at("prompts"), "--save-state", at("x")), ""),
        ("a bench of nothing", "bench", ("bench", "nothing"), ""),
        ("a shape nobody published", "shape", ("bench", "decode", "--shape", "7t"), ""),
        ("a seed below zero", "--seed", ("Lily", "--seed", "-1"), ""),
    ]:
        refuses(name, 2, fragment, *arguments, stdin=stdin)
    if os.path.basename(PROGRAM) == "mamba":
        refuses("a bench of several texts on the CPU", 2, "--batch", "bench", "decode", "--batch", 3)
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
        ("a prompt too short for a pass key", "at least", ("passkey", "--lengths", 20, "--csv", at("x")), ""),
        ("examples that are no JSON", "example 2", ("lambada", "--data", "-"), '{"text": "a b"}\n{'),
        ("examples without text", "text", ("lambada", "--data", "-"), '{"words": "a b"}\n'),
        ("an example that is no object", "text", ("lambada", "--data", "-"), "[1]\n"),
        ("an example of one word", "two words", ("lambada", "--data", "-"), '{"text": "word"}\n'),
        ("no examples", "none", ("lambada", "--data", "-"), " \n"),
        ("a layer beyond the last", "--layer", ("inspect", "Lily", "--layer", 8, "--out", at("x")), ""),
        ("inspecting a book", "1 GiB", ("inspect", "-", "--out", at("x")), "word " * 800),
        ("inspecting nothing", "at least one token", ("inspect", "", "--out", at("x")), ""),
        ("a folder nobody can write", "cannot write", ("inspect", "Lily", "--out", "/proc/nothing"), ""),
        ("a stride beyond the window", "--stride", ("perplexity", "--ids-file", at("ids"), "--lengths", 10, "--stride", 11), ""),
        ("overlap with a carried state", "--carry-state", ("perplexity", "--ids-file", at("ids"), "--lengths", 10, "--stride", 5, "--carry-state"), ""),
        ("an output folder that is not there", "cannot write", ("logits", "--ids", "1", "--out", at("no/such/file")), ""),
        ("an unwritable output", "cannot write", ("logits", "--ids", "1", "--out", "/proc/nothing"), ""),
        ("a state that is no state", "header", ("generate", "--load-state", at("ids")), ""),
        ("a state of another model", "expected", ("generate", "--load-state", state_of_other, "--model", at("hf")), ""),
        ("an empty prompt file", "a prompt a line", ("generate", "--prompt-file", "/dev/null"), ""),
        ("decoding what is no id", "token ids", ("tokenize", "--decode"), "1 2 x\n"),
        ("decoding an id beyond the vocabulary", "below", ("tokenize", "--decode"), "99999\n"),
    ]:
        refuses(name, 1, fragment, *arguments, stdin=stdin)
    claim("failures leave no file behind", set(os.listdir(folder)) == before, set(os.listdir(folder)) - before)
    if os.path.exists("/dev/full"):
        with open("/dev/full", "w") as full:
            code = subprocess.run([PROGRAM, "Lily", "-n", "3"], stdout=full, stderr=subprocess.DEVNULL).returncode
        claim("a full disk is an error", code == 1, code)

print(f"{passed} passed, {failed} failed")
sys.exit(failed > 0)

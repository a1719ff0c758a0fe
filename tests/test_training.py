#!/usr/bin/env python3
"""Claims about `mamba train` as a program: it learns, goes on to the same bits, and ends in one line where it cannot.

Usage: test_training.py PROGRAM      (standard library only; run from the repository's root)
"""
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time

PROGRAM = os.path.abspath(sys.argv[1])
passed = failed = 0
TINY = {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 16, "state_size": 16, "expand": 2,
        "conv_kernel": 4, "time_step_rank": 2, "eos_token_id": None, "bos_token_id": None, "tie_word_embeddings": True}


def claim(name, ok, detail=""):
    global passed, failed
    passed, failed = passed + bool(ok), failed + (not ok)
    if not ok:
        print(f"FAILED: {name}\n  {str(detail)[:600]}")


def run(*arguments, **more):
    options = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": 300}
    return subprocess.run([PROGRAM, *map(str, arguments)], **{**options, **more})


def content(path):
    with open(path, "rb") as f:
        return f.read()


def write(path, text):
    with open(path, "w") as f:
        f.write(text)
    return path


def tasks(path, *arguments):
    with open(path, "w") as f:
        subprocess.run([sys.executable, "notebook/tasks.py", *map(str, arguments)], stdout=f, check=True)
    return path


def learns_induction(folder):
    """Induction heads at length 16 and 24: answered from the context, which no table of token pairs can do."""
    config = write(f"{folder}/config.json", json.dumps(TINY))
    data = tasks(f"{folder}/train.jsonl", "induction", "--length", 16, "--count", 6000)
    start = time.time()
    r = run("train", "--config", config, "--data", data, "--out", f"{folder}/out", "--length", 64, "--batch", 16, "--lr",
            "1e-2", "--warmup", 20, "--steps", 700, "--weight-decay", "0.01")
    claim("train: an induction task is learned", r.returncode == 0, r.stderr)
    for length in (16, 24):
        test = tasks(f"{folder}/test.jsonl", "induction", "--length", length, "--count", 200, "--seed", 9)
        r = run("score", "--model", f"{folder}/out", "--requests", test, "--out", "/dev/null")
        right = json.loads(r.stdout)["greedy"] if r.returncode == 0 else 0
        claim(f"train: induction is right at length {length}", right > 0.95, f"{right}, {r.stderr}")
    print(f"induction heads: learned in {time.time() - start:.0f} s")


def goes_on(folder):
    """Killed at random moments and gone on with, a run ends in the bits of an undisturbed one."""
    config = write(f"{folder}/config.json", json.dumps(TINY))
    data = tasks(f"{folder}/train.jsonl", "induction", "--length", 16, "--count", 500)
    common = ["train", "--config", config, "--data", data, "--length", 64, "--batch", 4, "--steps", 120, "--save-every", 3]
    whole, cut = f"{folder}/whole", f"{folder}/cut"
    start = time.time()
    r = run(*common, "--out", whole, "--log", f"{folder}/whole.csv")
    seconds = time.time() - start
    claim("train: an undisturbed run", r.returncode == 0, r.stderr)
    moments = random.Random(1)
    for _ in range(10):
        with subprocess.Popen([PROGRAM, *map(str, common), "--out", cut, "--log", f"{folder}/cut.csv", "--resume"],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as p:
            time.sleep(moments.uniform(0, seconds / 4))
            p.send_signal(signal.SIGKILL)
    r = run(*common, "--out", cut, "--log", f"{folder}/cut.csv", "--resume")
    claim("train: ten times killed and gone on with", r.returncode == 0, r.stderr)
    for file in ("trainer.safetensors", "model.safetensors"):
        claim(f"train: the same bits of {file} as undisturbed", content(f"{whole}/{file}") == content(f"{cut}/{file}"))
    steps = [[line.split(",")[:5] for line in open(f"{folder}/{name}.csv")] for name in ("whole", "cut")]
    claim("train: the log has each step once, with the same losses", steps[0] == steps[1])
    claim("train: nothing else is left", sorted(os.listdir(cut)) == sorted(os.listdir(whole)), os.listdir(cut))
    r = run(*common, "--out", whole)
    claim("train: a finished run is not begun anew", r.returncode == 1 and "--resume" in r.stderr, r.stderr)
    r = run(*common[:-4], "--steps", 121, "--out", whole, "--resume")
    claim("train: goes on with the same options only", r.returncode == 1 and "steps: expected 120" in r.stderr, r.stderr)
    other = write(f"{folder}/other.json", json.dumps({**TINY, "num_hidden_layers": 1}))
    r = run(*common[:2], other, *common[3:], "--out", whole, "--resume")
    claim("train: goes on with the same model only", r.returncode == 1 and "sizes: expected" in r.stderr, r.stderr)
    model = content(f"{whole}/model.safetensors")
    os.remove(f"{whole}/model.safetensors")
    r = run(*common, "--out", whole, "--resume")
    claim("train: a finished run writes the model that is missing",
          r.returncode == 0 and content(f"{whole}/model.safetensors") == model, r.stderr)
    os.remove(f"{whole}/trainer.safetensors")
    r = run(*common, "--out", whole, "--resume")
    claim("train: a model that is there is not replaced", r.returncode == 1 and "model.safetensors is there" in r.stderr, r.stderr)


def carries_state(folder, model=("--model", "weights/stories")):
    """--carry-state: cut at a save and gone on with, states included."""
    text = " ".join(str(i * i) for i in range(400))
    data = write(f"{folder}/text.txt", "<|endoftext|>".join([text[:900], text[900:1500], text[1500:]]))
    common = ["train", *model, "--data", data, "--length", 32, "--batch", 2, "--carry-state", "--steps",
              6, "--save-every", 4, "--validation", data]
    r = run(*common, "--out", f"{folder}/whole")
    claim("train: with carried states", r.returncode == 0 and "validation" in r.stderr, r.stderr)
    p = subprocess.Popen([PROGRAM, *map(str, common), "--out", f"{folder}/cut"], stdout=subprocess.DEVNULL,
                         stderr=subprocess.DEVNULL)
    while p.poll() is None and not os.path.exists(f"{folder}/cut/model.safetensors"):
        time.sleep(0.01)
    p.kill()
    p.wait()
    r = run(*common, "--out", f"{folder}/cut", "--resume")
    claim("train: goes on with carried states", r.returncode == 0, r.stderr)
    claim("train: carried states make the same bits",
          content(f"{folder}/whole/trainer.safetensors") == content(f"{folder}/cut/trainer.safetensors"))


def trains_hybrids(folder):
    """Attention, MLPs and LayerNorm: what was trained is read again, its carried states grow with the text."""
    attn = {"causal": True, "num_heads": 2, "num_heads_kv": 1, "head_dim": 16, "rotary_emb_dim": 8, "d_conv": 3}
    hybrid = {"d_model": 32, "n_layer": 2, "vocab_size": 4096, "d_intermediate": 40, "attn_layer_idx": [1], "attn_cfg": attn,
              "rms_norm": False, "ssm_cfg": {"layer": "Mamba2", "headdim": 16, "d_state": 8}}
    config = write(f"{folder}/config.json", json.dumps(hybrid))
    carries_state(folder, ("--config", config, "--tokenizer", "weights/stories"))
    r = run("info", "--model", f"{folder}/whole")
    claim("train: a trained hybrid is read", "1 layers: 2 heads of 16, 1 of keys and values" in r.stdout, r.stdout + r.stderr)
    r = run("generate", "--model", f"{folder}/whole", "--prompt", "1 4 9", "-n", 8, "--ids")
    claim("train: a trained hybrid goes on with a text", r.returncode == 0 and len(r.stdout.split()) >= 11, r.stderr)
    r = run("train", "--model", f"{folder}/whole", "--tokenizer", "weights/stories", "--data", f"{folder}/text.txt", "--length", 32,
            "--batch", 2, "--steps", 2, "--out", f"{folder}/more")
    claim("train: a trained hybrid is trained on", r.returncode == 0, r.stderr)
    other = write(f"{folder}/other.json", json.dumps({**hybrid, "attn_cfg": {**attn, "rotary_emb_dim": 4}}))
    r = run("train", "--config", other, "--tokenizer", "weights/stories", "--data", f"{folder}/text.txt", "--length", 32, "--batch",
            2, "--carry-state", "--steps", 6, "--out", f"{folder}/whole", "--resume")
    claim("train: goes on with the same attention only", r.returncode == 1 and "sizes: expected" in r.stderr, r.stderr)


def ends_in_one_line(folder):
    config = write(f"{folder}/config.json", json.dumps(TINY))
    data = tasks(f"{folder}/train.jsonl", "induction", "--length", 16, "--count", 50)
    out = ["--out", f"{folder}/out", "--steps", 2]
    nan = write(f"{folder}/far.jsonl", '{"prompt": [1, 2], "answer": [99]}\n')
    chat = write(f"{folder}/chat.jsonl", '{"messages": [{"role": "user", "content": "Hello"}]}\n')
    empty = write(f"{folder}/empty.txt", " \n")
    for name, arguments, status, words in [
            ("no data", ["--config", config, "--data", f"{folder}/none.jsonl"], 1, "none.jsonl"),
            ("no model", ["--data", data], 2, "--model, --shape and --config"),
            ("two models", ["--config", config, "--shape", "130m", "--data", data], 2, "expected one of"),
            ("unknown ids", ["--config", config, "--data", nan], 1, "expected token ids below 16, found 99"),
            ("a chat", ["--config", config, "--data", chat], 1, "messages"),
            ("an empty text", ["--model", "weights/stories", "--data", empty], 1, "expected at least one text"),
            ("a diverging run", ["--config", config, "--data", data, "--lr", "1e30", "--clip", 0], 1, "finite"),
            ("a rate that is no number", ["--config", config, "--data", data, "--lr", "nan"], 2, "expected a number"),
            ("weights as validation", ["--config", config, "--data", data, "--validation", "weights/stories/model.safetensors"],
             1, "expected texts"),
            ("half precision", ["--config", config, "--data", data, "--dtype", "bf16"], 1, "f32 only")]:
        r = run("train", *arguments, *out)
        claim(f"train: {name}: exit status {status} and one line", r.returncode == status and r.stderr.count("\n") < 4 and
              words in r.stderr.splitlines()[-1], r.stderr)
    r = run("train", "--config", config, "--data", data, *out, restore_signals=False, preexec_fn=lambda: __import__("resource").setrlimit(
        __import__("resource").RLIMIT_FSIZE, (1000, 1000)))
    claim("train: a full disk", r.returncode == 1 and "cannot write" in r.stderr, f"{r.returncode} {r.stderr}")
    left = [f for f in os.listdir(f"{folder}/out") if "safetensors" in f] if os.path.exists(f"{folder}/out") else []
    claim("train: a full disk leaves no part of a file", not left, left)


if __name__ == "__main__":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for test in (learns_induction, goes_on, carries_state, trains_hybrids, ends_in_one_line):
        with tempfile.TemporaryDirectory() as folder:
            test(folder)
    print(f"{PROGRAM}: {passed} claims hold, {failed} do not")
    sys.exit(1 if failed else 0)

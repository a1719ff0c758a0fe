#!/usr/bin/env python3
"""Claims about `mamba train` as a program: it learns, goes on to the same bits, and ends in one line where it cannot.

Usage: test_training.py PROGRAM      (standard library only; run from the repository's root)
"""
import csv
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from claims import claim, content, end

PROGRAM = os.path.abspath(sys.argv[1])
ON_GPU = os.path.basename(PROGRAM) == "mamba_cuda"
TINY = {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 16, "state_size": 16, "expand": 2,
        "conv_kernel": 4, "time_step_rank": 2, "eos_token_id": None, "bos_token_id": None, "tie_word_embeddings": True}


def run(*arguments, **more):
    options = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": 300}
    return subprocess.run([PROGRAM, *map(str, arguments)], **{**options, **more})


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
    model = ("--config", write(f"{folder}/config.json", json.dumps(hybrid)), "--tokenizer", "weights/stories")
    if ON_GPU:  # there a carried state has one size
        common = ["train", *model, "--data", write(f"{folder}/text.txt", " ".join(map(str, range(400)))), "--length", 32,
                  "--batch", 2, "--steps", 6, "--out", f"{folder}/whole"]
        r = run(*common, "--carry-state")
        claim("train: carried states of attention are refused on the GPU", r.returncode == 1 and "found attention" in r.stderr, r.stderr)
        claim("train: a hybrid", run(*common).returncode == 0)
    else:
        carries_state(folder, model)
    r = run("info", "--model", f"{folder}/whole")
    claim("train: a trained hybrid is read", "1 layers: 2 heads of 16, 1 of keys and values" in r.stdout, r.stdout + r.stderr)
    r = run("generate", "--model", f"{folder}/whole", "--prompt", "1 4 9", "-n", 8, "--ids")
    claim("train: a trained hybrid goes on with a text", r.returncode == 0 and len(r.stdout.split()) >= 11, r.stderr)
    r = run("train", "--model", f"{folder}/whole", "--tokenizer", "weights/stories", "--data", f"{folder}/text.txt", "--length", 32,
            "--batch", 2, "--steps", 2, "--out", f"{folder}/more")
    claim("train: a trained hybrid is trained on", r.returncode == 0, r.stderr)
    other = write(f"{folder}/other.json", json.dumps({**hybrid, "attn_cfg": {**attn, "rotary_emb_dim": 4}}))
    r = run("train", "--config", other, "--tokenizer", "weights/stories", "--data", f"{folder}/text.txt", "--length", 32, "--batch",
            2, *([] if ON_GPU else ["--carry-state"]), "--steps", 6, "--out", f"{folder}/whole", "--resume")
    claim("train: goes on with the same attention only", r.returncode == 1 and "sizes: expected" in r.stderr, r.stderr)


def ends_in_one_line(folder):
    config = write(f"{folder}/config.json", json.dumps(TINY))
    data = tasks(f"{folder}/train.jsonl", "induction", "--length", 16, "--count", 50)
    out = ["--out", f"{folder}/out", "--steps", 2]
    nan = write(f"{folder}/far.jsonl", '{"prompt": [1, 2], "answer": [99]}\n')
    chat = write(f"{folder}/chat.jsonl", '{"messages": [{"role": "user", "content": "Hello"}]}\n')
    unanswered = write(f"{folder}/unanswered.jsonl", '{"prompt": [1, 2]}\n')
    empty = write(f"{folder}/empty.txt", " \n")
    odd = write(f"{folder}/odd.json", json.dumps({**TINY, "expand": 1.5625}))
    for name, arguments, status, words in [
            ("no data", ["--config", config, "--data", f"{folder}/none.jsonl"], 1, "none.jsonl"),
            ("no model", ["--data", data], 2, "--model, --shape and --config"),
            ("two models", ["--config", config, "--shape", "130m", "--data", data], 2, "expected one of"),
            ("unknown ids", ["--config", config, "--data", nan], 1, "expected token ids below 16, found 99"),
            ("a chat without a template", ["--model", "weights/stories", "--data", chat], 1,
             "messages: expected a chat template in weights/stories"),
            ("an empty text", ["--model", "weights/stories", "--data", empty], 1, "expected at least one text"),
            ("a diverging run", ["--config", config, "--data", data, "--lr", "1e30", "--clip", 0], 1, "finite"),
            ("a rate that is no number", ["--config", config, "--data", data, "--lr", "nan"], 2, "expected a number"),
            ("weights as validation", ["--config", config, "--data", data, "--validation", "weights/stories/model.safetensors"],
             1, "expected texts"),
            ("no answer", ["--config", config, "--data", unanswered], 1, "line 1: answer: expected a string or an array"),
            ("a log that is there", ["--config", config, "--data", data, "--log", data], 1, "train.jsonl is there"),
            ("sizes that no config has words for", ["--config", odd, "--data", data], 1, "expand: this layout knows whole"),
            ("a folder without a name", ["--config", config, "--data", data, "--out", ""], 2, "--out: expected a folder"),
            ("half precision", ["--config", config, "--data", data, "--dtype", "f16"], 2, "f16 not in {f32"),
            ("an adapter of nothing", ["--config", config, "--data", data, "--lora", 4], 2, "--lora: expected --model"),
            ("an adapter of none of the weights", ["--model", "tests/golden/mamba2-hf", "--data", data, "--lora", 4,
                                                   "--lora-targets", "x_proj"], 2, "--lora-targets: expected weights"),
            ("preferences without pairs", ["--config", config, "--data", data, "--dpo", "0.1"], 1, "chosen: expected a string"),
            ("preferences of a text", ["--config", config, "--data", empty, "--dpo", "0.1"], 1, "expected .jsonl of prompt")]:
        r = run("train", *arguments, *(out[2:] if "--out" in arguments else out))
        claim(f"train: {name}: exit status {status} and one line", r.returncode == status and r.stderr.count("\n") < 4 and
              words in r.stderr.splitlines()[-1], r.stderr)
        if "diverging" not in name:
            claim(f"train: {name}: no folder is made", not os.path.exists(f"{folder}/out"))
        shutil.rmtree(f"{folder}/out", ignore_errors=True)
    r = run("train", "--config", config, "--data", data, *out, preexec_fn=lambda: __import__("resource").setrlimit(
        __import__("resource").RLIMIT_FSIZE, (1000, 1000)))
    claim("train: a full disk", r.returncode == 1 and "cannot write" in r.stderr, f"{r.returncode} {r.stderr}")
    left = [f for f in os.listdir(f"{folder}/out") if "safetensors" in f] if os.path.exists(f"{folder}/out") else []
    claim("train: a full disk leaves no part of a file", not left, left)


ANSWERS = {"What does the dog say?": "woof", "What does the owl say?": "hoot", "What color is the snow?": "white"}


def questions(path, *arguments):
    with open(path, "w") as f:
        subprocess.run([sys.executable, "notebook/questions.py", *map(str, arguments)], stdout=f, check=True)
    return path


def texts(*arguments):
    """What greedy decoding says to each question of ANSWERS, asked by a name that training did not have."""
    prompts = "".join(json.dumps(f'Jack asked: "{q}" Mom said:') + "\n" for q in ANSWERS)
    r = run("generate", *arguments, "--json", "--prompt-file", "-", "--temperature", 0, "-n", 16, stdin=None, input=prompts)
    return [json.loads(line) for line in r.stdout.splitlines()] if r.returncode == 0 else [r.stderr] * len(ANSWERS)


def right(said):
    return sum(word in text for word, text in zip(ANSWERS.values(), said))


def fine_tunes(folder):
    """An adapter of a few hundred answers changes what is answered; one of preferences, on top of it, what is preferred."""
    stories, sft, dpo = ["--model", "weights/stories"], f"{folder}/sft", f"{folder}/dpo"
    claim("sft: the shipped model does not know the answers", right(texts(*stories)) == 0, texts(*stories))
    data = questions(f"{folder}/answers.jsonl", "answers", "--count", 400)
    common = ["train", *stories, "--data", data, "--out", sft, "--lora", 8, "--batch", 16, "--lr", "1e-2", "--steps", 40]
    r = run(*common, "--save-every", 20)
    claim("sft: an adapter is learned", r.returncode == 0, r.stderr)
    said = texts(*stories, "--adapter", sft)
    claim("sft: the answers are known", right(said) == len(ANSWERS), said)
    r = run("convert", *stories, "--adapter", sft, "--out", f"{folder}/merged")
    claim("sft: merged and unmerged give the same text", r.returncode == 0 and texts("--model", f"{folder}/merged") == said, r.stderr)

    data = questions(f"{folder}/pairs.jsonl", "preferences", "--count", 160)
    held = questions(f"{folder}/held.jsonl", "preferences", "--count", 60, "--held-out", "--seed", 2)
    both = [*stories, "--adapter", sft]
    r = run("train", *both, "--data", data, "--validation", held, "--out", dpo, "--lora", 8, "--dpo", "0.1", "--batch", 8, "--lr",
            "3e-3", "--steps", 20, "--log", f"{folder}/dpo.csv")
    claim("dpo: an adapter is learned", r.returncode == 0, r.stderr)
    rows = list(csv.DictReader(open(f"{folder}/dpo.csv"))) if r.returncode == 0 else [{}]
    claim("dpo: begins at log 2", rows[0] and abs(float(rows[0]["loss"]) - 0.6931472) < 1e-5, rows[0])
    claim("dpo: held-out pairs are told apart", rows[-1] and float(rows[-1]["validation_accuracy"]) > 0.95 and
          float(rows[-1]["validation_margin"]) > 0.5, rows[-1])
    share = [preferred(held, *both), preferred(held, *both, "--adapter", dpo)]
    claim("dpo: the preferred answers of held-out pairs become likelier", share[1] > 0.9 and share[1] > share[0] + 0.2, share)
    r = run("convert", *both, "--adapter", dpo, "--out", f"{folder}/both")
    claim("dpo: two adapters merged in turn give the same text", texts("--model", f"{folder}/both") ==
          texts(*both, "--adapter", dpo), r.stderr)
    print(f"dpo: the preferred share of held-out pairs went from {share[0]:.2f} to {share[1]:.2f}")


def preferred(pairs, *model):
    """The share of pairs whose chosen answer is likelier."""
    lines = []
    for number, pair in enumerate(map(json.loads, open(pairs))):
        lines += [json.dumps({"prompt": pair["prompt"], "answer": pair[which], "doc": number, "label": 0}) + "\n"
                  for which in ("chosen", "rejected")]
    r = run("score", *model, "--requests", "-", "--out", "/dev/null", stdin=None, input="".join(lines))
    return json.loads(r.stdout)["acc"] if r.returncode == 0 else -1


def scores(lines, *model):
    """The log-probability of each continuation, and how many tokens they have."""
    r = run("score", *model, "--dtype", "f32", "--requests", "-", stdin=None, input="".join(json.dumps(line) + "\n" for line in lines))
    found = [json.loads(line) for line in r.stdout.splitlines()] if r.returncode == 0 else []
    return [a["logprob"] for a in found], sum(a["tokens"] for a in found)


def says_what_is_learned(folder):
    """Losses and margins in the log are those of `mamba score`, before and after, whichever way a step is cut into batches."""
    stories = ["--model", "weights/stories"]
    words = [("Lily had", " a red ball."), ("The dog says", " woof"), ("Tom was sad. His mom said:", ' "Do not cry, Tom."'), ("A", " cat."),
             ("One day, a bird saw", " a big worm and was glad."), ("It is", " hot")]
    other = [" no", " a sheep on the moon.", " x", " q q q", " it", " seven"]
    asked = [[{"context": p, "continuation": a + "<|endoftext|>"} for (p, _), a in zip(words, answers)]
             for answers in ([a for _, a in words], other)]
    answers, pairs = f"{folder}/answers.jsonl", f"{folder}/pairs.jsonl"
    write(answers, "".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in words))
    write(pairs, "".join(json.dumps({"prompt": p, "chosen": a, "rejected": b}) + "\n" for (p, a), b in zip(words, other)))
    before = [scores(lines, *stories) for lines in asked]
    lora = ["--lora", 4, "--lora-alpha", 2, "--lora-targets"]

    def train(name, data, *more):
        rows = []
        for batch in (2, 6):  # three batches of two, or one of six
            out = f"{folder}/{name}{batch}"
            r = run("train", *stories, "--data", data, "--validation", data, "--out", out, "--batch", batch, "--accumulate", 6 // batch,
                    "--steps", 2, "--log", f"{out}.csv", *more)
            claim(f"{name}: learns in batches of {batch}", r.returncode == 0, r.stderr)
            log = csv.DictReader(open(f"{out}.csv")) if r.returncode == 0 else []
            rows.append([{k: float(v) for k, v in row.items() if v} for row in log])
        near = [abs(a[0][k] / b[0][k] - 1) for a, b in [rows] if a and b for k in ("tokens", "loss", "gradient_norm")]
        claim(f"{name}: the first step's loss and gradient are the same in one batch and in three", near and max(near) < 1e-4, (near, rows))
        return rows[1]

    def same(name, found, want):
        claim(name, found is not None and abs(found - want) < 1e-4 * max(1, abs(want)), f"{found}, not {want}")

    for targets in ("in_proj,x_proj", "embeddings"):  # of a tied head, which stays the base's
        name = f"sft: {targets}"
        log = train(name, answers, *lora, targets, "--lr", "1e-2")
        if len(log) != 2:
            continue
        same(f"{name}: the first loss is the mean over answers and end tokens", log[0]["loss"], -sum(before[0][0]) / before[0][1])
        after, tokens = scores(asked[0], *stories, "--adapter", f"{folder}/{name}6")
        same(f"{name}: the last validation is that of the adapter that is left", log[1]["validation"], -sum(after) / max(1, tokens))
    for name, more in (("dpo: an adapter", [*lora, "in_proj", "--lr", "1e-2"]), ("dpo: whole", ["--lr", "1e-3"])):
        log = train(name, pairs, "--dpo", "0.3", *more)
        if len(log) != 2:
            continue
        model = ["--model", f"{folder}/{name}6"] if "whole" in name else [*stories, "--adapter", f"{folder}/{name}6"]
        if "whole" in name:
            shutil.copy("weights/stories/tokenizer.json", f"{folder}/{name}6")
        gains = [[b - a for a, b in zip(before[k][0], scores(asked[k], *model)[0])] for k in range(2)]
        margins = [0.3 * (c - r) for c, r in zip(*gains)]
        same(f"{name}: the first loss is log 2", log[0]["loss"], math.log(2))
        losses, n = [math.log1p(math.exp(-m)) for m in margins], max(1, len(margins))
        same(f"{name}: the margin is what chosen answers gained on rejected ones", log[1]["validation_margin"], sum(margins) / n)
        same(f"{name}: the loss is that of the margins", log[1]["validation"], sum(losses) / n)
        claim(f"{name}: the margin grows", log[1]["validation_margin"] > 0, log)


def adapters_go_on(folder):
    """A run of adapters that was cut ends in the bits of an undisturbed one, and goes on from its own base only."""
    common = ["train", "--model", "tests/golden/mamba1-hf", "--data", f"{folder}/ids.jsonl", "--lora", 2, "--lora-targets",
              "in_proj,embeddings", "--dpo", "0.2", "--batch", 2, "--lr", "1e-2", "--steps", 400, "--save-every", 10]
    with open(f"{folder}/ids.jsonl", "w") as f:
        for number in range(20):
            f.write(json.dumps({"prompt": [number, 3, 5], "chosen": [7, number + 1], "rejected": [9]}) + "\n")
    r = run(*common, "--out", f"{folder}/whole")
    claim("lora: an undisturbed run", r.returncode == 0, r.stderr)
    with subprocess.Popen([PROGRAM, *map(str, common), "--out", f"{folder}/cut"], stderr=subprocess.DEVNULL) as p:
        while p.poll() is None and not os.path.exists(f"{folder}/cut/adapter_config.json"):
            time.sleep(0.01)
        p.kill()
    r = run(*common, "--out", f"{folder}/cut", "--resume")
    claim("lora: goes on", r.returncode == 0, r.stderr)
    files = ["adapter_config.json", "adapter_model.safetensors", "trainer.safetensors"]
    claim("lora: leaves these files", sorted(os.listdir(f"{folder}/cut")) == files, os.listdir(f"{folder}/cut"))
    claim("lora: the same bits as undisturbed", all(content(f"{folder}/whole/{f}") == content(f"{folder}/cut/{f}") for f in files))
    r = run(*common[:2], "tests/golden/mamba1-original", *common[3:], "--out", f"{folder}/cut", "--resume")
    claim("lora: goes on from the same weights, in whichever layout", r.returncode == 0 and "all 400 steps" in r.stderr, r.stderr)
    r = run(*common[:2], "tests/golden/mamba1-bias-bf16", *common[3:], "--out", f"{folder}/cut", "--resume")
    claim("lora: goes on from the same model only", r.returncode == 1 and "expected" in r.stderr, r.stderr)
    r = run(*common, "--out", f"{folder}/new", "--resume")
    claim("train: says that --resume found nothing", "begins anew" in r.stderr.splitlines()[0], r.stderr)
    broken = f"{folder}/whole/adapter_config.json"
    for change, words in [({"peft_type": "LOHA"}, "peft_type: expected LORA"), ({"use_dora": True}, "use_dora: expected false"),
                          ({"init_lora_weights": "pissa"}, "init_lora_weights: expected true")]:
        settings = json.loads(content(f"{folder}/cut/adapter_config.json"))
        write(broken, json.dumps({**settings, **change}))
        r = run("info", "--model", common[2], "--adapter", f"{folder}/whole")
        claim(f"adapter: {words}", r.returncode == 1 and words in r.stderr, r.stderr)
    r = run("info", "--model", "tests/golden/mamba2-hf", "--adapter", f"{folder}/cut")
    claim("adapter: of another model", r.returncode == 1 and "wrong adapter" in r.stderr, r.stderr)
    r = run("info", "--model", common[2], "--adapter", f"{folder}/none")
    claim("adapter: of no folder", r.returncode == 1 and "none/adapter_config.json" in r.stderr, r.stderr)


def chats(folder):
    """Conversations are made texts by the model's own template; only what the assistant says is learned."""
    model = f"{folder}/model"
    shutil.copytree("weights/stories", model)
    template = ("{% for message in messages %}{{ '<' + message['role'] + '> ' + message['content'] + eos_token + '\\n' }}{% endfor %}"
                "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}")
    tokens = {"eos_token": "<|endoftext|>", "bos_token": {"content": "<|endoftext|>"}}
    write(f"{model}/tokenizer_config.json", json.dumps({**tokens, "chat_template": template}))
    said = [("user", "Hello"), ("assistant", "Hi!"), ("user", "Who are you?"), ("assistant", "A cat.")]
    write(f"{folder}/chat.jsonl", json.dumps({"messages": [{"role": r, "content": c} for r, c in said]}) + "\n")
    begin = "<user> Hello<|endoftext|>\n<assistant> "
    write(f"{folder}/same.jsonl", "".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in [
        (begin, "Hi!"), (begin + "Hi!<|endoftext|>\n<user> Who are you?<|endoftext|>\n<assistant> ", "A cat.")]))
    common = ["train", "--model", model, "--batch", 2, "--steps", 2]
    logs = []
    for name in ("chat", "same"):
        r = run(*common, "--data", f"{folder}/{name}.jsonl", "--out", f"{folder}/{name}", "--log", f"{folder}/{name}.csv")
        claim(f"train: {name}", r.returncode == 0, r.stderr)
        logs.append([line.split(",")[:4] for line in open(f"{folder}/{name}.csv")] if r.returncode == 0 else name)
    claim("train: a chat is learned as its prompts and answers", logs[0] == logs[1], logs)
    for template, words in [("{{ raise_exception('no') }}", "found 'raise_exception('"), ("{% macro f() %}{% endmacro %}", "'macro'")]:
        write(f"{model}/chat_template.jinja", template)
        r = run(*common, "--data", f"{folder}/chat.jsonl", "--out", f"{folder}/no")
        claim("train: another kind of template is refused by name", r.returncode == 1 and words in r.stderr and
              "chat_template.jinja" in r.stderr, r.stderr)


if __name__ == "__main__":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for test in (learns_induction, goes_on, carries_state, trains_hybrids, fine_tunes, says_what_is_learned, adapters_go_on, chats,
                 ends_in_one_line):
        with tempfile.TemporaryDirectory() as folder:
            test(folder)
    end(PROGRAM)

#!/usr/bin/env python3
"""Claims about `mamba_cuda train` on several GPUs: two do what one does with accumulation, and a rank that ends ends all.

Usage: test_ranks.py PROGRAM [--speed]    (standard library only; libnccl.so.2 where LD_LIBRARY_PATH finds it)

--speed times two GPUs against one, with the 130m shapes in bfloat16.
"""
import array
import csv
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time

import claims
from claims import claim, content

PROGRAM = os.path.abspath(sys.argv[1])
PROGRAM_NAME = "mamba_cuda: "  # begins the line that ends a run
TINY = {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 16, "state_size": 16, "expand": 2,
        "conv_kernel": 4, "time_step_rank": 2, "eos_token_id": None, "bos_token_id": None, "tie_word_embeddings": False}


def start(*arguments, **variables):
    return subprocess.Popen([PROGRAM, "train", *map(str, arguments)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env={**os.environ, **{k: str(v) for k, v in variables.items()}})


def end(process):
    process.stdout_text, process.stderr = process.communicate(timeout=600)
    return process


def run(*arguments, **variables):
    return end(start(*arguments, **variables))


def tensors(path):
    data = content(path)
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + size])
    return {name: array.array("f", data[8 + size + t["data_offsets"][0]:8 + size + t["data_offsets"][1]])
            for name, t in header.items() if name != "__metadata__"}


def distance(a, b):
    """The largest difference of a tensor, of the norm of that tensor."""
    a, b = tensors(a), tensors(b)
    norm = lambda x: math.sqrt(sum(v * v for v in x))
    return max(norm([x - y for x, y in zip(a[name], b[name])]) / (norm(a[name]) or 1) for name in a)


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as f:
        return list(map(int, f.read().split()))


def wait_until(condition, seconds=120):
    limit = time.time() + seconds
    while not condition() and time.time() < limit:
        time.sleep(0.02)


def launch(arguments, of_rank_1=()):
    """Rank 0 and rank 1 of two, as a launcher starts them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = "127.0.0.1:%d" % s.getsockname()[1]
    return [start(*arguments, *more, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, NCCL_COMM_ID=address)
            for rank, more in ((0, ()), (1, of_rank_1))]


def same_as_one(folder, common):
    """Twice two ranks, by --gpus and by a launcher's variables, against one that accumulates twice as much."""
    out = {name: f"{folder}/{name}" for name in ("one", "two", "again", "launched")}
    r = run(*common, "--accumulate", 4, "--out", out["one"])
    claim("train: one GPU", r.returncode == 0, r.stderr)
    for name in ("two", "again"):
        r = run(*common, "--accumulate", 2, "--gpus", 2, "--out", out[name], "--log", f"{out[name]}.csv")
        claim("train --gpus 2", r.returncode == 0 and " left" in r.stderr, r.stderr)
    for r in map(end, launch([*common, "--accumulate", 2, "--out", out["launched"]])):
        claim("train: as a launcher starts it", r.returncode == 0, r.stderr)
    file = "trainer.safetensors"
    far = distance(f"{out['one']}/{file}", f"{out['two']}/{file}")
    claim("train: two GPUs do what one does that accumulates", far < 1e-5, far)
    for name in ("again", "launched"):
        claim(f"train: two GPUs give the same bits again ({name})",
              tensors(f"{out['two']}/{file}") == tensors(f"{out[name]}/{file}"))
    claim("train: the log has a row for each step", len(list(csv.reader(open(f"{out['two']}.csv")))) == 1 + 4)
    print(f"two GPUs against one that accumulates: {far:.1e}")
    r = run(*common, "--accumulate", 2, "--out", out["two"], "--resume")
    claim("train: goes on with as many GPUs only", r.returncode == 1 and "gpus: expected 2" in r.stderr, r.stderr)


def ends_together(folder, common):
    """Whichever rank is killed, all end, and the run can go on to the bits of an undisturbed one."""
    common = [*common, "--gpus", 2, "--save-every", 2]
    whole, cut = f"{folder}/whole", f"{folder}/cut"
    begun = time.time()
    r = run(*common, "--out", whole)
    seconds = time.time() - begun
    claim("train --gpus 2: an undisturbed run", r.returncode == 0, r.stderr)
    moments = random.Random(1)
    for i in range(6):
        p = start(*common, "--out", cut, "--resume")
        wait_until(lambda: children(p.pid) or p.poll() is not None)
        other = children(p.pid)[0]
        time.sleep(moments.uniform(0, seconds / 2))
        os.kill(other if i % 2 == 0 else p.pid, signal.SIGKILL)
        end(p)
        wait_until(lambda: not os.path.exists(f"/proc/{other}"), 30)
        claim("train: both ranks end", not os.path.exists(f"/proc/{other}"))
        if i % 2 == 0:
            claim("train: a killed rank ends all, in one line",
                  p.returncode == 1 and "rank 1: it ended without a word" in p.stderr.splitlines()[-1], (p.returncode, p.stderr))
    p = launch([*common[:-4], "--save-every", 2, "--out", f"{folder}/launched"])
    wait_until(lambda: os.path.exists(f"{folder}/launched/trainer.safetensors"))
    p[0].kill()
    r = [end(each) for each in p][1]
    claim("train: rank 0 killed, rank 1 says so", r.returncode == 1 and r.stderr.count("rank 0: it ended") == 1, r.stderr)
    r = run(*common, "--out", cut, "--resume")
    claim("train --gpus 2: six times killed and gone on with", r.returncode == 0, r.stderr)
    for file in ("trainer.safetensors", "model.safetensors"):
        claim(f"train --gpus 2: the same bits of {file} as undisturbed", content(f"{whole}/{file}") == content(f"{cut}/{file}"))
    claim("train --gpus 2: nothing else is left", sorted(os.listdir(cut)) == sorted(os.listdir(whole)), os.listdir(cut))


def refuses(folder, common):
    def one_line(name, wanted, status, *arguments, **variables):
        r = run(*arguments, **variables)
        claim(f"train: {name}: one line", r.returncode == status and wanted in r.stderr and r.stderr.count(PROGRAM_NAME) == 1,
              (r.returncode, r.stderr))
    out = ["--out", f"{folder}/none"]
    one_line("bad data on all ranks", "line 1", 1, *common[:2], "--data", write(f"{folder}/bad.jsonl", "{\n"), *out, "--gpus", 2)
    one_line("carried states", "--carry-state", 2, *common[:2], "--data", common[3], "--carry-state", *out, "--gpus", 2)
    one_line("a loss that is no number", "finite", 1, *common, "--lr", "1e30", "--clip", 0, *out, "--gpus", 2)
    one_line("WORLD_SIZE alone", "NCCL_COMM_ID", 2, *common, *out, WORLD_SIZE=2, RANK=0, LOCAL_RANK=0)
    for rank, r in enumerate(map(end, launch([*common, *out], ["--seed", 2]))):
        claim("train: other options on another rank", r.returncode == 1 and ("same options" in r.stderr) == (rank == 0), r.stderr)
    claim("train: what was refused left no model", not os.path.exists(f"{folder}/none/model.safetensors"))


def write(path, text):
    with open(path, "w") as f:
        f.write(text)
    return path


def fine_tunes(folder, common):
    """Adapters and preferences, too, learn the same from two ranks."""
    base = f"{folder}/base"
    claim("train: a base", run(*common, "--out", base).returncode == 0)
    pairs = write(f"{folder}/pairs.jsonl", "".join(json.dumps(
        {"prompt": [i % 13, 3, i % 7], "chosen": [i % 5, 1], "rejected": [2, i % 11, 4]}) + "\n" for i in range(40)))
    options = ["--model", base, "--data", pairs, "--steps", 3, "--batch", 2, "--dpo", 0.1, "--lora", 4, "--lr", "1e-2", "--eps", "1e-5"]
    for name, more in (("one", ["--accumulate", 2]), ("two", ["--gpus", 2])):
        r = run(*options, *more, "--out", f"{folder}/{name}")
        claim("train: adapters and preferences", r.returncode == 0, r.stderr)
    far = distance(f"{folder}/one/trainer.safetensors", f"{folder}/two/trainer.safetensors")
    claim("train: adapters and preferences on two GPUs", far < 1e-5, far)


def speed(folder):
    for shape in ("130m", "mamba2-130m"):
        ids = write_ids(f"{folder}/ids.safetensors", 160, 8, 2048, 50277)
        rates = {}
        for gpus in (1, 2):
            log = f"{folder}/{shape}.{gpus}.csv"
            r = run("--shape", shape, "--data", ids, "--out", f"{folder}/{shape}.{gpus}", "--steps", 40, "--accumulate", 2,
                    "--dtype", "bf16", "--gpus", gpus, "--log", log)
            claim(f"train: {shape} on {gpus}", r.returncode == 0, r.stderr)
            rates[gpus] = float(list(csv.DictReader(open(log)))[-1]["tokens_per_s"])
        print(f"{shape}: {rates[1]:.0f} tokens/s on one GPU, {rates[2]:.0f} on two: {rates[2] / rates[1]:.2f} times")


def write_ids(path, steps, batch, length, vocab_size):
    numbers = random.Random(1)
    ids = array.array("q", (numbers.randrange(vocab_size) for _ in range(steps * batch * (length + 1))))
    header = json.dumps({"ids": {"dtype": "I64", "shape": [steps, batch, length + 1],
                                 "data_offsets": [0, 8 * len(ids)]}}).encode()
    with open(path, "wb") as f:
        f.write(len(header).to_bytes(8, "little") + header + ids.tobytes())
    return path


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as root:
        config = write(f"{root}/config.json", json.dumps(TINY))
        common = ["--config", config, "--data", write_ids(f"{root}/ids.safetensors", 40, 2, 12, 16), "--steps", 4,
                  "--eps", "1e-5"]
        for check in (same_as_one, ends_together, refuses, fine_tunes):
            folder = f"{root}/{check.__name__}"
            os.mkdir(folder)
            begun = time.time()
            check(folder, common)
            print(f"{check.__name__}: {time.time() - begun:.0f} s", flush=True)
        if sys.argv[2:] == ["--speed"]:
            speed(root)
    claims.end("ranks")

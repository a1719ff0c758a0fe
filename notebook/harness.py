#!/usr/bin/env python3
"""EleutherAI's lm-evaluation-harness over this project's programs. Its command line, with a model class "mamba" more:

    pip install lm_eval
    python3 notebook/harness.py --model mamba --model_args model=weights/stories,program=./mamba --tasks lambada_openai

model_args: model (a folder), program (./mamba_cuda on a GPU), flags (more for it: "--adapter DIR --dtype bf16").
"""
import json
import subprocess

import lm_eval.models  # its own classes stay known
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model


@register_model("mamba")
class Mamba(LM):
    def __init__(self, model="weights/stories", program="./mamba", flags="", **_):
        super().__init__()
        self.command = lambda name, *more: [program, name, "--model", model, *str(flags).split(), *map(str, more)]

    def lines(self, command, lines):
        """One answer for each of these, by one run of the program: it keeps its batches full."""
        text = "".join(json.dumps(line) + "\n" for line in lines)
        done = subprocess.run(command, input=text, stdout=subprocess.PIPE, text=True, check=True) if lines else None
        return [json.loads(line) for line in done.stdout.splitlines()] if lines else []

    def score(self, pairs):
        requests = [{"context": context, "continuation": continuation} for context, continuation in pairs]
        return self.lines(self.command("score", "--requests", "-"), requests)

    def loglikelihood(self, requests):
        return [(a["logprob"], a["greedy"]) for a in self.score([r.args for r in requests])]

    def loglikelihood_rolling(self, requests):
        return [a["logprob"] for a in self.score([("", r.args[0]) for r in requests])]

    def generate_until(self, requests):
        texts, groups = {}, {}
        for i, (context, how) in enumerate(r.args for r in requests):
            warm = how.get("temperature", 0) if how.get("do_sample", how.get("temperature", 0) > 0) else 0
            groups.setdefault((how.get("max_gen_toks", 256), warm, how.get("top_p", 1)), []).append((i, context, how))
        for (n, warm, top_p), group in groups.items():
            command = self.command("generate", "--json", "--prompt-file", "-", "-n", n, "--temperature", warm, "--top-p", top_p)
            for (i, _, how), text in zip(group, self.lines(command, [context for _, context, _ in group])):
                until = how.get("until") or []
                for stop in [until] if isinstance(until, str) else until:
                    text = text.split(stop)[0] if stop else text
                texts[i] = text
        return [texts[i] for i in range(len(requests))]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate
    cli_evaluate()

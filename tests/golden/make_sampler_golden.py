#!/usr/bin/env python3
"""Makes sampler.json: logits, options and the filtered distribution that transformers gives.

    pip install torch transformers && python3 tests/golden/make_sampler_golden.py

transformers itself puts the processors in order (GenerationMixin._get_logits_processor). They
run in float64 on float32 logits and options, so that no case hangs on float32 rounding, and
with a stable sort: torch.sort alone leaves it open which of equals top-p drops first.
"""

import functools
import json
import pathlib

import numpy as np
import torch
import transformers
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig

torch.sort = functools.partial(torch.sort, stable=True)

NEUTRAL = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)
OPTIONS = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 1000},
    {"top_p": 0.01},
    {"top_p": 0.5},
    {"top_p": 0.9},
    {"min_p": 0.05},
    {"min_p": 0.5},
    {"min_p": 1.0},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7},
    {"temperature": 0.7, "top_p": 0.8},
    {"top_k": 6, "top_p": 0.8},
    {"top_p": 0.7, "min_p": 0.2},
    {"temperature": 0.6, "top_k": 7, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2},
    {"temperature": 1.7, "top_k": 12, "top_p": 0.85, "min_p": 0.1, "repetition_penalty": 2.0},
]


class Generator(GenerationMixin):
    """As much of a model as _get_logits_processor asks for."""

    config = PretrainedConfig()
    device = torch.device("cpu")


def filtered(logits, history, options):
    config = GenerationConfig(do_sample=True, **options)
    processors = Generator()._get_logits_processor(
        config, input_ids_seq_length=len(history), device="cpu"
    )
    scores = torch.tensor(logits, dtype=torch.float64)[None]
    scores = processors(torch.tensor([history], dtype=torch.int64), scores)
    return scores.softmax(dim=-1)[0].tolist()


def main():
    rng = np.random.default_rng(7)
    masked = np.where(rng.random(9) < 0.4, -np.inf, rng.normal(0, 2, 9))
    rows = {
        "normal, deviation 2": rng.normal(0, 2, 23),
        "normal, deviation 6": rng.normal(0, 6, 16),
        "whole numbers, with ties": rng.integers(-3, 4, 20),
        "all equal": np.full(11, 0.25),
        "some at -inf": masked,
    }
    cases = []
    for name, row in rows.items():
        logits = row.astype(np.float32)
        history = rng.integers(0, len(row), 6).tolist()
        history.append(history[0])  # an id twice is penalized once
        for changed in OPTIONS:
            options = {**NEUTRAL, **changed}
            options = {k: v if k == "top_k" else float(np.float32(v)) for k, v in options.items()}
            cases.append(
                dict(
                    name=f"{name}: {changed}",
                    logits=[None if v == -np.inf else float(v) for v in logits],  # null: -inf
                    history=history,
                    options=options,
                    probabilities=filtered(logits.tolist(), history, options),
                )
            )
    head = f"transformers {transformers.__version__}, torch {torch.__version__}"
    body = ",\n".join(json.dumps(case) for case in cases)
    path = pathlib.Path(__file__).with_name("sampler.json")
    path.write_text(f'{{"made_by": "{head}", "cases": [\n{body}\n]}}\n')


main()

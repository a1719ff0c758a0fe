#!/usr/bin/env python3
"""Make finetune/: adapters as PEFT writes them, what transformers makes of them, and ten steps of SFT and of DPO by torch.

    pip install torch transformers peft safetensors numpy
    python3 tests/golden/make_finetune_golden.py

Of each model beside this file: an adapter with B that is not zero (PEFT), the logits of model and adapter, and the same ten
steps from that adapter learning answers (mean over their tokens) and preferences (the loss of TRL's DPOTrainer, the base
without its adapter as reference): AdamW lr 3e-3, betas 0.9 and 0.95, eps 1e-8, decay 0.1, clipped to norm 1.
"""
import copy
import os
import shutil

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

HERE = os.path.dirname(os.path.abspath(__file__))
STEPS, ROWS, LENGTH, FIRST, BETA = 10, 4, 25, 9, 0.3
TARGETS = {"mamba1-hf": ["in_proj", "x_proj", "embeddings"], "mamba2-hf": ["in_proj"]}


def logprobs(model, ids):
    """log p of the answer of each row: ids FIRST to the end."""
    p = F.log_softmax(model(ids[:, :-1]).logits, -1)
    return p.gather(-1, ids[:, 1:, None])[:, FIRST - 1:, 0].sum(-1)


def sft(model, ids):
    return {"loss": -logprobs(model, ids).mean() / (LENGTH - FIRST)}


def dpo(model, ids):
    """Rows are chosen and rejected by turns; trl/trainer/dpo_trainer.py, loss_type sigmoid."""
    with torch.no_grad(), model.disable_adapter():
        reference = logprobs(model, ids)
    rewards = BETA * (logprobs(model, ids) - reference)
    margins = rewards[0::2] - rewards[1::2]
    return {"loss": -F.logsigmoid(margins).mean(), "margin": margins.mean(), "accuracy": (margins > 0).double().mean()}


def run(start, objective, batches):
    model = copy.deepcopy(start)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    rows = []
    for ids in batches:
        values = objective(model, ids)
        optimizer.zero_grad()
        values["loss"].backward()
        values["norm"] = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        rows.append(torch.stack([v.detach().double() for v in values.values()]))
    return torch.stack(rows)


for name, targets in TARGETS.items():
    torch.manual_seed(18)
    base = AutoModelForCausalLM.from_pretrained(os.path.join(HERE, name), dtype=torch.float32)
    folder = os.path.join(HERE, "finetune", name.replace("-hf", ""))
    shutil.rmtree(folder, ignore_errors=True)
    start = get_peft_model(base, LoraConfig(r=4, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM"))
    for key, p in start.named_parameters():
        if "lora_" in key:
            p.data = torch.randn_like(p) * (0.02 if "lora_B" in key or "embedding_A" in key else 0.3)
    start.peft_config["default"].base_model_name_or_path = name
    start.save_pretrained(folder)
    os.remove(os.path.join(folder, "README.md"))
    vocabulary = base.config.vocab_size
    ids = torch.randint(0, vocabulary, (STEPS, ROWS, LENGTH))
    start = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(os.path.join(HERE, name)).double(), folder,
                                      is_trainable=True).double()
    with torch.no_grad():
        logits = start(ids[0, :1]).logits[0].float()
    save_file({"ids": ids.int(), "logits": logits, "sft": run(start, sft, ids), "dpo": run(start, dpo, ids)},
              os.path.join(folder, "expected.safetensors"))
    print(name, run(start, dpo, ids)[-1], sorted(os.listdir(folder)))

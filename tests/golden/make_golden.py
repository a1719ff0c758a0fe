#!/usr/bin/env python3
"""Make the golden data in this folder: small inputs and their float64 answers.

    pip install torch numpy safetensors transformers tokenizers
    python3 tests/golden/make_golden.py                 make every file anew, in place
    python3 tests/golden/make_golden.py --out DIR       the same, somewhere else
    python3 tests/golden/make_golden.py --check DIR...  recompute folders, write nothing

The answers come from the recurrences below: one Python loop over time each, in float64,
differentiated by torch. They share nothing with the C++ they judge. Sources:

  [1] Gu, Dao. Mamba: Linear-Time Sequence Modeling with Selective State Spaces. 2023.
  [2] Dao, Gu. Transformers are SSMs (Mamba-2). 2024.
  [3] Vaswani et al. Attention Is All You Need. 2017.
  [4] Su et al. RoFormer. 2021.

Every run compares the model code with Hugging Face transformers (its plain PyTorch path).
"""

import argparse
import collections
import json
import os
import sys

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save

HERE = os.path.dirname(os.path.abspath(__file__))
STORIES = os.path.join(HERE, "..", "..", "weights", "stories")
PROMPTS = [
    "Once upon a time",
    "The little dog was sad because",
    "Lily found a shiny",
    "One day, a boy named Tom",
    '"I don\'t want to," said the cat.',
]

# ---------------------------------------------------------------- the two operators


def softplus(x):
    """log(1 + e^x), exact for every x: no threshold."""
    return torch.logaddexp(x, torch.zeros_like(x))


def silu(x):
    return x * torch.sigmoid(x)


def selective_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, h0=None,
                   delta_softplus=False):
    """[1] Algorithm 2, A by zero-order hold, B by Euler. Returns out (batch, d, L) and h_T.

    u, delta, z (batch, d, L); A (d, N); B, C (batch, groups, N, L); D, delta_bias (d);
    h0 (batch, d, N). Channels d*g/groups to d*(g+1)/groups - 1 share B and C of group g.
    """
    batch, d, L = u.shape
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = softplus(delta)
    B, C = (m.repeat_interleave(d // m.shape[1], dim=1) for m in (B, C))
    h = u.new_zeros(batch, d, A.shape[1]) if h0 is None else h0
    y = []
    for t in range(L):
        decay = torch.exp(delta[:, :, t, None] * A)
        h = decay * h + (delta[:, :, t] * u[:, :, t])[..., None] * B[..., t]
        y.append((h * C[..., t]).sum(-1))
    out = torch.stack(y, -1)
    if D is not None:
        out = out + D[:, None] * u
    if z is not None:
        out = out * silu(z)
    return out, h


def ssd(x, dt, A, B, C, D=None, dt_bias=None, h0=None):
    """[2] section 6 as a recurrence. Returns out (batch, L, H, P) and h_T.

    x (batch, L, H, P); dt (batch, L, H) before softplus; A, D, dt_bias (H);
    B, C (batch, L, G, N); h0 (batch, H, P, N). Heads share B and C as channels do above.
    """
    batch, L, H, P = x.shape
    delta = softplus(dt if dt_bias is None else dt + dt_bias)
    B, C = (m.repeat_interleave(H // m.shape[2], dim=2) for m in (B, C))
    h = x.new_zeros(batch, H, P, B.shape[-1]) if h0 is None else h0
    y = []
    for t in range(L):
        decay = torch.exp(delta[:, t] * A)[..., None, None]
        h = decay * h + (delta[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None, :]
        y.append((h * C[:, t, :, None, :]).sum(-1))
    out = torch.stack(y, 1)
    return (out if D is None else out + D[:, None] * x), h


# ---------------------------------------------------------------- the models


def rms_norm(x, weight, eps=1e-5):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def gated_norm(y, z, weight, groups):
    """norm(y * silu(z)), each group of channels by its own mean square, as trained."""
    x = (y * silu(z)).unflatten(-1, (groups, -1))
    return rms_norm(x, weight.unflatten(-1, (groups, -1))).flatten(-2)


def causal_conv(x, weight, bias):
    """x (batch, L, d), weight (d, 1, width): y_t = bias + sum_k weight_k x_{t-width+1+k}."""
    width, L = weight.shape[-1], x.shape[1]
    x = F.pad(x, (0, 0, width - 1, 0))
    return bias + sum(x[:, k : k + L] * weight[:, 0, k] for k in range(width))


def linear(x, w, name):
    bias = w.get(name + ".bias")
    x = x @ w[name + ".weight"].T
    return x if bias is None else x + bias


def mamba1_mixer(x, w):
    """[1] Figure 3."""
    N, dt_rank = w["A_log"].shape[1], w["dt_proj.weight"].shape[1]
    x, z = linear(x, w, "in_proj").chunk(2, -1)
    x = silu(causal_conv(x, w["conv1d.weight"], w["conv1d.bias"]))
    dt, B, C = linear(x, w, "x_proj").split([dt_rank, N, N], -1)
    by_channel = [m.mT for m in (x, dt @ w["dt_proj.weight"].T)]
    y, _ = selective_scan(*by_channel, -torch.exp(w["A_log"]), B.mT[:, None], C.mT[:, None],
                          w["D"], z.mT, w["dt_proj.bias"], delta_softplus=True)
    return linear(y.mT, w, "out_proj")


def mamba2_mixer(x, w, groups):
    """[2] Figure 6, with the gated norm before out_proj."""
    d_inner, H = w["norm.weight"].shape[0], w["A_log"].shape[0]
    N = (w["conv1d.bias"].shape[0] - d_inner) // (2 * groups)
    z, xBC, dt = linear(x, w, "in_proj").split([d_inner, d_inner + 2 * groups * N, H], -1)
    xBC = silu(causal_conv(xBC, w["conv1d.weight"], w["conv1d.bias"]))
    x, B, C = xBC.split([d_inner, groups * N, groups * N], -1)
    B, C = (m.unflatten(-1, (groups, N)) for m in (B, C))
    x, A = x.unflatten(-1, (H, -1)), -torch.exp(w["A_log"])
    y, _ = ssd(x, dt, A, B, C, w["D"], w["dt_bias"])
    return linear(gated_norm(y.flatten(-2), z, w["norm.weight"], groups), w, "out_proj")


def layer_norm(x, weight, bias, eps=1e-5):
    x = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight + bias


def rotary(x, dim, base):
    """[4], the first dim numbers of each head as complex numbers. x (batch, L, heads, P)."""
    t, i = torch.arange(x.shape[1]).double(), torch.arange(0, dim, 2).double()
    turn = torch.polar(torch.ones(1).double(), t[:, None] * base ** (-i / dim))[:, None]
    turned = torch.complex(*x[..., :dim].chunk(2, -1)) * turn
    return torch.cat([turned.real, turned.imag, x[..., dim:]], -1)


def attention_mixer(x, w, cfg):
    """[3] section 3.2, with a convolution over q, k and v if there is one, and rotary position."""
    H, P = cfg["num_heads"], cfg["head_dim"]
    G = cfg.get("num_heads_kv", H)
    qkv = linear(x, w, "in_proj")
    if "conv1d.weight" in w:
        qkv = causal_conv(qkv, w["conv1d.weight"], w["conv1d.bias"])
    q, k, v = qkv.unflatten(-1, (H + 2 * G, P)).split([H, G, G], -2)
    dim, base = cfg.get("rotary_emb_dim", 0), cfg.get("rotary_emb_base", 10000.0)
    q, k = rotary(q, dim, base), rotary(k, dim, base)
    k, v = (m.repeat_interleave(H // G, -2) for m in (k, v))
    scores = torch.einsum("bthp,bshp->bhts", q, k) / P**0.5
    later = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
    p = scores.masked_fill(later, -torch.inf).softmax(-1)
    return linear(torch.einsum("bhts,bshp->bthp", p, v).flatten(-2), w, "out_proj")


def gated_mlp(x, w):
    x, gate = linear(x, w, "fc1").chunk(2, -1)
    return linear(x * silu(gate), w, "fc2")


class Model:
    """A checkpoint of either generation in either layout, in float64; also hybrids."""

    def __init__(self, config, tensors):
        names = [n.replace("backbone.", "").replace("embedding.", "embeddings.") for n in tensors]
        self.w = {name: tensor.double() for name, tensor in zip(names, tensors.values())}
        self.vocab_size = config["vocab_size"]
        self.groups = config.get("n_groups") or config.get("ssm_cfg", {}).get("ngroups", 1)
        self.n_layer = config.get("n_layer") or config["num_hidden_layers"]
        self.attn_cfg = config.get("attn_cfg")

    def norm(self, x, name):
        weight, bias = self.w[name + ".weight"], self.w.get(name + ".bias")
        return rms_norm(x, weight) if bias is None else layer_norm(x, weight, bias)

    def part(self, prefix):
        return {k[len(prefix) :]: v for k, v in self.w.items() if k.startswith(prefix)}

    def mixer(self, x, w):
        if "A_log" not in w:
            return attention_mixer(x, w, self.attn_cfg)
        return mamba2_mixer(x, w, self.groups) if "dt_bias" in w else mamba1_mixer(x, w)

    def logits(self, ids):
        """ids (batch, L) to (batch, L, vocab_size), without the rows that pad the vocabulary."""
        w = self.w
        x = w["embeddings.weight"][ids]
        for layer in range(self.n_layer):
            name = f"layers.{layer}."
            x = x + self.mixer(self.norm(x, name + "norm"), self.part(name + "mixer."))
            if mlp := self.part(name + "mlp."):
                x = x + gated_mlp(self.norm(x, name + "norm2"), mlp)
        head = w.get("lm_head.weight", w["embeddings.weight"])
        return self.norm(x, "norm_f") @ head[: self.vocab_size].T

    def nll(self, ids):
        """-log p(ids[:, t+1] | ids[:, :t+1]), (batch, L - 1)."""
        log_p = self.logits(ids[:, :-1]).log_softmax(-1)
        return -log_p.gather(-1, ids[:, 1:, None])[..., 0]

    def greedy(self, ids, n):
        """ids followed by n most likely ids, and by how much each beat the second."""
        margins = []
        for _ in range(n):
            best = self.logits(ids[None])[0, -1].topk(2)
            margins.append(best.values[0] - best.values[1])
            ids = torch.cat([ids, best.indices[:1]])
        return ids, torch.stack(margins)


def read_model(folder):
    with open(os.path.join(folder, "config.json")) as file:
        config = json.load(file)
    path = os.path.join(folder, "model.safetensors")
    if os.path.exists(path):
        return Model(config, load_file(path))
    path = os.path.join(folder, "pytorch_model.bin")
    return Model(config, torch.load(path, weights_only=True))


def save_file(tensors, path, metadata):
    """The same bytes on every run: the library writes metadata in any order."""
    data = save(tensors, metadata)
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + data[end:])


# ---------------------------------------------------------------- random inputs


class Random:
    """RandomState: the one numpy generator whose numbers are promised never to change."""

    def __init__(self, seed):
        self.state = np.random.RandomState(seed)

    def normal(self, *shape, scale=1.0, mean=0.0):
        return torch.from_numpy(mean + scale * self.state.standard_normal(shape)).float()

    def log_uniform(self, low, high, *shape):
        exponent = self.state.uniform(np.log(low), np.log(high), shape)
        return torch.from_numpy(np.exp(exponent)).float()

    def ids(self, high, *shape):
        return torch.from_numpy(self.state.randint(0, high, shape)).long()


def inverse_softplus(x):
    return x + torch.log(-torch.expm1(-x))


def scan_inputs(rng, batch, d, N, L, groups=1, options=("D", "z", "delta_bias", "h0"),
                delta_scale=1.0, A_high=16.0):
    """delta is raw where there is a bias; where there is none it is positive, for no softplus."""
    raw = "delta_bias" in options
    given = {
        "u": rng.normal(batch, d, L),
        "delta": rng.normal(batch, d, L, scale=delta_scale),
        "A": -rng.log_uniform(0.5, A_high, d, N),
        "B": rng.normal(batch, groups, N, L),
        "C": rng.normal(batch, groups, N, L),
        "D": rng.normal(d),
        "z": rng.normal(batch, d, L),
        "delta_bias": inverse_softplus(rng.log_uniform(0.02, 0.5, d)),
        "h0": rng.normal(batch, d, N),
        "dout": rng.normal(batch, d, L),
        "dhT": rng.normal(batch, d, N),
    }
    if not raw:
        given["delta"] = given["delta"].abs() * 0.1
    keep = ("u", "delta", "A", "B", "C", "dout", "dhT", *options)
    return {name: given[name] for name in given if name in keep}


def ssd_inputs(rng, batch, L, H, P, groups, N, options=("D", "dt_bias", "h0")):
    given = {
        "x": rng.normal(batch, L, H, P),
        "dt": rng.normal(batch, L, H),
        "A": -rng.log_uniform(0.5, 16.0, H),
        "B": rng.normal(batch, L, groups, N),
        "C": rng.normal(batch, L, groups, N),
        "D": rng.normal(H),
        "dt_bias": inverse_softplus(rng.log_uniform(0.02, 0.5, H)),
        "h0": rng.normal(batch, H, P, N),
        "dout": rng.normal(batch, L, H, P),
        "dhT": rng.normal(batch, H, P, N),
    }
    keep = ("x", "dt", "A", "B", "C", "dout", "dhT", *options)
    return {name: given[name] for name in given if name in keep}


NO_H0 = ("D", "z", "delta_bias")
SCANS = {  # "full" leaves 3 over from two blocks of 32; "extreme": delta A reaches -10^3
    "full": dict(batch=2, d=6, N=8, L=67),
    "groups": dict(batch=2, d=6, N=4, L=33, groups=3),
    "noh0": dict(batch=3, d=5, N=4, L=31, options=NO_H0),
    "plain": dict(batch=1, d=4, N=3, L=7, options=()),
    "extreme": dict(batch=1, d=4, N=8, L=40, delta_scale=40.0, A_high=100.0),
    "one": dict(batch=1, d=3, N=2, L=1),
}
SSDS = {
    "full": dict(batch=2, L=37, H=4, P=6, groups=2, N=8),
    "ragged": dict(batch=1, L=67, H=3, P=5, groups=1, N=8, options=("D", "dt_bias")),
    "groups": dict(batch=1, L=33, H=6, P=3, groups=2, N=5, options=("D", "dt_bias")),
    "one": dict(batch=1, L=1, H=2, P=3, groups=1, N=4),
}
UPSTREAM = ("dout", "dhT")  # gradients of a loss with respect to the two results


def scan_answers(kind, given, delta_softplus):
    """out, hT, and d + the name of every input: gradients of sum(out dout) + sum(hT dhT)."""
    inputs = {k: v.double().requires_grad_() for k, v in given.items() if k not in UPSTREAM}
    if kind == "ssd":
        out, hT = ssd(**inputs)
    else:
        out, hT = selective_scan(**inputs, delta_softplus=delta_softplus)
    upstream = [given[name].double() for name in UPSTREAM]
    grads = torch.autograd.grad([out, hT], list(inputs.values()), upstream)
    return {"out": out, "hT": hT, **{"d" + k: g for k, g in zip(inputs, grads)}}


def make_scan(path, kind, given, metadata):
    answers = scan_answers(kind, given, metadata.get("softplus") == "1")
    assert all(torch.isfinite(a).all() for a in answers.values()), path
    answers = {k: a.detach().contiguous() for k, a in answers.items()}
    save_file({**given, **answers}, path, {"kind": kind, "truth": "float64", **metadata})


# ---------------------------------------------------------------- random models

D_MODEL, N_LAYER, D_CONV, D_STATE, D_INNER = 32, 3, 4, 16, 64
VOCAB, VOCAB_PADDED = 131, 136
HEAD_DIM, DT_RANK = 8, 5
HF = {  # what both generations write in config.json
    "bos_token_id": 0, "conv_kernel": D_CONV, "eos_token_id": 0, "expand": 2,
    "hidden_act": "silu", "hidden_size": D_MODEL, "layer_norm_epsilon": 1e-5,
    "num_hidden_layers": N_LAYER, "pad_token_id": 0, "residual_in_fp32": True,
    "state_size": D_STATE, "tie_word_embeddings": True, "use_bias": False,
    "use_conv_bias": True, "vocab_size": VOCAB,
}
ORIGINAL = {
    "d_model": D_MODEL, "n_layer": N_LAYER, "vocab_size": VOCAB, "rms_norm": True,
    "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8,
}


def mamba1_weights(rng, use_bias):
    yield "in_proj.weight", rng.normal(2 * D_INNER, D_MODEL, scale=D_MODEL**-0.5)
    yield "conv1d.weight", rng.normal(D_INNER, 1, D_CONV, scale=0.5)
    yield "conv1d.bias", rng.normal(D_INNER, scale=0.2)
    yield "x_proj.weight", rng.normal(DT_RANK + 2 * D_STATE, D_INNER, scale=D_INNER**-0.5)
    yield "dt_proj.weight", rng.normal(D_INNER, DT_RANK, scale=DT_RANK**-0.5)
    yield "dt_proj.bias", inverse_softplus(rng.log_uniform(0.01, 0.5, D_INNER))
    yield "A_log", rng.log_uniform(0.5, 16.0, D_INNER, D_STATE).log()
    yield "D", rng.normal(D_INNER, mean=1.0, scale=0.3)
    yield "out_proj.weight", rng.normal(D_MODEL, D_INNER, scale=2 * D_INNER**-0.5)
    if use_bias:
        yield "in_proj.bias", rng.normal(2 * D_INNER, scale=0.3)
        yield "out_proj.bias", rng.normal(D_MODEL, scale=0.3)


def mamba2_weights(rng, groups):
    H, conv_dim = D_INNER // HEAD_DIM, D_INNER + 2 * groups * D_STATE
    yield "in_proj.weight", rng.normal(D_INNER + conv_dim + H, D_MODEL, scale=D_MODEL**-0.5)
    yield "conv1d.weight", rng.normal(conv_dim, 1, D_CONV, scale=0.5)
    yield "conv1d.bias", rng.normal(conv_dim, scale=0.2)
    yield "dt_bias", inverse_softplus(rng.log_uniform(0.01, 0.5, H))
    yield "A_log", rng.log_uniform(0.5, 16.0, H).log()
    yield "D", rng.normal(H, mean=1.0, scale=0.3)
    yield "norm.weight", rng.normal(D_INNER, mean=1.0, scale=0.3)
    yield "out_proj.weight", rng.normal(D_MODEL, D_INNER, scale=2 * D_INNER**-0.5)


def attention_weights(rng, cfg):
    q, kv = (cfg[n] * cfg["head_dim"] for n in ("num_heads", "num_heads_kv"))
    yield "in_proj.weight", rng.normal(q + 2 * kv, D_MODEL, scale=D_MODEL**-0.5)
    yield "out_proj.weight", rng.normal(D_MODEL, q, scale=2 * q**-0.5)
    if cfg.get("qkv_proj_bias", True):
        yield "in_proj.bias", rng.normal(q + 2 * kv, scale=0.3)
    if cfg.get("out_proj_bias", True):
        yield "out_proj.bias", rng.normal(D_MODEL, scale=0.3)
    if cfg.get("d_conv"):
        yield "conv1d.weight", rng.normal(q + 2 * kv, 1, cfg["d_conv"], scale=0.5)
        yield "conv1d.bias", rng.normal(q + 2 * kv, scale=0.2)


def hybrid_weights(rng, config, scan):
    """The others by random_weights; here, as layer numbers come, scan or attention, then MLPs."""
    w = random_weights(rng, lambda r: ())
    norms = ["norm"] + ["norm2"] * (config["d_intermediate"] > 0)
    width = -(-config["d_intermediate"] // 128) * 128
    for layer in range(N_LAYER):
        name = f"backbone.layers.{layer}."
        attends = layer in config["attn_layer_idx"]
        mixer = attention_weights(rng, config["attn_cfg"]) if attends else scan(rng)
        w.update((name + "mixer." + part, tensor) for part, tensor in mixer)
        for norm in norms:
            w[f"{name}{norm}.weight"] = rng.normal(D_MODEL, mean=1.0, scale=0.3)
            if not config["rms_norm"]:
                w[f"{name}{norm}.bias"] = rng.normal(D_MODEL, scale=0.3)
        if width:
            w[name + "mlp.fc1.weight"] = rng.normal(2 * width, D_MODEL, scale=D_MODEL**-0.5)
            w[name + "mlp.fc2.weight"] = rng.normal(D_MODEL, width, scale=2 * width**-0.5)
    if not config["rms_norm"]:
        w["backbone.norm_f.bias"] = rng.normal(D_MODEL, scale=0.3)
    return w


def random_weights(rng, mixer, untied=False):
    """Hugging Face names, vocabulary padded. Padding rows are large: a reader that forgets
    to cut them off picks them."""
    def table():
        rows = rng.normal(VOCAB_PADDED, D_MODEL, scale=0.5)
        rows[VOCAB:] *= 8
        return rows

    w = {"backbone.embeddings.weight": table()}
    for layer in range(N_LAYER):
        prefix = f"backbone.layers.{layer}."
        w[prefix + "norm.weight"] = rng.normal(D_MODEL, mean=1.0, scale=0.3)
        w.update((prefix + "mixer." + name, tensor) for name, tensor in mixer(rng))
    w["backbone.norm_f.weight"] = rng.normal(D_MODEL, mean=1.0, scale=0.3)
    if untied:
        w["lm_head.weight"] = table()
    return w


def write_json(folder, config):
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump(config, file, indent=2)
        file.write("\n")


def make_expected(folder, ids):
    model = read_model(folder)
    greedy, margin = model.greedy(ids[0, :9], 24)
    assert margin.min() > 1e-3, f"{folder}: margin {margin.min()}: choose another seed"
    assert 0 not in greedy[9:], f"{folder}: id 0 ends a text: choose another seed"
    save_file({"ids": ids.int(), "logits": model.logits(ids).float(),
               "nll": model.nll(ids).float(), "greedy": greedy.int(),
               "greedy_margin": margin.float()},
              os.path.join(folder, "expected.safetensors"),
              {"truth": "float64", "greedy": "from the first 9 ids of row 0"})


def make_hf(folder, config, w, ids):
    cut = ("backbone.embeddings.weight", "lm_head.weight")
    w = {k: v[:VOCAB].clone() if k in cut else v for k, v in w.items()}
    write_json(folder, config)
    save_file(w, os.path.join(folder, "model.safetensors"), {"format": "pt"})
    make_expected(folder, ids)


def make_original(folder, config, w, ids):
    """As torch saves a module's state_dict: OrderedDict, version notes, head tied."""
    state = collections.OrderedDict()
    for name, tensor in w.items():
        state[name.replace("embeddings.", "embedding.")] = tensor
    state["lm_head.weight"] = state["backbone.embedding.weight"]
    state._metadata = collections.OrderedDict({"": {"version": 1}, "backbone": {"version": 1}})
    write_json(folder, config)
    torch.save(state, os.path.join(folder, "pytorch_model.bin"))
    make_expected(folder, ids)


def make_models(out):
    rng = Random(11)
    w = random_weights(rng, lambda r: mamba1_weights(r, use_bias=False))
    ids = rng.ids(VOCAB, 2, 45)
    hf1 = {"architectures": ["MambaForCausalLM"], "model_type": "mamba",
           "intermediate_size": D_INNER, "time_step_rank": DT_RANK, **HF}
    make_hf(os.path.join(out, "mamba1-hf"), hf1, w, ids)
    make_original(os.path.join(out, "mamba1-original"),
                  {**ORIGINAL, "ssm_cfg": {"dt_rank": DT_RANK}}, w, ids)

    rng = Random(12)
    w = random_weights(rng, lambda r: mamba2_weights(r, groups=2))
    ids = rng.ids(VOCAB, 2, 45)
    hf2 = {"architectures": ["Mamba2ForCausalLM"], "model_type": "mamba2", "chunk_size": 16,
           "head_dim": HEAD_DIM, "n_groups": 2, "num_heads": D_INNER // HEAD_DIM,
           "rms_norm": True, "time_step_limit": [0.0, float("inf")], **HF}
    make_hf(os.path.join(out, "mamba2-hf"), hf2, w, ids)
    ssm_cfg = {"layer": "Mamba2", "d_state": D_STATE, "headdim": HEAD_DIM, "ngroups": 2,
               "chunk_size": 16}
    original2 = {**ORIGINAL, "d_intermediate": 0, "ssm_cfg": ssm_cfg, "attn_layer_idx": [],
                 "attn_cfg": {}, "tie_embeddings": True}
    make_original(os.path.join(out, "mamba2-original"), original2, w, ids)

    rng = Random(14)
    w = random_weights(rng, lambda r: mamba1_weights(r, use_bias=True), untied=True)
    keep_f32 = lambda name: name.endswith(("A_log", ".D"))  # as some published files do
    w = {k: v if keep_f32(k) else v.bfloat16() for k, v in w.items()}
    config = {**hf1, "use_bias": True, "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
    make_hf(os.path.join(out, "mamba1-bias-bf16"), config, w, rng.ids(VOCAB, 2, 45))


def make_hybrids(out):
    """Attention in all, some or one of the layers: rotary over all, half or none of a head,
    several queries a key, a convolution or none, biases or none; MLPs; LayerNorm."""
    attn = {"causal": True, "head_dim": 16, "num_heads": 2, "num_heads_kv": 2}
    bare = {"qkv_proj_bias": False, "out_proj_bias": False}
    mamba2 = {"layer": "Mamba2", "d_state": D_STATE, "headdim": HEAD_DIM, "ngroups": 1}
    models = {
        "transformerpp": {"d_intermediate": 100, "ssm_cfg": {}, "attn_layer_idx": [0, 1, 2],
                          "attn_cfg": {**attn, **bare, "d_conv": 0, "rotary_emb_dim": 16}},
        "mamba2attn": {"d_intermediate": 0, "ssm_cfg": mamba2, "attn_layer_idx": [1],
                       "attn_cfg": {**attn, **bare, "d_conv": 4, "num_heads": 6,
                                    "rotary_emb_dim": 8}},
        "mamba1attn-mlp": {"d_intermediate": 64, "ssm_cfg": {"dt_rank": DT_RANK},
                           "attn_layer_idx": [0, 2], "rms_norm": False,
                           "attn_cfg": {**attn, "head_dim": 24, "rotary_emb_dim": 0}},
    }
    scans = {"Mamba2": lambda r: mamba2_weights(r, groups=1)}
    for i, (name, sizes) in enumerate(models.items()):
        config = {**ORIGINAL, "tie_embeddings": True, **sizes}
        rng = Random(300 + i)
        scan = scans.get(sizes["ssm_cfg"].get("layer"), lambda r: mamba1_weights(r, False))
        w = hybrid_weights(rng, config, scan)
        make_original(os.path.join(out, name + "-original"), config, w, rng.ids(VOCAB, 2, 45))


# ---------------------------------------------------------------- the shipped model


def make_stories(out, path):
    """val_ids, the start of the validation text, are taken over from path, the present file."""
    from tokenizers import Tokenizer
    tokenizer = Tokenizer.from_file(os.path.join(STORIES, "tokenizer.json"))
    model = read_model(STORIES)
    tensors = {"val_ids": load_file(path)["val_ids"]}
    tensors["val_nll"] = model.nll(tensors["val_ids"].long()[None])[0].float()
    for i, prompt in enumerate(PROMPTS):
        ids = torch.tensor(tokenizer.encode(prompt).ids)
        greedy, margin = model.greedy(ids, 60)
        tensors |= {f"prompt_{i}": ids.int(), f"greedy_{i}": greedy.int(),
                    f"greedy_margin_{i}": margin.float()}
    tensors["logits_0"] = model.logits(tensors["greedy_0"].long()[None, :8])[0].float()
    save_file(tensors, os.path.join(out, "expected_stories.safetensors"),
              {"prompts": json.dumps(PROMPTS), "truth": "float64"})


# ---------------------------------------------------------------- checks


def report(what, worst, limit):
    print(f"{what:60} {worst:9.2e}  (limit {limit:g})", flush=True)
    if not worst <= limit:  # also when it is NaN
        sys.exit(f"make_golden: {what}: differs by {worst:.3g}, limit {limit:g}")


def difference(got, want):
    """Largest |got - want| over the largest |want|."""
    want = want.double()
    if got.shape != want.shape:
        sys.exit(f"make_golden: shape {list(got.shape)}, expected {list(want.shape)}")
    return ((got - want).abs().max() / want.abs().max().clamp_min(1e-300)).item()


def check_scan(path):
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    given = {k: v for k, v in tensors.items() if v.dtype == torch.float32}
    answers = scan_answers(metadata["kind"], given, metadata.get("softplus") == "1")
    assert set(answers) == set(tensors) - set(given), path
    worst = max(difference(answers[k].detach(), tensors[k]) for k in answers)
    # Not 1e-12: a truth made with torch's own softplus, x above 20, is off by up to 2e-9 there.
    report(path, worst, 1e-9)


def check_model(folder):
    model = read_model(folder)
    want = load_file(os.path.join(folder, "expected.safetensors"))
    ids = want["ids"].long()
    report(folder + ": logits", difference(model.logits(ids), want["logits"]), 1e-6)
    report(folder + ": nll", difference(model.nll(ids), want["nll"]), 1e-6)
    greedy, margin = model.greedy(ids[0, :9], 24)
    if not torch.equal(greedy.int(), want["greedy"]):
        sys.exit(f"make_golden: {folder}: greedy ids differ")
    report(folder + ": margin", difference(margin, want["greedy_margin"]), 1e-5)


def check_stories(path):
    """The whole of such a file: every prompt's logits as far as they are kept."""
    model, want = read_model(STORIES), load_file(path)
    nll = model.nll(want["val_ids"].long()[None])[0]
    report(path + ": val_nll", difference(nll, want["val_nll"]), 1e-5)
    for i in range(len(PROMPTS)):
        greedy, margin = model.greedy(want[f"prompt_{i}"].long(), 60)
        if not torch.equal(greedy.int(), want[f"greedy_{i}"]):
            sys.exit(f"make_golden: {path}: greedy_{i} differs")
        logits = model.logits(greedy[None, :40])[0]
        report(f"{path}: margin {i}", difference(margin, want[f"greedy_margin_{i}"]), 1e-5)
        if (kept := want.get(f"logits_{i}")) is not None:
            report(f"{path}: logits {i}", difference(logits[: len(kept)], kept), 1e-5)


def check(folder):
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if os.path.exists(os.path.join(path, "expected.safetensors")):
            if "ids" in load_file(os.path.join(path, "expected.safetensors")):
                check_model(path)
        elif name.startswith(("scan_", "ssd_")):
            check_scan(path)
        elif name.startswith("expected_stories"):
            check_stories(path)


def compare_with_transformers():
    """Mamba-1, and Mamba-2 with one group: with more, transformers' plain path normalizes
    over all channels and is no witness. It rounds A to float32, hence the limit."""
    import transformers

    def compare(what, config, w):
        model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
        missing, unexpected = model.load_state_dict(w, strict=False)
        assert set(missing) <= {"lm_head.weight"} and not unexpected, (missing, unexpected)
        model.tie_weights()
        ids = Random(3).ids(VOCAB, 2, 45)
        with torch.no_grad():
            got = model(ids, use_cache=False).logits
        report(what, difference(Model(config.to_dict(), w).logits(ids), got), 1e-5)

    base = {**HF, "vocab_size": VOCAB_PADDED}
    with_bias = {**base, "use_bias": True}
    w = random_weights(Random(1), lambda r: mamba1_weights(r, use_bias=True))
    config = transformers.MambaConfig(time_step_rank=DT_RANK, **with_bias)
    compare("transformers, Mamba-1", config, w)
    w = random_weights(Random(2), lambda r: mamba2_weights(r, groups=1))
    config = transformers.Mamba2Config(head_dim=HEAD_DIM, num_heads=D_INNER // HEAD_DIM,
                                       n_groups=1, chunk_size=16, **base)
    compare("transformers, Mamba-2, one group", config, w)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default=HERE, help="folder to write (default: this one)")
    parser.add_argument("--check", nargs="+", metavar="DIR",
                        help="recompute these folders, write nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    compare_with_transformers()
    if args.check:
        for folder in args.check:
            check(folder)
        return
    os.makedirs(args.out, exist_ok=True)
    for i, (name, shape) in enumerate(SCANS.items()):
        softplus_bit = "0" if name == "plain" else "1"
        make_scan(os.path.join(args.out, f"scan_{name}.safetensors"), "selective_scan",
                  scan_inputs(Random(100 + i), **shape), {"softplus": softplus_bit})
    for i, (name, shape) in enumerate(SSDS.items()):
        make_scan(os.path.join(args.out, f"ssd_{name}.safetensors"), "ssd",
                  ssd_inputs(Random(200 + i), **shape), {})
    make_models(args.out)
    make_hybrids(args.out)
    make_stories(args.out, os.path.join(HERE, "expected_stories.safetensors"))
    check(args.out)


if __name__ == "__main__":
    main()

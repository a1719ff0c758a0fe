#!/usr/bin/env python3
"""What `mamba verify` says of other people's code (VERDICTS.md): a row for each implementation, operation and dtype.

Usage: PYTHONPATH=FOLDER:... tests/verdicts.py [--device cuda] [--peer NAME] [--op OP] [--dtype bf16] [--case length_b3_t65]

Needs torch and the program; each peer that can be imported from PYTHONPATH is judged: mamba_ssm, causal_conv1d, transformers, model.py
of mamba-minimal, mambapy, fla. An adapter only puts arguments into a peer's order and layout, and does around it what its own block does.
Every part of a row runs in a process of its own, so that no crash and no endless compilation of a peer stops the others.
"""
import argparse
import collections
import datetime
import hashlib
import importlib.util
import inspect
import json
import multiprocessing
import multiprocessing.connection
import os
import platform
import signal
import subprocess
import sys
import time
import types

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import torch
import verify
from torch.nn import functional as F

# of Triton's ssd, which is compiled for each shape; other rows are one part
GROUPS = (("_options",), ("_length_b3",), ("_length_b1",), ("_state",), ("_head",),
          ("_scales", "_groups", "_no_decay", "_positive", "_weak", "_total", "_tiny", "_huge"))


def load(name):
    if not torch.cuda.is_available():  # its package imports the extension, its reference needs none
        sys.modules.setdefault("causal_conv1d_cuda", types.ModuleType("causal_conv1d_cuda"))
    return importlib.import_module(name)


def plain(name):
    """a torch function of transformers without the kernels that it may be replaced by"""
    module, function = name.rsplit(".", 1)
    return inspect.unwrap(getattr(load("transformers.models." + module), function))


# --- adapters: a function of the peer's module gives a callable with the official arguments ---

def official_scan(name):
    def make():
        fn = getattr(load("mamba_ssm.ops.selective_scan_interface"), name)

        def scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
            y, h = fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus, True)
            return y, h.detach() if name == "selective_scan_fn" else h  # it has no gradient, as its documentation says
        return scan
    return make


def official_ssd():
    fn = load("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    return lambda x, dt, A, B, C, D=None, dt_bias=None, initial_states=None, dt_softplus=False: fn(
        x, dt, A, B, C, 256, D=D, dt_bias=dt_bias, initial_states=initial_states, dt_softplus=dt_softplus, return_final_states=True)


def step(dt, bias, softplus):
    dt = dt.float() if bias is None else dt.float() + bias
    return F.softplus(dt) if softplus else dt


def heads(B, x):
    return B.repeat_interleave(x.shape[2] // B.shape[2], 2)


def ssd_minimal():
    fn = load("mamba_ssm.modules.ssd_minimal").ssd_minimal_discrete

    def ssd(x, dt, A, B, C, initial_states=None, dt_bias=None, D=None, dt_softplus=False):
        dt, L = step(dt, dt_bias, dt_softplus), x.shape[1]
        whole = lambda v: F.pad(v.float(), [0, 0] * (v.dim() - 2) + [0, -L % 64])  # it takes whole chunks only
        start = None if initial_states is None else initial_states[:, None]
        y, h = fn(whole(x * dt[..., None]), whole(A * dt), whole(heads(B, x)), whole(heads(C, x)), 64, start)
        return (y[:, :L] + (0 if D is None else D[:, None] * x)).to(x.dtype), h
    return ssd


def simple_gla():
    fn = load("fla.ops.simple_gla").chunk_simple_gla

    def ssd(x, dt, A, B, C, initial_states=None, dt_bias=None, D=None, dt_softplus=False):
        dt = step(dt, dt_bias, dt_softplus)
        start = None if initial_states is None else initial_states.transpose(2, 3).contiguous()
        y, h = fn(heads(C, x), heads(B, x), (x * dt[..., None]).to(x.dtype), A * dt, scale=1.0, initial_state=start,
                  output_final_state=True)
        return (y + (0 if D is None else D[:, None] * x)).to(x.dtype), h.transpose(2, 3)
    return ssd


def official_conv(last):
    def make():
        fn = load("causal_conv1d").causal_conv1d_fn
        if not last:
            return lambda x, weight, bias=None, activation=None: fn(x, weight, bias, activation=activation)

        def conv(x, weight, bias=None, initial_states=None, activation=None):
            d = x.shape[1]
            pad = lambda v, *after: v if v is None else F.pad(v, [*after, 0, -d % 8])  # it takes multiples of 8 only
            rows = lambda v: v if v is None else pad(v, 0, 0).transpose(1, 2).contiguous().transpose(1, 2)
            y, h = fn(rows(x), pad(weight, 0, 0), None if bias is None else F.pad(bias, [0, -d % 8]),
                      initial_states=rows(initial_states), return_final_states=True, activation=activation)
            return y[:, :d], h[:, :d]
        return conv
    return make


def reference_conv():
    fn = load("causal_conv1d.causal_conv1d_interface").causal_conv1d_ref
    return lambda x, weight, bias=None, initial_states=None, activation=None: fn(x, weight, bias, initial_states, True, None, activation)


def transformers_scan():
    fn = plain("mamba.modeling_mamba.mamba_selective_scan")
    return lambda u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False: fn(
        u, delta, A, one_group(B), one_group(C), D, z, delta_bias, delta_softplus, True)


def transformers_ssd():
    fn = plain("mamba2.modeling_mamba2.mamba2_chunk_scan")
    return lambda x, dt, A, B, C, D=None, dt_bias=None, initial_states=None, dt_softplus=False: fn(
        x, dt, A, B, C, 256, D, dt_bias, initial_states, dt_softplus, return_final_states=True)


def one_group(B):
    if B.shape[1] > 1:
        raise NotImplementedError("one group of B and C only")
    return B[:, 0]


def around(fn):
    """what the blocks of mamba-minimal and mamba.py do around their scan of (batch, L, d)"""
    def scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
        delta = delta if delta_bias is None else delta + delta_bias[:, None].to(delta.dtype)
        delta, rows = F.softplus(delta) if delta_softplus else delta, lambda v: v.transpose(1, 2)
        y = fn(rows(u), rows(delta), A, rows(one_group(B)), rows(one_group(C)), torch.zeros_like(A[:, 0]) if D is None else D)
        y = rows(y) if z is None else rows(y) * F.silu(z)
        return y
    return scan


def minimal_scan():
    return around(lambda *given: load("model").MambaBlock.selective_scan(None, *given))


def mambapy_scan(name):
    def make():
        block = load("mambapy.mamba").MambaBlock
        return around(lambda x, delta, A, *rest: getattr(block, name)(
            types.SimpleNamespace(config=types.SimpleNamespace(d_inner=A.shape[0], d_state=A.shape[1])), x, delta, A, *rest))
    return make


def norm(module, name):
    def make():
        forward = getattr(load(module), name).forward  # of a module, here without one
        return lambda x, weight, eps, z=None, group_size=None: forward(
            types.SimpleNamespace(weight=weight, eps=eps, variance_epsilon=eps, group_size=group_size, use_mup=False), x,
            *([] if z is None else [z]))
    return make


def official_norm(x, weight, eps):
    return load("mamba_ssm.ops.triton.layer_norm").rms_norm_fn(x, weight, None, eps=eps)


def official_gated_norm(x, z, weight, eps, group_size):
    return load("mamba_ssm.ops.triton.layernorm_gated").rmsnorm_fn(x, weight, None, z=z, eps=eps, group_size=group_size,
                                                                  norm_before_gate=False)


PEERS = (  # module whose version counts, what is judged, operation, needs a GPU, what makes the callable
    ("mamba_ssm", "selective_scan_fn", "selective_scan", True, official_scan("selective_scan_fn")),
    ("mamba_ssm", "selective_scan_ref", "selective_scan", False, official_scan("selective_scan_ref")),
    ("mamba_ssm", "mamba_chunk_scan_combined", "ssd", True, official_ssd),
    ("mamba_ssm", "ssd_minimal_discrete", "ssd", False, ssd_minimal),
    ("mamba_ssm", "rms_norm_fn", "rms_norm", True, lambda: official_norm),
    ("mamba_ssm", "rmsnorm_fn", "gated_rms_norm", True, lambda: official_gated_norm),
    ("causal_conv1d", "causal_conv1d_fn", "causal_conv1d", True, official_conv(False)),
    ("causal_conv1d", "causal_conv1d_fn, channels last", "causal_conv1d", True, official_conv(True)),
    ("causal_conv1d", "causal_conv1d_ref", "causal_conv1d", False, reference_conv),
    ("transformers", "mamba_selective_scan", "selective_scan", False, transformers_scan),
    ("transformers", "mamba2_chunk_scan", "ssd", False, transformers_ssd),
    ("transformers", "causal_conv1d_fn", "causal_conv1d", False, lambda: (lambda fn: lambda x, weight, bias=None, activation=None: fn(
        x, weight, bias, activation))(plain("mamba.modeling_mamba.causal_conv1d_fn"))),
    ("transformers", "MambaRMSNorm", "rms_norm", False, norm("transformers.models.mamba.modeling_mamba", "MambaRMSNorm")),
    ("transformers", "MambaRMSNormGated", "gated_rms_norm", False, norm("transformers.models.mamba2.modeling_mamba2", "MambaRMSNormGated")),
    ("model", "MambaBlock.selective_scan", "selective_scan", False, minimal_scan),
    ("model", "RMSNorm", "rms_norm", False, norm("model", "RMSNorm")),
    ("mambapy", "MambaBlock.selective_scan", "selective_scan", False, mambapy_scan("selective_scan")),
    ("mambapy", "MambaBlock.selective_scan_seq", "selective_scan", False, mambapy_scan("selective_scan_seq")),
    ("mambapy", "RMSNorm", "rms_norm", False, norm("mambapy.mamba", "RMSNorm")),
    ("fla", "chunk_simple_gla", "ssd", True, simple_gla))
NAMES = {"model": "mamba-minimal", "mambapy": "mamba.py", "fla": "flash-linear-attention"}


def name(peer):
    return f"{NAMES.get(peer[0], peer[0])} `{peer[1]}`"


def version(name):
    module = load(name)
    if hasattr(module, "__version__"):
        return module.__version__
    file = importlib.import_module("mambapy.mamba" if name == "mambapy" else name).__file__
    return "sha256 " + hashlib.sha256(open(file, "rb").read()).hexdigest()[:8]


# --- a process for each part of a row ---

def one_configuration():
    """Triton's autotuner takes the smallest configuration: each is to be right, and the search takes minutes"""
    from triton.runtime.autotuner import Autotuner
    make = Autotuner.__init__

    def cost(config):
        size = config.num_stages or 1
        for name, value in config.kwargs.items():
            size *= value if name.upper().startswith("B") and isinstance(value, int) else 1
        return size

    def smallest(self, fn, arg_names, configs, *more, **options):
        make(self, fn, arg_names, [min(configs, key=cost)] if configs else configs, *more, **options)
    Autotuner.__init__ = smallest


def part(connection, peer, dtype, group, flags):
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.set_num_threads(1)  # the processes are what runs side by side
    try:
        if flags.device == "cuda":
            one_configuration()
        rows, seen = verify.judge(peer[4](), peer[2], dtype, device=flags.device, use_torch=True, only=group, program=flags.program,
                                  seed=flags.seed, show=lambda line: None, refuses=Exception)
        connection.send((version(peer[0]), rows, seen))
    except BaseException as error:
        what = "not found" if isinstance(error, ImportError) else type(error).__name__
        connection.send(("", [], {"refused": {f"{' '.join(group)}: {what}: {error}".split("\n")[0][:200]: "all"}}))


def judged_so(connection, rung, op, dtype, flags):
    """a rung of verify_kernels.cu; its bits count as the same where the verdicts of two runs are"""
    command = [flags.program, "verify", "--so", flags.so, "--json", "--op", op, "--dtype", dtype, "--seed", str(flags.seed)]
    runs = [subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(os.environ, VERIFY_RUNG=rung)) for _ in "12"]
    rows = [json.loads(line) for line in runs[0].stdout.splitlines()]
    seen = {"unequal": [("some case", "verdicts")]} if runs[0].stdout != runs[1].stdout else {}
    connection.send(("", rows, seen if rows else {"refused": {runs[0].stderr.decode().strip(): "all"}}))


def in_processes(parts, flags):
    """Runs each of (key, function, arguments) in a process of its own, some at a time, until the time is up; yields key and answer."""
    context, running, end = multiprocessing.get_context("fork"), {}, time.time() + flags.seconds
    lost = lambda why: ("", [], {"refused": {why: "all"}})
    while (parts or running) and time.time() < end:
        while parts and len(running) < flags.jobs:
            key, function, arguments = parts.pop(0)
            ours, theirs = context.Pipe(False)
            process = context.Process(target=function, args=(theirs, *arguments, flags))
            process.start()
            theirs.close()
            running[ours] = key, process
        for connection in multiprocessing.connection.wait(list(running), 1):
            key, process = running.pop(connection)
            try:
                answer = connection.recv()
            except EOFError:
                process.join()
                answer = lost(f"the process ended with {process.exitcode}")
            process.join()
            yield key, answer
    for key, process in running.values():
        os.killpg(process.pid, signal.SIGKILL)
    for key in [key for key, _ in running.values()] + [part[0] for part in parts]:
        yield key, lost(f"{' '.join(key[3])}: out of time")


# --- a row, and what is wrong in it ---

def cell(rows):
    """cases right of those judged, the worst error in bounds"""
    case = lambda row: row["file"].replace(".in_two_pieces", "")
    cases, wrong = {case(row) for row in rows}, {case(row) for row in rows if not row["ok"]}
    worst = max([row["worst"] for row in rows], default=0)
    return f"{len(cases - wrong)} of {len(cases)}, {worst:.2g}".replace("1.8e+308", "not finite") if rows else "none"


def text(key, answers, flags):
    found = collections.defaultdict(list)
    rows, counts = [row for _, rows, _ in answers for row in rows], collections.Counter()
    for _, _, seen in answers:
        for name in ("unequal", "inputs", "ignored"):
            found[name] += seen.get(name, [])
        counts.update({f"no `{n}`": count for n, count in seen.get("lacks", {}).items()})
        for why, count in seen.get("refused", {}).items():
            counts[why] = count if count == "all" else counts[why] + count
    backward = [row for row in rows if row["tensor"][0] == "d"]
    missing = sorted({"d" + n for n in found["inputs"]} - {row["tensor"] for row in rows}) if backward else []
    back = "".join(f"; no `{n}`" for n in missing) + "".join(f"; ignores `{n}`" for n in sorted(set(found["ignored"])))
    same = ", ".join(sorted({name for _, name in found["unequal"]}))
    same = f"no: {same} in {len({case for case, _ in found['unequal']})}" if same else "yes" if rows else ""
    lacks = "; ".join(f"{n.replace('|', '/')[:120]} ({count})" for n, count in counts.items())
    forward = cell([row for row in rows if row["tensor"][0] != "d"])
    name = " ".join([key[0], *{version for version, _, _ in answers if version}])
    return f"| {name} | {key[1]} | {key[2]} | {flags.device} | {forward} | {cell(backward)}{back} | {same} | {lacks} |"


def wrong(key, answers):
    """for each wrong tensor: in how many cases, and the worst one"""
    tensors = collections.defaultdict(list)
    for row in (row for _, rows, _ in answers for row in rows):
        tensors[row["tensor"]].append(row)
    for name, rows in tensors.items():
        worst, count = max(rows, key=lambda row: row["worst"]), sum(not row["ok"] for row in rows)
        if count:
            yield (f"- {', '.join(key)}: {name}: {count} of {len(rows)} wrong; {worst['worst']:.3g} bounds in {worst['file']} at "
                   f"{worst['index']}: got {worst['got']}, expected {worst['expected']}; {worst['hint']}")


RUNGS = {"selective_scan": ("naive", "registers", "lanes", "fused"), "ssd": ("naive", "fused", "warpgroup"),
         "causal_conv1d": ("naive", "fused"), "rms_norm": ("fused",), "gated_rms_norm": ("fused",)}


def wanted(flags):
    """what in_processes runs"""
    for dtype in flags.dtype.split(","):
        for op, rung in [(op, rung) for op, rungs in RUNGS.items() for rung in rungs if flags.so and flags.op in ("", op)]:
            yield (f"this project, {rung}", op, dtype, ("",)), judged_so, (rung, op, dtype)
        for peer in sorted(PEERS, key=lambda peer: not peer[3]):  # first what has to be compiled
            if flags.so or flags.op not in ("", peer[2]) or flags.peer not in name(peer) or (peer[3] and flags.device == "cpu"):
                continue
            for group in [(flags.case,)] if flags.case or not (peer[3] and peer[2] == "ssd") else GROUPS:
                yield (name(peer), peer[2], dtype, group), part, (peer, dtype, group)


def machine(flags):
    versions = [f"Python {platform.python_version()}"]
    for name in ("torch", "numpy", "triton", "einops"):
        if importlib.util.find_spec(name):
            versions.append(f"{name} {importlib.import_module(name).__version__}")
    asked = [sys.executable, "-c", "import torch; print(torch.cuda.get_device_name())"]  # here a fork would lose the device
    device = subprocess.run(asked, stdout=subprocess.PIPE, text=True).stdout.strip() if flags.device == "cuda" else "CPU"
    return f"{datetime.date.today()}; {device}; {', '.join(versions)}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default, about in (("device", "cpu", "cpu or cuda"), ("peer", "", "only modules or functions with this in their names"),
                                 ("op", "", "only this operation"), ("dtype", "f32,bf16,f16", "of inputs and outputs"),
                                 ("case", "", "only cases with this in their names"), ("program", None, "the program mamba"),
                                 ("so", "", "judge the rungs of this build of verify_kernels.cu instead"), ("seed", 1, "of the cases"),
                                 ("jobs", os.cpu_count(), "processes at a time"), ("seconds", 3600, "what has not ended then is left out")):
        parser.add_argument("--" + name, default=default, type=type(default) if isinstance(default, int) else str, help=about)
    flags, answers = parser.parse_args(), collections.defaultdict(list)
    print(f"{machine(flags)}\n\n    {' '.join(sys.argv)}\n", flush=True)
    print("| what | operation | dtype | device | forward | backward | same bits | not taken |\n|" + " --- |" * 8, flush=True)
    parts = list(wanted(flags))
    left = collections.Counter(key[:3] for key, _, _ in parts)
    for key, answer in in_processes(parts, flags):
        answers[key[:3]].append(answer)
        if len(answers[key[:3]]) == left[key[:3]]:
            print(text(key, answers[key[:3]], flags), flush=True)
    print("\n" + "\n".join(line for key in left for line in wrong(key, answers[key])))


if __name__ == "__main__":
    main()

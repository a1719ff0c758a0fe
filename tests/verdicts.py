#!/usr/bin/env python3
"""What `mamba verify` says of other people's code (VERDICTS.md): a row for each implementation, operation and dtype.

Usage: PYTHONPATH=FOLDER:... tests/verdicts.py [--device cuda] [--peer NAME] [--op OP] [--dtype bf16] [--case length_b3_t65]

Needs torch and the program; each peer that can be imported from PYTHONPATH is judged: mamba_ssm, causal_conv1d, transformers, model.py
of mamba-minimal, mambapy, fla. An adapter only puts arguments into a peer's order and layout, and does around it what its own block does.
Every part of a row runs in a process of its own, so that no crash and no endless compilation of a peer stops the others.
"""
import argparse
import collections
import concurrent.futures
import datetime
import hashlib
import importlib
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
    if torch.cuda.is_available() is False:  # its package imports the extension, its reference needs none
        sys.modules.setdefault("causal_conv1d_cuda", types.ModuleType("causal_conv1d_cuda"))
    return importlib.import_module(name)


def plain(name):
    """a torch function of transformers without the kernels that it may be replaced by"""
    module, function = name.rsplit(".", 1)
    return inspect.unwrap(getattr(load("transformers.models." + module), function))


def gradient_free_state(result):
    return result[0], result[1].detach()


# --- adapters: a function of the peer's module gives a callable with the official arguments ---

def official_scan(name):
    def make():
        fn = getattr(load("mamba_ssm.ops.selective_scan_interface"), name)

        def scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
            result = fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus, True)
            return gradient_free_state(result) if name == "selective_scan_fn" else result  # as its documentation says
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
                                  seed=flags.seed, show=lambda line: None, refuses=() if flags.loud else Exception)
        connection.send((version(peer[0]), rows, seen))
    except ImportError as error:
        connection.send(("not found", f"{error}", None))
    except BaseException as error:
        connection.send(("stopped", f"{type(error).__name__}: {error}".split("\n")[0][:200], None))


class Row:
    def __init__(self, name, op, dtype):
        self.name, self.op, self.dtype, self.version, self.waits = name, op, dtype, "", 0
        self.rows, self.judged, self.unequal, self.inputs, self.ignored = [], [], [], set(), set()
        self.lacks, self.notes = collections.Counter(), []

    def add(self, rows, seen):
        self.rows += rows
        self.judged += seen["judged"]
        self.unequal += seen["unequal"]
        self.inputs |= seen["inputs"]
        self.ignored |= seen["ignored"]
        self.lacks.update({f"no `{n}`": count for n, count in seen["lacks"].items()})
        self.lacks.update(seen["refused"])

    def cell(self, rows):
        """cases right of those judged, the worst error in bounds"""
        if not rows:
            return "none"
        case = lambda row: row["file"].replace(".in_two_pieces", "")
        wrong = {case(row) for row in rows if not row["ok"]}
        worst = max(row["worst"] for row in rows)
        return f"{len({case(row) for row in rows} - wrong)} of {len({case(row) for row in rows})}, {worst:.2g}".replace("1.8e+308", "NaN")

    def text(self, device):
        forward = [row for row in self.rows if row["tensor"][0] != "d"]
        backward = [row for row in self.rows if row["tensor"][0] == "d" and row["tensor"] not in ("delta", "dt")]
        missing = sorted({"d" + n for n in self.inputs} - {row["tensor"] for row in self.rows}) if backward else []
        back = self.cell(backward) + "".join(f"; no `{n}`" for n in missing) + "".join(f"; ignores `{n}`" for n in sorted(self.ignored))
        cases = len({case for case, _ in self.unequal})
        same = f"no: {', '.join(sorted({n for _, n in self.unequal}))} in {cases}" if cases else "yes" if self.judged else ""
        lacks = "; ".join([f"{n.replace('|', '/')[:120]} ({count})" for n, count in self.lacks.items()] + self.notes)
        return f"| {self.name} {self.version} | {self.op} | {self.dtype} | {device} | {self.cell(forward)} | {back} | {same} | {lacks} |"

    def wrong(self):
        """for each wrong tensor: in how many cases, and the worst one"""
        tensors = collections.defaultdict(list)
        for row in self.rows:
            if not row["ok"]:
                tensors[row["tensor"]].append(row)
        for name, rows in tensors.items():
            worst = max(rows, key=lambda row: row["worst"])
            of = sum(row["tensor"] == name for row in self.rows)
            yield (f"{self.name}, {self.op}, {self.dtype}: {name}: {len(rows)} of {of} wrong; {worst['worst']:.3g} bounds in "
                   f"{worst['file']} at {worst['index']}: got {worst['got']}, expected {worst['expected']}; {worst['hint']}")
        for case, name in self.unequal[:2]:
            yield f"{self.name}, {self.op}, {self.dtype}: {name}: other bits on the second call in {case}"


def schedule(parts, flags, done):
    """run each of (key, target, arguments) in its own process, some at a time, until the time is up"""
    context, running, end = multiprocessing.get_context("fork"), {}, time.time() + flags.seconds
    while parts or running:
        while parts and len(running) < flags.jobs and time.time() < end:
            key, arguments = parts.pop(0)
            ours, theirs = context.Pipe(False)
            process = context.Process(target=part, args=(theirs, *arguments, flags))
            process.start()
            theirs.close()
            running[ours] = key, process
        if time.time() >= end:
            for connection, (key, process) in running.items():
                os.killpg(process.pid, signal.SIGKILL)
                done(key, ("stopped", "out of time", None))
            for key, _ in parts:
                done(key, ("stopped", "out of time", None))
            return
        for connection in multiprocessing.connection.wait(list(running), 1):
            key, process = running.pop(connection)
            try:
                answer = connection.recv()
            except EOFError:
                process.join()
                answer = "stopped", f"the process ended with {process.exitcode}", None
            process.join()
            done(key, answer)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default, text in (("device", "cpu", "cpu or cuda"), ("peer", "", "only modules or functions with this in their names"),
                                ("op", "", "only this operation"), ("dtype", "f32,bf16,f16", "of inputs and outputs"),
                                ("case", "", "only cases with this in their names"), ("program", None, "the program mamba"),
                                ("so", "", "judge the rungs of this build of verify_kernels.cu instead")):
        parser.add_argument("--" + name, default=default, help=text)
    for name, default, text in (("seed", 1, "of the cases"), ("jobs", os.cpu_count(), "processes at a time"),
                                ("seconds", 3600, "after which what has not ended is left out")):
        parser.add_argument("--" + name, default=default, type=int, help=text)
    parser.add_argument("--loud", action="store_true", help="an exception of a peer stops its row")
    flags = parser.parse_args()
    rows, parts, missing = {}, [], {}
    for index, peer in enumerate(PEERS):
        if (peer[3] and flags.device == "cpu") or flags.op not in ("", peer[2]) or flags.peer not in f"{peer[0]} {peer[1]}":
            continue
        groups = [(flags.case,)] if flags.case or not (peer[3] and peer[2] == "ssd") else GROUPS
        for dtype in flags.dtype.split(","):
            row = rows[index, dtype] = Row(f"{NAMES.get(peer[0], peer[0])} `{peer[1]}`", peer[2], dtype)
            row.waits = len(groups)
            parts += [((index, dtype, group), (peer, dtype, group)) for group in groups]
    parts.sort(key=lambda p: (not PEERS[p[0][0]][3], flags.dtype.index(p[0][1])))  # what has to be compiled first

    def done(key, answer):
        row = rows[key[:2]]
        found, result, seen = answer
        row.waits -= 1
        if found == "not found":
            missing[PEERS[key[0]][0]] = result
        elif found == "stopped":
            row.notes.append(f"{' '.join(key[2]) or 'all'}: {result}")
        else:
            row.version = found
            row.add(result, seen)
        if row.waits == 0 and PEERS[key[0]][0] not in missing:
            print(row.text(flags.device), flush=True)

    show_machine(flags)
    print("| what | operation | dtype | device | forward | backward | same bits | not taken |\n|" + " --- |" * 8, flush=True)
    if not flags.so:
        schedule(parts, flags, done)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for row in pool.map(lambda key: judge_rung(flags, *key), [
                (op, rung, dtype) for op, rungs in RUNGS.items() for rung in rungs for dtype in flags.dtype.split(",")
                if flags.so and flags.op in ("", op)]):
            rows[row.name, row.op, row.dtype] = row
            print(row.text(flags.device), flush=True)
    print("".join(f"\nnot found: {name}: {why}" for name, why in missing.items()))
    for row in rows.values():
        for line in row.wrong():
            print("- " + line)


def judge_rung(flags, op, rung, dtype):
    """the row of a shared object (verify_kernels.cu); same bits: of two runs' verdicts"""
    row = Row(f"this project, {rung}", op, dtype)
    command = [flags.program, "verify", "--so", flags.so, "--json", "--op", op, "--dtype", dtype, "--seed", str(flags.seed)]
    runs = [subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(os.environ, VERIFY_RUNG=rung)) for _ in "12"]
    row.rows = [json.loads(line) for line in runs[0].stdout.splitlines()]
    row.judged = sorted({r["file"] for r in row.rows})
    row.unequal = [] if runs[0].stdout == runs[1].stdout else [("some case", "verdicts")]
    row.notes = [] if row.rows else [runs[0].stderr.decode().strip()]
    return row


RUNGS = {"selective_scan": ("naive", "registers", "lanes", "fused"), "ssd": ("naive", "fused", "warpgroup"),
         "causal_conv1d": ("naive", "fused"), "rms_norm": ("fused",), "gated_rms_norm": ("fused",)}


def show_machine(flags):
    of = lambda name: getattr(importlib.import_module(name), "__version__", "")
    versions = [f"Python {platform.python_version()}", f"torch {of('torch')}", f"numpy {of('numpy')}"]
    for name in ("triton", "einops"):
        try:
            versions.append(f"{name} {of(name)}")
        except ImportError:
            pass
    device = "a CPU"
    if flags.device == "cuda":
        device = subprocess.run([sys.executable, "-c", "import torch; print(torch.cuda.get_device_name())"], stdout=subprocess.PIPE,
                                text=True).stdout.strip()
    print(f"{datetime.date.today()}; {device}; {', '.join(versions)}\n\n    {' '.join(sys.argv)}\n", flush=True)


if __name__ == "__main__":
    main()

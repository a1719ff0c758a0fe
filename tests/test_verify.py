#!/usr/bin/env python3
"""Claims: the kernel checker finds planted bugs in somebody's scan and names them; right kernels pass.

Usage: test_verify.py PROGRAM      (numpy; run from the repository's root)
"""
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile

try:
    import numpy as np
except ImportError:
    print("kernel checker, Python door: skipped, needs numpy")
    sys.exit(0)
sys.path.insert(0, os.getcwd())
import verify as door

PROGRAM = os.path.abspath(sys.argv[1])
passed = failed = 0


def claim(name, ok, detail=""):
    global passed, failed
    passed, failed = passed + bool(ok), failed + (not ok)
    if not ok:
        print(f"FAILED: {name}\n  {str(detail)[:2000]}")


# --- a scan as people write it, in float32, with a place for each bug ---

def softplus(x):
    return np.where(x > 20, x, np.log1p(np.exp(np.minimum(x, 20)))).astype(np.float32)


def sigmoid(x):
    return (1 / (1 + np.exp(-x.astype(np.float32)))).astype(np.float32)


def to_bf16(x):
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    return (((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).astype(np.uint32)).view(np.float32)


def pieces(u, delta, A, B, C, delta_bias, delta_softplus, bug):
    """delta, x as used, A, and B and C for every channel"""
    batch, d, L = u.shape
    G = B.shape[1]
    if bug == "A_log":
        A = np.log(-A)
    raw = delta
    if delta_bias is not None and bug != "no bias":
        raw = raw + delta_bias[:, None] * (2 if bug == "bias twice" else 1)
    step = softplus(raw) if delta_softplus and bug != "no softplus" else raw
    if bug == "softplus overflows" and delta_softplus:
        with np.errstate(over="ignore"):
            step = np.log(1 + np.exp(raw))
    if bug == "softplus twice" and delta_softplus:
        step = softplus(step)
    group = [c % G if bug == "groups" else c * G // d for c in range(d)]
    B, C = B[:, group], C[:, group]  # (batch, d, N, L)
    if bug == "B late":
        B = np.concatenate([0 * B[..., :1], B[..., :-1]], -1)
    if bug == "B late, the first one twice":
        B = np.concatenate([B[..., :1], B[..., :-1]], -1)
    if bug == "B rolled":
        B = np.roll(B, 1, -1)
    if bug == "C early":
        C = np.concatenate([C[..., 1:], 0 * C[..., :1]], -1)
    return raw, step, A, B, C, group


def scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
         return_last_state=False, initial_states=None, bug=None):
    batch, d, L = u.shape
    raw, step, A, B, C, _ = pieces(u, delta, A, B, C, delta_bias, delta_softplus, bug)
    h = np.zeros((batch, d, A.shape[1]), np.float32)
    if initial_states is not None and bug != "h0":
        h = initial_states.astype(np.float32).copy()
    y = np.empty((batch, d, L), np.float32)
    for t in range(L):
        if t > 0 and (bug == "chunk" and t % 32 == 0 or bug == "chunk of 64" and t % 64 == 0):
            h = np.zeros_like(h)
        a = 1 + step[:, :, t, None] * A if bug == "linear decay" else np.exp(step[:, :, t, None] * A)
        b = step[:, :, t, None] * B[..., t]
        if bug == "zoh":
            b = (a - 1) / A * B[..., t]
        h = a * h + b * u[:, :, t, None]
        if bug == "bf16 state":
            h = to_bf16(h)
        y[:, :, t] = (h * C[..., t]).sum(-1)
    if bug == "tail" and L % 16 and delta_bias is not None and delta_softplus:
        for _ in range(-L % 16):
            h = np.exp(softplus(delta_bias)[:, None] * A) * h
    skip = 0 if D is None else D[:, None] * u
    gate = 1 if z is None else z if bug == "gate without sigmoid" else z * sigmoid(z)
    out = y * gate + skip if bug == "gate first" else (y + skip) * gate
    if bug == "one channel":
        out[:, min(3, d - 1)] *= 1.01
    if bug == "lanes" and d > 32:
        out[:, 20:] *= 1.001
    if bug == "one entry":
        out[-1, -1, L // 2] *= 1.003
    if bug == "hT scaled":
        h = h * np.float32(0.5)
    return out, h


def scan_with_gradients(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
                        initial_states=None, dout=None, dhT=None, bug=None):
    out, hT = scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, True, initial_states)
    batch, d, L = u.shape
    raw, step, _, Bd, Cd, group = pieces(u, delta, A, B, C, delta_bias, delta_softplus, None)
    h = [np.zeros((batch, d, A.shape[1]), np.float32) if initial_states is None else initial_states]
    for t in range(L):
        h.append(np.exp(step[:, :, t, None] * A) * h[-1] + step[:, :, t, None] * Bd[..., t] * u[:, :, t, None])
    y = np.stack([(h[t + 1] * Cd[..., t]).sum(-1) for t in range(L)], -1)
    g = {}
    dy = dout
    if z is not None:
        s = sigmoid(z)
        g["z"] = dout * (y + (0 if D is None else D[:, None] * u)) * s * (1 + z * (1 - s))
        dy = dout * z * s
    du = np.zeros_like(u) if D is None else D[:, None] * dy
    if D is not None:
        g["D"] = (dy * u).sum((0, 2))
    dh = dhT.astype(np.float32).copy() if bug != "dhT" else np.zeros_like(dhT)
    dstep, dA = np.zeros_like(step), np.zeros((batch, *A.shape), np.float32)
    dB, dC = np.zeros_like(B), np.zeros_like(C)
    for t in reversed(range(L)):
        if bug == "gradient chunk" and (t + 1) % 16 == 0 and t + 1 < L:
            dh = np.zeros_like(dh)
        dCt, dh = dy[:, :, t, None] * h[t + 1], dh + dy[:, :, t, None] * Cd[..., t]
        dx = (dh * Bd[..., t]).sum(-1)
        dBt = (step * u)[:, :, t, None] * dh
        for c in range(d):
            dC[:, group[c], :, t] += dCt[:, c]
            dB[:, group[c], :, t] += dBt[:, c]
        dh = np.exp(step[:, :, t, None] * A) * dh
        dl = dh * h[t]
        dstep[:, :, t] = (dl * A).sum(-1) + dx * u[:, :, t]
        dA += step[:, :, t, None] * dl
        du[:, :, t] += step[:, :, t] * dx
    draw = dstep * sigmoid(raw) if delta_softplus and bug != "softplus derivative" else dstep
    g.update(u=du, delta=draw, A=dA.sum(0), B=dB, C=dC)
    if delta_bias is not None:
        g["delta_bias"] = draw.sum((0, 2))
    if initial_states is not None:
        g["dinitial_states"] = dh
    if bug == "one dA":
        g["A"][-1, -1] *= 1.01
    return out, hT, g


# --- the suite through the door, rows of the verdict kept ---

SOME = ("options31.", "options17.", "length_b3_t65", "groups_g3", "width_b3_d33")  # for planted bugs

def rows_of(fn, **options):
    lines = []
    ok = door.verify(fn, program=PROGRAM, show=lines.append, **options)
    return ok, lines


def check(bug, hint, fn=scan, only=SOME):
    ok, lines = rows_of(functools.partial(fn, bug=bug), only=only)
    wrong = [line for line in lines if "WRONG" in line]
    named = [line for line in wrong if hint in line]
    claim(f"{bug}: found", not ok and wrong, lines[-3:])
    claim(f"{bug}: named", len(named) >= max(1, len(wrong) // 3), f"{len(named)} of {len(wrong)}: {wrong[:4]}")


for name, fn in (("forward", scan), ("with gradients", scan_with_gradients)):
    ok, lines = rows_of(fn)
    claim(f"a right numpy scan passes, {name}", ok, "\n".join(lines[-8:]))
    print(f"a right numpy scan, {name}: {lines[-2]}", flush=True)

# --- ten bugs that a newcomer would make: each is found, at least eight are named right ---

TEN = {"groups": "groups of B and C are repeated", "h0": "h0 is ignored", "no bias": "delta_bias is ignored",
       "no softplus": "softplus is not applied", "A_log": "A_log is used as A", "gate first": "the gate comes before D",
       "chunk of 64": "the state is lost at every boundary of chunks of 64",
       "gate without sigmoid": "the gate has no sigmoid", "B late, the first one twice": "B is one token late",
       "hT scaled": "all of it is 0.5 times what is right"}


def hints(bug, fn=scan):
    """whether the verdict is no, and the hints of the wrong tensors"""
    ok, lines = rows_of(functools.partial(fn, bug=bug), only=SOME, most=1000)
    whole = [line for line in lines if "WRONG" in line and "in_two_pieces" not in line]
    return not ok, [line.split("; ", 1)[-1] for line in whole]


named = 0
for bug, hint in TEN.items():
    found, given = hints(bug)
    claim(f"{bug}: found", found and given)
    right = sum(hint in each for each in given)
    named += 2 * right > len(given)
    print(f"planted: {bug}: {right} of {len(given)} wrong tensors named", flush=True)
claim("of ten bugs at least eight are named", named >= 8, named)

# --- others, by their hints ---

check("chunk", "the state is lost at every boundary of chunks of 32")
check("tail", "is not masked")
check("bias twice", "delta_bias is added twice")
check("softplus twice", "softplus is applied twice")
with np.errstate(invalid="ignore"):
    check("softplus overflows", "softplus is log(1 + exp(v)), and exp overflows", only=("huge_delta",))
check("B late", "B is one token late")
check("B rolled", "B is one token late")
check("C early", "C is one token early")
check("zoh", "exact zero-order hold")
check("linear decay", "the decay is 1 + delta A, not exp(delta A)")
check("bf16 state", "stored in bfloat16")
check("one channel", "only d")
check("lanes", "d from 20 on")
check("one entry", "only t")
check("dhT", "dhT is ignored", scan_with_gradients)
check("gradient chunk", "the gradient of the state is lost at every boundary of chunks of 16", scan_with_gradients)
check("one dA", "only n", scan_with_gradients)

# --- the door itself ---

def refused(**options):
    try:
        door.verify(scan, program=PROGRAM, show=lambda line: None, **options)
    except SystemExit as end:
        return str(end)
    return ""


claim("an unknown operation is one line", refused(op="attention").startswith("verify: --op: "), refused(op="attention"))
claim("an unknown dtype is one line", refused(dtype="int4").startswith("verify: --dtype: "), refused(dtype="int4"))
claim("a callable that fits no case is one line", "it lacks" in refused(op="rms_norm"), refused(op="rms_norm"))

calls = 0


def restless(u, delta, A, B, C):
    global calls
    calls += 1
    out, h = scan(u, delta, A, B, C)
    return out * np.float32(1 + calls % 2 * 1e-7)


ok, lines = rows_of(restless)
claim("other bits on the second call are no success", ok is False and " 0 of " in lines[-1], lines[-1])
claim("what a callable lacks is said", "for want of the arguments " in lines[-1] and " z (" in lines[-1], lines[-1])


def plain(u, delta, A, B, C, delta_softplus=False):
    if B.shape[1] > 1:
        raise NotImplementedError("one group only")
    return scan(u, delta, A, B, C, delta_softplus=delta_softplus)[0]


SWEPT = dict(only=("length_b3_t65", "groups_g2"), use_torch=False)
ok, lines = rows_of(plain, refuses=NotImplementedError, **SWEPT)
claim("what is optional and lacking is left out of lengths and sizes", ok and "0 of 1 tensors wrong, 1 cases judged" in lines[-1], lines)
claim("a refusal is counted by its words", "1 skipped, refused with NotImplementedError: one group only (1)" in lines[-1], lines[-1])
lines, thrown = [], None
try:
    door.verify(plain, program=PROGRAM, show=lines.append, **SWEPT)
except NotImplementedError as error:
    thrown = error
claim("without a word an exception goes through, after the name of its case",
      thrown and "groups_g2" in lines[-1] and lines[-1].endswith(": NotImplementedError: one group only"), lines)

try:
    import torch
except ImportError:
    print("kernel checker, torch's gradients: skipped, needs torch")
else:
    def torch_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
        delta = delta if delta_bias is None else delta + delta_bias[:, None]
        delta, h, y = torch.nn.functional.softplus(delta) if delta_softplus else delta, 0, []
        B, C = (v.repeat_interleave(u.shape[1] // v.shape[1], 1) for v in (B, C))
        for t in range(u.shape[2]):
            h = torch.exp(delta[:, :, t, None] * A) * h + (delta * u)[:, :, t, None] * B[..., t]
            y.append((h * C[..., t]).sum(-1))
        y = torch.stack(y, -1) + (0 if D is None else D[:, None] * u)
        return y if z is None else y * torch.nn.functional.silu(z)

    ok, lines = rows_of(torch_scan, only=("options23", "length_b3_t65"))
    claim("torch without a last state is judged without its gradient", ok and "dh0" not in lines[-2] and "dz" in lines[-2], lines)

# --- a kernel in a shared object; raw files ---

with tempfile.TemporaryDirectory() as folder:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("g++")
    so = os.path.join(folder, "example.so")
    subprocess.run([compiler, "-x", "c", "-std=c99", "-O2", "-shared", "-fPIC", "-I.", "tests/verify_example.c",
                    "-o", so, "-lm"], check=True)
    r = subprocess.run([PROGRAM, "verify", "--so", so, "--op", "rms_norm"], stdout=subprocess.PIPE)
    claim("the example in C is right", r.returncode == 0 and b"within the bound" in r.stdout, r.stdout[-300:])

    for code, said in (("int verify_kernel(const void* call) { return 7; }", "verify_kernel: rms_norm_000_options0: expected 0 or 1, found 7"),
                       ("int other(void) { return 0; }", "expected a function verify_kernel, found none")):
        subprocess.run([compiler, "-x", "c", "-shared", "-fPIC", "-", "-o", so], input=code.encode(), check=True)
        r = subprocess.run([PROGRAM, "verify", "--so", so, "--op", "rms_norm"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        claim(f"{said}: one line", r.returncode == 1 and said in r.stderr.decode() and r.stderr.count(b"\n") == 1, r.stderr)

    raw = os.path.join(folder, "raw")
    subprocess.run([PROGRAM, "vectors", raw, "--raw", "--op", "rms_norm"], check=True)
    for case in os.listdir(raw):
        lines = open(os.path.join(raw, case, "shapes.txt")).read().split("\n")
        shapes = {w[0]: [int(n) for n in w[2:]] for w in map(str.split, lines) if len(w) > 2}
        x, weight = (np.fromfile(os.path.join(raw, case, n + ".bin"), "<f4").reshape(shapes[n]) for n in ("x", "weight"))
        out = x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(1e-5)) * weight
        out.astype("<f4").tofile(os.path.join(raw, case, "out.bin"))
    r = subprocess.run([PROGRAM, "verify", raw, "--json"], stdout=subprocess.PIPE)
    rows = [json.loads(line) for line in r.stdout.splitlines()]
    claim("raw files are judged", r.returncode == 0 and rows and all(row["ok"] for row in rows), rows[:2])
    open(os.path.join(raw, case, "out.bin"), "ab").write(b"more")
    r = subprocess.run([PROGRAM, "verify", os.path.join(raw, case)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    claim("a raw file of another size is one line", r.returncode == 1 and r.stderr.startswith(b"mamba: wrong size: ")
          and r.stderr.count(b"\n") == 1, r.stderr)

# --- the command line ---

def run(*arguments):
    r = subprocess.run([PROGRAM, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return r.returncode, r.stdout.decode(), r.stderr.decode()


with tempfile.TemporaryDirectory() as folder:
    cases = os.path.join(folder, "cases")
    code, out, err = run("vectors", cases, "--op", "gated_rms_norm,causal_conv1d", "--dtype", "f16", "--expected")
    claim("expected outputs are written", code == 0 and out == err == "", (code, out, err))
    code, out, err = run("verify", cases)
    claim("and are right", code == 0 and out.endswith("tensors are within the bound\n"), (code, out[-200:], err))
    path = os.path.join(cases, sorted(os.listdir(cases))[-1])
    tensors, dtypes, options = door.read_safetensors(path)
    spoilt = dict(tensors, out=tensors["out"].copy())
    spoilt["out"][0, 3, 5] = np.nan
    door.write_safetensors(path, spoilt, dtypes, options)
    code, out, err = run("verify", path, "--json")
    row = [r for r in map(json.loads, out.splitlines()) if r["tensor"] == "out"][0]
    claim("a line of JSON has what DESIGN says", list(row) == ["file", "tensor", "ok", "worst", "index", "got", "expected", "hint"]
          and code == 1 and row["ok"] is False and row["index"] == [0, 3, 5] and row["got"] is None
          and row["file"] == os.path.basename(path)[:-12] and "only t 3" in row["hint"], row)
    claim("one line says how many are wrong", err == "mamba: 1 of 4 tensors are beyond the bound\n", err)
    code, out, err = run("verify", cases, "--op", "gated_rms_norm")
    claim("--op chooses from a folder", code == 1 and "causal_conv1d" not in out and "gated_rms_norm" in out, out[:200])
    code, out, err = run("verify", cases, "--dtype", "bf16")
    claim("--dtype, too", code == 1 and not out and err.startswith("mamba: no cases: expected some of --op"), err)
    code, out, err = run("vectors", cases, "--op", "gated_rms_norm,causal_conv1d")
    claim("outputs are not written over", code == 1 and err.startswith("mamba: outputs in the way: "), err)
    inputs = {n: t for n, t in tensors.items() if n != "x"}
    door.write_safetensors(path, {**inputs, "x": np.full_like(tensors["x"], np.inf)}, dtypes, options)
    code, out, err = run("verify", path)
    claim("inputs that are no numbers are one line with their name",
          code == 1 and "'x': expected finite inputs" in err and err.count("\n") == 1 and not out, err)
    code, out, err = run("verify", cases)
    claim("a broken file does not hide the others", code == 1 and "'x': expected finite inputs" in err
          and err.endswith("are broken; 0 of %d tensors are beyond the bound\n" % out.count("\n")) and out.count("\n") > 50, err)
    wide = dict(tensors, out=np.zeros((1, 2), np.float32))
    door.write_safetensors(path, wide, {n: k for n, k in dtypes.items() if n != "out"}, options)
    code, out, err = run("verify", path)
    row = [line for line in out.splitlines() if " out " in line][0]
    claim("a wrong shape has no place", " at " not in row and "expected real numbers of shape" in row, row)
    door.write_safetensors(path, dict(tensors, output=tensors["out"]), dtypes, options)
    code, out, err = run("verify", path)
    claim("a tensor of no known name is said", err.startswith("warning: ") and "'output': not a tensor of gated_rms_norm\n" in err, err)
    code, out, err = run("vectors", os.path.join(folder, "fresh"), "--op", "rms_norm")
    code, out, err = run("verify", os.path.join(folder, "fresh"))
    claim("without outputs there is nothing to judge", code == 1 and err.startswith("mamba: nothing to judge") and not out, err)
    for arguments, status, line in (
            (("verify",), 2, "mamba: verify: expected files, a folder or --so"),
            (("verify", folder), 1, "mamba: no cases: " + folder),
            (("verify", "/nowhere.safetensors"), 1, "mamba: cannot open: /nowhere.safetensors"),
            (("verify", "--so", "/nowhere.so"), 1, "mamba: cannot load: "),
            (("vectors", folder, "--op", "attention"), 2, "mamba: --op: "),
            (("verify", "tests/golden/mamba1-hf/expected.safetensors"), 1, "mamba: bad option: ")):
        code, out, err = run(*arguments)
        claim(f"{' '.join(arguments)}: one line, status {status}",
              code == status and err.startswith(line) and err.count("\n") == 1, (code, err))

print(f"kernel checker, Python door: {passed} claims hold, {failed} fail")
sys.exit(failed > 0)

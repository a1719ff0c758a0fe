"""verify.py - run a callable over the cases of `mamba vectors` and have `mamba verify` judge it.

    from verify import verify
    verify(my_selective_scan)                      # arguments as of the official selective_scan_fn

The callable gets the official arguments by name, as far as it has them: numpy arrays, or torch
tensors where torch has been imported (`device="cuda"` puts them there). It returns out, or out and
the last state. Gradients: of torch tensors by backward(); a numpy callable that has some takes
`dout` (and `dhT`) and returns them in a dict, by the inputs' names, as its last value. An initial
state is the argument `initial_states`. What is optional and the callable lacks is left out of the
cases; those of options (and all that need softplus or silu) are skipped then, and named. Besides,
a call is repeated, where the same bits are expected, and a callable that takes a state gets each
sequence in two pieces.

The truth is the program's: this file needs `mamba` (beside it, in the path, or `program=...`).
"""
import collections
import contextlib
import inspect
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile

import numpy as np

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
NORMS = ("rms_norm", "gated_rms_norm")


def read_safetensors(path):
    """(tensors, dtypes, metadata); bfloat16 as the float32 numbers that they are"""
    with open(path, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        data = file.read()
    metadata, tensors, dtypes = header.pop("__metadata__", {}), {}, {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        array = np.frombuffer(data[begin:end], DTYPES[entry["dtype"]]).reshape(entry["shape"])
        if entry["dtype"] == "BF16":
            array = (array.astype(np.uint32) << 16).view(np.float32)
        tensors[name], dtypes[name] = array, entry["dtype"]
    return tensors, dtypes, metadata


def write_safetensors(path, tensors, dtypes, metadata):
    header, blobs, offset = {"__metadata__": metadata}, [], 0
    for name, array in tensors.items():
        array = np.ascontiguousarray(array)
        kind = dtypes.get(name) or {8: "F64", 4: "F32", 2: "F16"}[array.dtype.itemsize]
        blob = ((array.astype(np.float32).view(np.uint32) >> 16).astype("<u2") if kind == "BF16"
                else array.astype(DTYPES[kind])).tobytes()
        header[name] = {"dtype": kind, "shape": list(array.shape),
                        "data_offsets": [offset, offset + len(blob)]}
        offset += len(blob)
        blobs.append(blob)
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + b"".join(blobs))


def arguments(op, tensors, options):
    """the case's own, by the official interface's names; and what else its function may ask for"""
    state = "initial_states" if op == "causal_conv1d" else "h0"
    given = {n: t for n, t in tensors.items() if n not in ("dout", "dhT", "dfinal_states", state)}
    if state in tensors:
        given["initial_states"] = tensors[state]
    if op == "selective_scan":
        given["delta_softplus"] = options["softplus"] == "1"
        return given, {"return_last_state": True}
    if op == "ssd":
        given["dt_softplus"] = options["softplus"] == "1"
        return given, {"chunk_size": 64, "return_final_states": True}
    if op == "causal_conv1d":
        given["activation"] = "silu" if options["silu"] == "1" else None
        return given, {"return_final_states": True, "bias": None}
    given["eps"] = float(options["eps"])
    if op == "gated_rms_norm":
        return dict(given, group_size=int(options["group_size"])), {"norm_before_gate": False, "bias": None}
    return given, {"bias": None}


class Runner:
    def __init__(self, fn, op, device, torch):
        self.fn, self.op, self.device, self.torch = fn, op, device, torch
        self.state = "final_states" if op == "causal_conv1d" else "hT"
        self.start = "initial_states" if op == "causal_conv1d" else "h0"
        parameters = inspect.signature(fn).parameters
        self.names = set(parameters)
        self.any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    def takes(self, name):
        return self.any or name in self.names

    def lacks(self, tensors, options):
        given, _ = arguments(self.op, tensors, options)
        return [n for n, v in given.items() if not (self.takes(n) or v is None or v is False)]

    def leaves_out(self, name):
        """an optional input that it has no argument for"""
        return (self.op not in NORMS and name in ("D", "z", "bias", "delta_bias", "dt_bias", self.start)
                and not self.takes("initial_states" if name == self.start else name))

    def to_torch(self, array, kind):
        types = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
        return self.torch.tensor(array, device=self.device).to(getattr(self.torch, types[kind]))

    def to_numpy(self, value):
        if self.torch and isinstance(value, self.torch.Tensor):
            value = value.detach().cpu()
            return (value.float() if value.dtype is self.torch.bfloat16 else value).numpy()
        return np.asarray(value)

    def call(self, tensors, options):
        """every output that the callable has, by name, as the program names them"""
        given, more = arguments(self.op, tensors, options)
        cotangents = {n: tensors[n] for n in ("dout", "dhT", "dfinal_states")
                      if n in tensors and n in self.names}
        given = {n: v for n, v in {**more, **given, **cotangents}.items() if self.takes(n)}
        for name in ("D", "z", "bias"):  # positional in some signatures, None if left out
            p = inspect.signature(self.fn).parameters.get(name)
            if p is not None and p.default is p.empty and name not in given:
                given[name] = None
        result = self.fn(**given)
        values = list(result) if isinstance(result, (tuple, list)) else [result]
        gradients = values.pop() if isinstance(values[-1], dict) else {}
        found = dict(zip(("out", self.state), values))
        found = {n: v for n, v in found.items() if v is not None}
        for name, value in gradients.items():
            plain = name[1:] if name[0] == "d" and name[1:] in (*tensors, "initial_states") else name
            found["d" + (self.start if plain == "initial_states" else plain)] = value
        if gradients and not self.takes("d" + self.state):
            found["no_d" + self.state] = None  # it has none for the last state: judge without it
        return found

    def run(self, tensors, dtypes, options, backward=True):
        if not self.torch:
            return self.call(tensors, options)
        there = {n: self.to_torch(t, dtypes[n]) for n, t in tensors.items()}
        inputs = {n: t.requires_grad_(backward) for n, t in there.items()
                  if n not in ("dout", "dhT", "dfinal_states")}
        found = self.call(there, options)
        pairs = [(found[n], there["d" + n]) for n in ("out", self.state)
                 if n in found and "d" + n in there and found[n].requires_grad]
        if backward and pairs:
            outs, cotangents = zip(*[(o, c.to(o.dtype)) for o, c in pairs])
            got = self.torch.autograd.grad(outs, list(inputs.values()), cotangents, allow_unused=True)
            found.update({"d" + n: g for n, g in zip(inputs, got) if g is not None})
            if "d" + self.state in there and not any(c is there["d" + self.state] for _, c in pairs):
                found["no_d" + self.state] = None  # no last state, or none with a gradient
        return found

    def cut(self, tensors, dtypes, options):
        """the case in two pieces, the state handed over"""
        axis = 1 if self.op == "ssd" else -1
        timed = [n for n in ("u", "x", "delta", "dt", "z", "B", "C", "dout") if n in tensors]
        L = tensors[timed[0]].shape[axis]
        outs, state, kinds = [], None, dict(dtypes)
        for piece in (range(0, L // 2), range(L // 2, L)):
            part = {n: t.take(piece, axis) if n in timed else t for n, t in tensors.items()}
            if state is not None:
                part[self.start] = state
                kinds.setdefault(self.start, dtypes["x"] if self.op == "causal_conv1d" else "F32")
            found = self.run(part, kinds, options, False)
            outs.append(self.to_numpy(found["out"]))
            state = self.to_numpy(found[self.state])
        return {"out": np.concatenate(outs, axis), self.state: state}


def find_program(program):
    here = os.path.join(os.path.dirname(os.path.abspath(__file__)), "mamba")
    program = program or (here if os.path.exists(here) else shutil.which("mamba"))
    if not program:
        sys.exit("verify: expected the program mamba beside verify.py or in the path; build it: make mamba")
    return program


def run_program(program, *arguments):
    """its output; what it refuses is one line, not a traceback"""
    r = subprocess.run([program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if r.returncode not in (0, 1) or (r.returncode == 1 and not r.stdout):
        sys.exit(r.stderr.decode().strip().replace("mamba: ", "verify: ", 1))
    return r.stdout, r.returncode == 0


def show_rows(rows, most, show):
    """what is wrong, whole sequences first; the worst of each tensor; how many are wrong"""
    number = lambda value: "NaN" if value is None else f"{value:.6g}"
    wrong = sorted((row for row in rows if not row["ok"]), key=lambda row: "in_two_pieces" in row["file"])
    for row in wrong[:most]:
        place = (f" at {row['index']}: got {number(row['got'])}, expected {number(row['expected'])};"
                 if row["index"] else ":")
        show(f"{row['file']:44} {row['tensor']:12} {row['worst']:10.3g}  WRONG{place} {row['hint']}")
    if len(wrong) > most:
        show(f"and {len(wrong) - most} more")
    worst = {}
    for row in rows:
        worst[row["tensor"]] = max(worst.get(row["tensor"], 0), row["worst"])
    show("worst errors, in units of the bound: " + ", ".join(f"{t} {w:.3g}" for t, w in worst.items()))
    return len(wrong)


@contextlib.contextmanager
def naming(case, show):
    """what the callable throws goes through, after a line with the case's name"""
    try:
        yield
    except Exception as error:
        show(f"{case}: {type(error).__name__}: {error}")
        raise


def judge(fn, op="selective_scan", dtype="f32", size="small", seed=1, device="cpu", use_torch=None,
          only=("",), program=None, show=print, refuses=()):
    """The verdict's rows (none: no case fits the callable), and what else was seen. refuses: exceptions by which the
    callable says that it does not take a case"""
    program, torch = find_program(program), sys.modules.get("torch") if use_torch in (None, True) else None
    if use_torch and not torch:
        import torch
    runner = Runner(fn, op, device, torch)
    takes_state = runner.takes("initial_states")
    seen = {"judged": [], "lacks": collections.Counter(), "refused": collections.Counter(), "skipped": 0,
            "unequal": [], "inputs": set(), "ignored": set()}
    with tempfile.TemporaryDirectory() as folder:
        run_program(program, "vectors", folder, "--op", op, "--dtype", dtype, "--size", size, "--seed", str(seed))
        for name in sorted(os.listdir(folder)):
            path = os.path.join(folder, name)
            if not any(part in name for part in only):
                os.remove(path)
                continue
            tensors, dtypes, options = read_safetensors(path)
            if "_options" not in name:
                tensors = {n: t for n, t in tensors.items() if not runner.leaves_out(n)}
            lacks, found, case = runner.lacks(tensors, options), None, name[:-12]
            seen["lacks"].update(lacks)
            with naming(case, show):
                try:
                    found = None if lacks else runner.run(tensors, dtypes, options)
                except refuses as refusal:
                    seen["refused"][f"{type(refusal).__name__}: {str(refusal).strip()}".split("\n")[0]] += 1
                if found is None:
                    seen["skipped"] += 1
                    os.remove(path)
                    continue
                seen["judged"].append(case)
                seen["inputs"].update(n for n in tensors if n not in ("dout", "dhT", "dfinal_states"))
                seen["ignored"].update(n[3:] for n in found if n.startswith("no_"))
                inputs = {n: t for n, t in tensors.items() if "no_" + n not in found}
                again = runner.run(tensors, dtypes, options)
                found, again = ({n: runner.to_numpy(v) for n, v in of.items() if v is not None} for of in (found, again))
                for n, value in found.items():
                    if value.tobytes() != again[n].tobytes():
                        seen["unequal"].append((case, n))
                        show(f"{case:44} {n:12} bits differ from one call to the next")
                write_safetensors(path, {**inputs, **found}, dtypes, options)
                pieces = takes_state and op not in NORMS and runner.state in found
                if pieces and found["out"].shape[1 if op == "ssd" else 2] > 1:
                    path = path.replace(".safetensors", ".in_two_pieces.safetensors")
                    write_safetensors(path, {**inputs, **runner.cut(tensors, dtypes, options)}, dtypes, options)
        answer = run_program(program, "verify", folder, "--json")[0] if seen["judged"] else b""
    return [json.loads(line) for line in answer.splitlines()], seen


def verify(fn, op="selective_scan", dtype="f32", *, only=("",), show=print, most=20, **more):
    """True if all that fn returns is right, and the same bits on every call. use_torch: tensors instead of
    arrays (None: if torch has been imported); only: cases with one of these in their names; most: rows of
    wrong tensors to show; others: size, seed, device, program, refuses (see judge)"""
    rows, seen = judge(fn, op, dtype, only=only, show=show, **more)
    if not seen["judged"]:
        sys.exit(f"verify: no case fits the callable: it lacks {', '.join(seen['lacks']) or only}")
    wrong = show_rows(rows, most, show)
    lack, refused = (", ".join(f"{n} ({count})" for n, count in seen[key].items()) for key in ("lacks", "refused"))
    show(f"{op}, {dtype}: {wrong} of {len(rows)} tensors wrong, {len(seen['judged'])} cases judged, {seen['skipped']} skipped"
         + (f", for want of the arguments {lack}" if lack else "") + (f", refused with {refused}" if refused else "")
         + f"; {len(seen['unequal'])} outputs not the same on every call")
    return wrong == 0 and not seen["unequal"]

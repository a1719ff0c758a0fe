#!/usr/bin/env python3
"""Claims about the two programs: mamba and mamba_cuda print the same for the same command, up to rounding.

Usage: test_programs.py MAMBA MAMBA_CUDA      (standard library only; run from the repository's root)
"""
import json
import math
import os
import re
import struct
import subprocess
import sys
import tempfile

passed = failed = 0


def run(program, *arguments):
    r = subprocess.run([program, *map(str, arguments)], capture_output=True)
    if r.returncode:
        sys.exit(f"{program} {' '.join(map(str, arguments))}: exit {r.returncode}: {r.stderr.decode()}")
    return r.stdout.decode()


def claim(name, ok, detail=""):
    global passed, failed
    passed, failed = passed + bool(ok), failed + (not ok)
    print(f"{'ok' if ok else 'FAILED'}: {name}{': ' + str(detail)[:600] if detail != '' else ''}")


def close(a, b, tolerance):
    """Tables or JSON of the same words and of numbers that differ by at most the tolerance, relatively."""
    number = re.compile(r"-?\d+(\.\d+)?(e[-+]?\d+)?")
    a, b = (re.findall(r'[^\s,:{}"]+', text) for text in (a, b))
    return len(a) == len(b) and all(
        x == y or number.fullmatch(x) and number.fullmatch(y) and abs(float(x) - float(y)) <= tolerance * abs(float(x))
        for x, y in zip(a, b))


def numbers(path):
    """All that a safetensors file holds, as floats: token ids are then denormal numbers."""
    with open(path, "rb") as f:
        (header,) = struct.unpack("<Q", f.read(8))
        f.seek(8 + header)
        data = f.read()
    return struct.unpack(f"<{len(data) // 4}f", data)


def main():
    cpu, gpu = (os.path.abspath(p) for p in sys.argv[1:3])
    both = lambda *arguments: (run(cpu, *arguments), run(gpu, *arguments))
    text = open("weights/stories/README.md").read()
    f32 = ("--dtype", "f32")
    with tempfile.TemporaryDirectory() as folder:
        at = lambda name: os.path.join(folder, name)
        with open(at("text"), "w") as f:
            f.write(text)
        with open(at("prompts"), "w") as f:
            f.write("Once upon a time\nThe little dog was sad because\nLily\n")
        words = text.split()
        with open(at("requests"), "w") as f:
            for i in range(0, 200, 20):
                for choice in range(2):
                    f.write(json.dumps({"context": " ".join(words[i:i + 30]), "continuation": " " + words[i + 30 + choice], "doc": i, "label": 0}) + "\n")
        for model in ["weights/stories"] + ["tests/golden/" + m for m in ("mamba1-hf", "mamba1-original", "mamba2-hf", "mamba2-original")]:
            for mode in ("parallel", "recurrent", "chunked=7"):
                ids = " ".join(str(i * i % 100) for i in range(70))
                run(cpu, "logits", "--model", model, "--ids", ids, "--mode", mode, "--out", at("cpu"), *f32)
                run(gpu, "logits", "--model", model, "--ids", ids, "--mode", mode, "--out", at("gpu"), *f32)
                a, b = numbers(at("cpu")), numbers(at("gpu"))
                worst = max(abs(x - y) for x, y in zip(a, b))
                claim(f"logits of {model}, {mode}", len(a) == len(b) and worst < 1e-4, worst)
            for program, out in ((cpu, "cpu"), (gpu, "gpu")):
                run(program, "gradients", "--model", model, "--ids", ids, "--out", at(out), *f32)
            a, b = numbers(at("cpu")), numbers(at("gpu"))
            worst = math.dist(a, b) / math.hypot(*a) if len(a) == len(b) else math.inf
            claim(f"gradients of {model}", worst < 2e-5, worst)
        for prompt in ("Once upon a time", "Tom and Lily"):
            a, b = both("generate", prompt, "-n", 100, "--temperature", 0, *f32)
            claim(f"greedy text after {prompt!r}", a == b, "" if a == b else (a, b))
        a, b = both("generate", "--prompt-file", at("prompts"), "--batch", 2, "-n", 60, "--seed", 5, "--top-k", 40, *f32)
        claim("text by chance, the same seed, a batch", a == b, "" if a == b else (a, b))
        run(gpu, "generate", "Once upon a time", "-n", 20, "--temperature", 0, "--save-state", at("state"), *f32)
        a, b = both("generate", "-n", 30, "--temperature", 0, "--load-state", at("state"), *f32)
        claim("a state saved on the GPU goes on on the CPU", a == b, "" if a == b else (a, b))
        for options in ((), ("--lengths", "64,256", "--stride", 32), ("--lengths", "64,256", "--truncate", "--delta-ratio", "1,0.5"),
                        ("--lengths", 100, "--carry-state", "--mode", "recurrent")):
            a, b = both("perplexity", "--text", at("text"), *options, *f32)
            claim(f"perplexity {' '.join(map(str, options))}", close(a, b, 1e-4), "" if close(a, b, 1e-4) else (a, b))
        a, b = both("score", "--requests", at("requests"), "--out", at("scores"), *f32)
        claim("score", close(a, b, 1e-3), "" if close(a, b, 1e-3) else (a, b))
        with open(at("requests"), "w") as f:  # the GPU takes them together, in batches
            for i in range(300):
                f.write(json.dumps({"context": [1 + (i + k * k) % 99 for k in range(1 + i % 40)], "continuation": [i % 99] * (1 + i % 7)}) + "\n")
        for model in ("mamba1-hf", "mamba2-hf", "mamba2attn-original", "transformerpp-original"):
            a, b = both("score", "--requests", at("requests"), "--model", "tests/golden/" + model, *f32)
            claim(f"score of 300 requests by {model}", a.count("\n") == 300 and close(a, b, 1e-4), "" if close(a, b, 1e-4) else (a, b))
        for program, out in ((cpu, "cpu_seen"), (gpu, "gpu_seen")):
            run(program, "inspect", "Once upon a time", "--layer", 2, "--out", at(out))
        a, b = (numbers(at(out + "/delta.safetensors")) for out in ("cpu_seen", "gpu_seen"))
        claim("inspect", len(a) == len(b) and max(abs(x - y) for x, y in zip(a, b)) < 1e-5)
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

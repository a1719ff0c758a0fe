#!/usr/bin/env python3
"""Claims about folders as people have them: tests/golden/cases.json, which make_cases.py makes.

Usage: test_cases.py PROGRAM      (standard library only; run from the repository's root)
"""
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile

PROGRAM = os.path.abspath(sys.argv[1])


def last_logits(path):
    with open(path, "rb") as f:
        header, data = json.loads(f.read(struct.unpack("<Q", f.read(8))[0])), f.read()
    begin, end = header["logits"]["data_offsets"]
    columns = header["logits"]["shape"][1]
    return struct.unpack(f"<{columns}f", data[begin:end][-4 * columns:])


def write(path, content):
    if isinstance(content, str):
        return shutil.copy(content, path)
    with open(path, "w", encoding="utf8", newline="") as f:
        f.write(content["text"] if "text" in content else json.dumps(content["json"]))


def wrong(case, folder):
    """What is wrong with the program's answer; nothing if it is right."""
    model, out = os.path.join(folder, "model"), os.path.join(folder, "out")
    os.mkdir(model)
    for name, content in case["files"].items():
        write(os.path.join(model, name), content)
    names = {"M": model, "O": out}
    arguments = [names.get(a, a.replace("M/", model + "/")) for a in case["arguments"]]
    r = subprocess.run([PROGRAM, *arguments], input=case["stdin"].encode(), capture_output=True)
    stdout, stderr = r.stdout.decode().removesuffix("\n"), r.stderr.decode()
    found = f"exit {r.returncode}, stdout {stdout!r}, stderr {stderr!r}"
    if r.returncode != case.get("status", 0) or stdout != case.get("stdout", stdout):
        return found
    if "said" in case and (case["said"] not in stderr or stderr.count("\n") != 1):
        return found
    if "warned" in case and f"warning: {case['warned']}" not in stderr:
        return found
    if "logits" in case:
        logits = last_logits(out)
        worst = max(abs(a - b) for a, b in zip(logits, case["logits"]))
        if len(logits) != len(case["logits"]) or not worst < 2e-5:
            return f"logits {logits}"
    return ""


failed = 0
with open("tests/golden/cases.json", encoding="utf8") as file:
    cases = json.load(file)
for case in cases:
    with tempfile.TemporaryDirectory() as folder:
        if found := wrong(case, folder):
            failed += 1
            expected = {k: v for k, v in case.items() if k not in ("files", "stdin")}
            print(f"FAILED: {found[:800]}\n  expected {json.dumps(expected)[:800]}")
print(f"{len(cases) - failed} passed, {failed} failed")
sys.exit(failed > 0)

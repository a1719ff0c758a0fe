#!/usr/bin/env python3
"""Runs notebooks and compares the text that they print with the text stored in them.

Usage: check_notebooks.py JUPYTER NOTEBOOK...      (run from the repository's root)
Each notebook is run from top to bottom and rewritten in place. Numbers must agree to three digits; the numbers of
cells tagged "timing" are not compared, since they are the machine's, nor are pictures. Rounding errors, below 1e-5, need
only be as small. If stored text differs the exit status is 1, and the notebook that was rewritten is the one to commit. Where
MAMBA, MODEL, TEXTS or LENGTHS choose another study than the stored one, nothing is compared.
"""
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

NUMBER = re.compile(r"(?<![\w.])[+-]?\d[\d,]*\.?\d*(?:e[+-]?\d+)?(?:\s?%)?")
TINY = 1e-5
OTHER_STUDY = any(name in os.environ for name in ("MAMBA", "MODEL", "TEXTS", "LENGTHS"))


def texts(cell):
    """The cell's printed text, output by output; of a picture nothing."""
    found = []
    for output in cell.get("outputs", []):
        if "image/png" in output.get("data", {}):
            continue
        data = output.get("data", {})
        text = output.get("text") or data.get("text/markdown") or data.get("text/plain") or ""
        found.append("".join(text))
    return found


def same_number(a, b):
    """To three digits, or to one unit of the last digit that is shown of a fraction or a percentage."""
    x, y = (float(v.rstrip("% ,").replace(",", "")) for v in (a, b))
    if abs(x) < TINY and abs(y) < TINY:
        return True
    shown = a.rstrip("% ").partition(".")[2]
    unit = 10.0 ** -len(shown) if "e" not in a and (shown or "%" in a) else 0
    return abs(x - y) <= max(5e-3 * max(abs(x), abs(y)), 1.01 * unit)


def difference(stored, found, timing):
    """What differs between two texts, or None."""
    if NUMBER.sub("#", stored) != NUMBER.sub("#", found):
        at = next((i for i, (a, b) in enumerate(zip(stored, found)) if a != b), min(len(stored), len(found)))
        return f"stored ...{stored[max(0, at - 30):at + 40]!r}, found ...{found[max(0, at - 30):at + 40]!r}"
    for a, b in zip(NUMBER.findall(stored), NUMBER.findall(found)):
        if not timing and not same_number(a, b):
            return f"stored {a}, found {b}, in {stored[:60]!r}"
    return None


def compare(stored, found):
    """One line for each cell whose text differs."""
    wrong = []
    if len(stored["cells"]) != len(found["cells"]):
        return [f"stored {len(stored['cells'])} cells, found {len(found['cells'])}"]
    for number, (old, new) in enumerate(zip(stored["cells"], found["cells"])):
        timing = "timing" in new["metadata"].get("tags", [])
        before, after = texts(old), texts(new)
        if len(before) != len(after):
            wrong.append(f"cell {number}: stored {len(before)} outputs, found {len(after)}")
            continue
        wrong += [f"cell {number}: {d}" for a, b in zip(before, after) if (d := difference(a, b, timing))]
    return wrong


def run(jupyter, path):
    """The notebook with the outputs that it has now."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([jupyter, "nbconvert", "--to", "notebook", "--execute", "--ExecutePreprocessor.record_timing=False",
                        "--log-level=WARN", "--output-dir", folder, path], check=True)
        notebook = json.loads((Path(folder) / path.name).read_text())
    notebook["metadata"]["language_info"].pop("version", None)
    return notebook


def main():
    failed = False
    for path in map(Path, sys.argv[2:]):
        stored = json.loads(path.read_text())
        found = run(sys.argv[1], path)
        path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        wrong = [] if OTHER_STUDY else compare(stored, found)
        for line in wrong:
            print(f"{path}: {line}")
        failed |= bool(wrong)
        print(f"{path}: {len(found['cells'])} cells run, {'stored text was out of date' if wrong else 'its text is as stored'}")
    sys.exit(failed)


if __name__ == "__main__":
    main()

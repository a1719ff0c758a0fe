"""What the notebooks share: colours, pictures with a text beside them, and the doors to the project's sources."""
import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before numpy: one thread, so that timings compare like with like

import base64
import ctypes
import hashlib
import html
import io
import json
import re
import subprocess
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown, display

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build" / "notebook"
OUT.mkdir(parents=True, exist_ok=True)
MODEL = ROOT / "weights" / "stories"
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"  # Okabe and Ito
PURPLE, SKY = "#CC79A7", "#56B4E9"
STYLE = {"figure.dpi": 100, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
         "legend.frameon": False, "legend.fontsize": 8, "figure.constrained_layout.use": True}
plt.rcParams.update(STYLE)


def say(text):
    """Markdown below the cell. Lines may be indented like the code around them."""
    display(Markdown(re.sub(r"\n +", "\n", text)))


def picture(alternative, file=None):
    """Shows the current figure, and keeps it in a file beside the notebooks if asked to. `alternative` says in words
    what it shows, for those who cannot see it."""
    png = io.BytesIO()
    plt.savefig(png, format="png", metadata={"Software": None})
    plt.close("all")
    if file:
        (ROOT / "notebook" / file).write_bytes(png.getvalue())
    text = " ".join(alternative.split())
    display({"image/png": base64.b64encode(png.getvalue()).decode(), "text/plain": "(a picture)"}, raw=True,
            metadata={"image/png": {"alt": text}})
    page = f"<details><summary>The picture in words</summary>{html.escape(text)}</details>"
    display({"text/html": page, "text/plain": text}, raw=True)  # few viewers read the alternative text above


def show(*names, file="ssm_reference.hpp"):
    """Functions, structs, or the comment under a ruled heading, as they stand in the file now."""
    lines = (ROOT / file).read_text().splitlines()
    for name in names:
        first, last = find(lines, name, file)
        code = "\n".join(line for line in lines[first:last + 1] if not line.startswith("// ==="))
        style = "font-family: monospace; font-size: 0.9em; line-height: 1.3; overflow-x: auto"
        page = f'<p><code>{file}</code>, {name}</p><pre style="{style}">{html.escape(code)}</pre>'
        display({"text/html": page, "text/plain": f"{file}, {name}\n\n{code}"}, raw=True)


def find(lines, name, file):
    """First and last line, counted from 0, of what is called so."""
    word = re.escape(name)
    heading, code = rf"// {word}( \(.*)?$", rf"[^/\s#].*\b{word}\(|struct {word}\b"
    found = [i for pattern in (heading, code) for i, line in enumerate(lines) if re.match(pattern, line)]
    if not found:
        raise LookupError(f"{file} has no {name}")
    first = last = found[0]
    if lines[first].startswith("//"):  # a heading between two rules: the comment that follows
        while lines[last + 1].startswith("//"): last += 1
    else:                              # up over template and comment, down to the closing brace
        while lines[first - 1].strip(): first -= 1
        while not lines[last].startswith("}"): last += 1
    return first, last


def cpp(source, flags="-O1"):
    """Compiles C++ with ssm_reference.hpp into a library; its functions take arrays and numbers."""
    path = OUT / (hashlib.sha1((source + flags).encode()).hexdigest()[:8] + ".cpp")
    path.write_text(source)
    subprocess.run([os.environ.get("CXX", "g++"), "-std=c++17", *flags.split(), "-shared", "-fPIC", f"-I{ROOT}",
                    "-isystem", "/usr/include/eigen3", path, "-o", path.with_suffix(".so")], check=True)
    library = ctypes.CDLL(str(path.with_suffix(".so")))

    def call(name, *args, result=None):
        function = getattr(library, name)
        function.restype = result
        return function(*[a.ctypes.data_as(ctypes.c_void_p) if isinstance(a, np.ndarray) else
                          ctypes.c_double(a) if isinstance(a, float) else
                          ctypes.c_long(a) if isinstance(a, int) else a for a in args])
    return call


def mamba(*args, text=""):
    """Runs ./mamba in the project's root: what it printed."""
    run = subprocess.run(["./mamba", *map(str, args)], cwd=ROOT, input=text, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(run.stderr)
    return run.stdout


def safetensors(path):
    """A .safetensors file: 8 bytes of length, a JSON header, and the numbers one after the other."""
    data = Path(path).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    kinds = {"F32": np.float32, "F64": np.float64, "I32": np.int32, "I64": np.int64, "BF16": np.uint16}
    tensors = {}
    for name, t in json.loads(data[8:start]).items():
        if name != "__metadata__":
            first, last = t["data_offsets"]
            array = np.frombuffer(data[start + first:start + last], kinds[t["dtype"]]).reshape(t["shape"])
            if t["dtype"] == "BF16":  # the upper half of a float32
                array = (array.astype(np.uint32) << 16).view(np.float32)
            tensors[name] = array
    return tensors


def tokens_of(ids):
    """The text of each token by itself."""
    stop = "<|endoftext|>"  # token 0 after each, since a token may be the end of a line
    return mamba("tokenize", "--decode", text="".join(f"{i} 0\n" for i in ids)).split(stop + "\n")[:len(ids)]


def plain(axis):
    """Logarithmic axis, ordinary numbers."""
    axis.set_major_locator(plt.matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_locator(plt.NullLocator())


def framed(axis):
    """A frame around a matrix, and no ticks."""
    axis.set(xticks=[], yticks=[])
    for side in axis.spines.values():
        side.set_visible(True)

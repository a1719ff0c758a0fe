#!/usr/bin/env python3
"""Translates a CUDA file of this project to C++ for the emulated GPU of emulate.hpp.

    tests/emulate.py mamba.cu build/emulated/mamba.cu

Three things are not C++: launches become calls of emulated::launch, inline PTX becomes calls of the functions
that say what it does, and a block's dynamic shared memory becomes a pointer. Everything else stays as it is, and
on its line.
"""
import re
import sys

# An instruction, and what stands in its place, in the names of the function around it.
INSTRUCTIONS = [
    ("ex2.approx", "y = emulated::exp2(x);"),
    ("rcp.approx", "y = emulated::reciprocal(x);"),
    ("barrier.sync 1", "emulated::named_barriers[1].wait(threads);"),
    ("bar.sync %0, 128", "emulated::named_barriers[1 + warpgroup].wait(128);"),
    ("wgmma.mma_async", "emulated::multiply_async<T>(d, a, b, add, kTransposed);"),
    ("wgmma.", ";"),
    ("mma.sync", "emulated::mma<T>(D, a, B0, B1);"),
    ("ldmatrix.sync.aligned.m8n8.x4.trans", "emulated::load_matrices(r, address, true);"),
    ("ldmatrix.sync.aligned.m8n8.x4", "emulated::load_matrices(r, address, false);"),
    ("stmatrix.sync.aligned.m8n8.x4.trans", "emulated::store_matrices(address, {r0, r1, r2, r3}, true);"),
    ("stmatrix.sync.aligned.m8n8.x4", "emulated::store_matrices(address, {r0, r1, r2, r3}, false);"),
    ("movmatrix", "r = emulated::transpose_matrix(r);"),
    ("cp.async.cg", "emulated::copy_async(to, from, 16, valid);"),
    ("cp.async.ca", "emulated::copy_async(to, from, kBytes, valid);"),
    ("cp.async.commit_group", "emulated::copy_async_commit();"),
    ("cp.async.wait_all", "emulated::copy_async_commit(), emulated::copy_async_wait(0);"),
    ("cp.async.wait_group", "emulated::copy_async_wait(kPending);"),
    ("griddepcontrol", ";"),
    ("setmaxnreg", ";"),
    ("fence.proxy", ";"),
    ("prefetch.global", ";"),
]


def closing(text, start):
    """The index after the parenthesis that closes the one at text[start], strings skipped."""
    depth, quoted = 0, False
    for i in range(start, len(text)):
        if text[i] == '"' and text[i - 1] != "\\":
            quoted = not quoted
        elif not quoted and text[i] in "([{":
            depth += 1
        elif not quoted and text[i] in ")]}":
            depth -= 1
            if depth == 0:
                return i + 1
    raise SystemExit(f"emulate.py: no end of {text[start:start + 60]!r}")


def split_arguments(text):
    parts, depth = [""], 0
    for c in text:
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return parts


def replace_assembly(text):
    result, end = "", 0
    for match in re.finditer(r"\basm(?: volatile)?\s*\(", text):
        if match.start() < end:
            continue
        stop = text.index(";", closing(text, match.end() - 1)) + 1
        statement = text[match.start():stop]
        code = next((code for instruction, code in INSTRUCTIONS if instruction in statement), None)
        if code is None:
            raise SystemExit(f"emulate.py: expected one of {[i for i, _ in INSTRUCTIONS]}, found {statement!r}")
        line_end = "\\\n" if "\\\n" in statement else "\n"  # of a macro, or not
        result += text[end:match.start()] + code + line_end * statement.count("\n")
        end = stop
    return result + text[end:]


def replace_launches(text):
    while "<<<" in text:
        at = text.index("<<<")
        name = re.search(r"[\w:]+(<[^<>]*>)?$", text[:at]).group()
        stop = text.index(">>>", at)
        grid, threads, *rest = split_arguments(text[at + 3:stop])
        end = closing(text, stop + 3)
        arguments = text[stop + 4:end - 1]
        text = (text[:at - len(name)] + f"emulated::launch([=](auto... p) {{ {name}(p...); }}, dim3({grid}), "
                f"{threads}, {rest[0] if rest else 0}, {arguments})" + text[end:])
    # launch_early
    at = text.find("  cudaLaunchAttribute overlap = {};")
    if at < 0:
        return text
    stop = text.index(";", text.index("cudaLaunchKernelEx(", at)) + 1
    call = "  emulated::launch(kernel, blocks, threads, shared_bytes, Parameters(arguments)...);"
    return text[:at] + call + "\n" * text[at:stop].count("\n") + text[stop:]


def translate(text):
    text = re.sub(r"#include <((cuda_\w+|cublas_v2)\.h|cub/[\w/]+\.cuh)>", '#include "emulate.hpp"', text)
    text = re.sub(r"extern __shared__ (?:__align__\(\d+\) )?([\w ]+?) (\w+)\[\];",
                  r"\1* \2 = reinterpret_cast<\1*>(emulated::shared_memory);", text)
    return replace_launches(replace_assembly(text))


if __name__ == "__main__":
    with open(sys.argv[1]) as source:
        translated = translate(source.read())
    with open(sys.argv[2], "w") as target:
        target.write(f'#line 1 "{sys.argv[1]}"\n' + translated)

#!/usr/bin/env python3
"""Checks README.md and tests/README.md.

Links: [`name`](file#L12) must point to the first line of code that has the name, a function's where it is first followed by
its arguments: files define before they use. Program: README.md's block of C++ must compile, and print a rounding error.
Size: README.md has at most 130 lines, of at most 120 characters.

Usage: check_readme.py [--fix|--names]      (run from the repository's root)
--fix rewrites the line numbers; --names only asks that each name is there, since lines move with every change.
"""
import os
import re
import subprocess
import sys
import tempfile

LINK = re.compile(r"\[(`?)([^\]\[]+?)\1\]\(([^)#\s]+)(?:#L(\d+))?\)")


def first_line(lines, name, is_code):
    """Where the code, comments apart, first has the name as a whole word."""
    end = r"\(" if is_code and name.isidentifier() else r"(?![A-Za-z0-9_])"
    word = re.compile(rf"(?<![A-Za-z0-9_]){re.escape(name)}{end}")
    for number, line in enumerate(lines, 1):
        if word.search(re.sub(r"(^|\s)//.*", "", line)):
            return number
    return None


def check(text, folder, fix, names):
    """The text with its links mended if asked to, how many have lines, and what is wrong."""
    files, wrong, lines_linked = {}, [], 0

    def visit(link):
        nonlocal lines_linked
        tick, name, target, line = link.groups()
        if target.startswith(("http:", "https:")):
            return link.group(0)
        path = os.path.normpath(os.path.join(folder, target))
        if not os.path.exists(path):
            wrong.append(f"{path}: no such file")
            return link.group(0)
        if line is None:
            return link.group(0)
        lines_linked += 1
        if path not in files:
            files[path] = open(path, encoding="utf-8").read().splitlines()
        found = first_line(files[path], name, bool(tick))
        if found is None:
            wrong.append(f"{path}: nothing there is named {name!r}")
        elif found != int(line) and not fix and not names:
            wrong.append(f"{path}: {name!r}: expected at line {line}, found at line {found}")
        return f"[{tick}{name}{tick}]({target}#L{found or line})"

    return LINK.sub(visit, text), lines_linked, wrong


def check_program(text):
    """What is wrong with the page's one block of C++: it compares two ways to compute the same."""
    blocks = re.findall(r"^```cpp\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    if len(blocks) != 1:
        return [f"expected one block of C++, found {len(blocks)}"]
    with tempfile.TemporaryDirectory() as folder:
        program = os.path.join(folder, "two_ways")
        compiler = [os.environ.get("CXX", "g++"), "-std=c++17", "-I.", "-isystem", "/usr/include/eigen3"]
        built = subprocess.run([*compiler, "-x", "c++", "-", "-o", program], input=blocks[0], text=True)
        if built.returncode:
            return ["its program does not compile"]
        printed = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    return [] if 0 < float(printed) < 1e-12 else [f"its program: expected a rounding error, found {printed.strip()}"]


def check_size(text):
    lines = text.splitlines()
    wrong = [f"line {n}: expected at most 120 characters, found {len(line)}" for n, line in enumerate(lines, 1) if len(line) > 120]
    return wrong + ([f"expected at most 130 lines, found {len(lines)}"] if len(lines) > 130 else [])


def main():
    failed, fix, names = False, "--fix" in sys.argv[1:], "--names" in sys.argv[1:]
    for page in ("README.md", "tests/README.md"):
        with open(page, encoding="utf-8") as f:
            text = f.read()
        mended, links, wrong = check(text, os.path.dirname(page), fix, names)
        if page == "README.md":
            wrong += check_size(text) + check_program(text)
        for line in wrong:
            print(f"{page}: {line}")
        if fix and mended != text:
            with open(page, "w", encoding="utf-8") as f:
                f.write(mended)
        print(f"{page}: {links} links to lines, {len(wrong)} wrong")
        failed = failed or bool(wrong) or not links
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

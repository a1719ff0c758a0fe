#!/usr/bin/env python3
"""Plants the bugs of bugs.txt one by one in a copy of the project: the tests named there have to notice.

    tests/mutants/run.py [--seconds N] [WORD...]     all, or those with one of the words in their text

With --seconds, as many as fit into that time, beginning each day where another day's run would not. A bug that no
test notices is a failure; so is one whose text no longer stands in its file exactly once. The tests as they are have
to pass first: build/tests, and build/emulated/tests_cuda for kernels, which are left out where that was not built.
"""
import argparse
import os
import re
import shutil
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
COPY = os.path.join(ROOT, "build", "mutants")
CXX = os.environ.get("CXX", "g++").split()
LIBS = os.environ.get("LIBS", "-isystem /usr/include/eigen3 -ltbb -lpcre2-8 -lutf8proc").split()
CUDA = ["-isystem", os.environ.get("CUDA_INCLUDE", "/usr/local/cuda/include")]


def read_bugs(path):
    bugs = []
    for block in re.split(r"\n\s*\n", open(path).read()):
        lines = [line for line in block.split("\n") if line and not line.startswith("#")]
        if not lines:
            continue
        bug, key = {"what": lines[0], "-": [], "+": []}, None
        for line in lines[1:]:
            word, _, rest = line.strip().partition(" ")
            if word in ("from", "file", "test") and line.startswith("  " + word):
                key, bug[word] = word, rest.strip()
            elif line.startswith(("  - ", "  +")):
                key = word
                bug[key].append(rest.strip())
            else:
                bug[key].append(line.strip())
        bug["test"], _, bug["names"] = bug["test"].partition(" ")
        bugs.append(bug)
    return bugs


def plant(bug, text):
    """the text with the bug in it"""
    old = re.compile(r"\s*\n\s*".join(map(re.escape, bug["-"])))
    found = len(old.findall(text))
    if found != 1:
        raise ValueError(f"{bug['file']}: expected the text once, found it {found} times: {bug['-'][0]}")
    return old.sub(lambda _: "\n".join(bug["+"]), text)


def names(bug):
    """for Catch2, where a comma stands between names"""
    return bug["names"].strip().replace(",", "\\,").replace(" | ", ",")


def run(command, **options):
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
        return done.returncode, done.stdout.decode(errors="replace")
    except subprocess.TimeoutExpired:
        return -1, "no end within the time that it had"


def run_tests(program, bug, limit=300):
    """cwd is the project: the tests look for their data there"""
    return run([program, "--warn", "NoTests", names(bug)], cwd=ROOT, timeout=limit)


def program_as_it_is(bug):
    return os.path.join(ROOT, "build", "emulated/tests_cuda" if bug["test"].endswith(".cu") else "tests")


def build(bug):
    """the test program with the bug in it"""
    shutil.rmtree(COPY, ignore_errors=True)
    os.makedirs(os.path.join(COPY, "tests"))
    for folder in ("", "tests"):
        for name in os.listdir(os.path.join(ROOT, folder)):
            if name.endswith((".hpp", ".h", ".cpp", ".cu")):
                shutil.copy(os.path.join(ROOT, folder, name), os.path.join(COPY, folder, name))
    path = os.path.join(COPY, bug["file"])
    text = plant(bug, open(path).read())
    open(path, "w").write(text)
    source, flags, objects = os.path.join("tests", bug["test"]), ["-std=c++17", "-w", "-I.", "-Itests"], []
    if source.endswith(".cu"):
        os.makedirs(os.path.join(COPY, "emulated"))
        for cuda, cpp in (("mamba.cu", "emulated/mamba.cu"), (source, "emulated/test.cpp")):
            code, out = run([sys.executable, os.path.join(ROOT, "tests", "emulate.py"), cuda, cpp], cwd=COPY)
            if code:
                return None, out
        source, flags = cpp, ["-O1", "-Iemulated", *flags, *CUDA]  # at -O0 the fibers' stacks are too small
        objects = [os.path.join(ROOT, "build", "emulated", "emulate_runtime.o")]
    program = os.path.join(COPY, "program")
    code, out = run([*CXX, *flags, source, *objects, os.path.join(ROOT, "build", "main.o"), "-o", program, *LIBS,
                     *CATCH2], cwd=COPY)
    return (None, out) if code else (program, out)


# Catch2 v3 has a library.
CATCH2 = ["-lCatch2Main", "-lCatch2"] if os.path.exists("/usr/include/catch2/catch_all.hpp") else []


def judge(bug):
    """'noticed', or what is wrong"""
    code, out = run_tests(program_as_it_is(bug), bug)
    if code:
        return "the test fails without it: " + out[-300:]
    program, out = build(bug)
    if program is None:
        return "does not compile: " + "".join(line for line in out.splitlines(True) if "error" in line)[:300]
    code, out = run_tests(program, bug)
    return "noticed" if code else "SURVIVED: no test noticed it"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, help="as many as fit, in turn")
    parser.add_argument("words", nargs="*")
    options = parser.parse_args()
    bugs, failed, started = read_bugs(os.path.join(ROOT, "tests", "mutants", "bugs.txt")), 0, time.time()
    fits = []
    for bug in bugs:  # all of them on every run: a change of the sources is seen at once
        try:
            plant(bug, open(os.path.join(ROOT, bug["file"])).read())
            fits.append(bug)
        except ValueError as error:
            print(f"FAILED: {bug['what']}: {error}")
            failed += 1
    chosen = [b for b in fits if not options.words or any(w in str(b) for w in options.words)]
    built = [b for b in chosen if os.path.exists(program_as_it_is(b))]
    if options.seconds and built:
        first = int(time.time() // 86400) * 5 % len(built)
        built = built[first:] + built[:first]
    done, longest = 0, 0.0
    for bug in built:
        begin = time.time()
        if options.seconds and done and begin - started + longest > options.seconds:
            break
        answer = judge(bug)
        longest, done, failed = max(longest, time.time() - begin), done + 1, failed + (answer != "noticed")
        print(f"{time.time() - begin:5.0f} s  {bug['what']}: {answer}", flush=True)
    left = f", {len(chosen) - len(built)} left out: their tests are not built" if len(chosen) > len(built) else ""
    print(f"mutants: {done} of {len(chosen)} planted, {failed} failed{left}")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Claims about the files, pipes and descriptors that a program is given to read and to write.

Usage: test_outputs.py PROGRAM      (standard library only; run from the repository's root)
"""
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time

from claims import claim, end

PROGRAM = os.path.abspath(sys.argv[1])
STORIES = os.path.abspath("weights/stories")

# A system without O_TMPFILE, for programs that are not sanitized: open() refuses it.
NO_TMPFILE = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
static int refuse(const char* name, const char* path, int flags, va_list rest) {
  int (*real)(const char*, int, ...) = dlsym(RTLD_NEXT, name);
  if ((flags & O_TMPFILE) == O_TMPFILE) return errno = EOPNOTSUPP, -1;
  return real(path, flags, (flags & O_CREAT) ? va_arg(rest, int) : 0);
}
int open(const char* path, int flags, ...) {
  va_list rest;
  va_start(rest, flags);
  return refuse("open", path, flags, rest);
}
int open64(const char* path, int flags, ...) {
  va_list rest;
  va_start(rest, flags);
  return refuse("open64", path, flags, rest);
}
"""


def run(*arguments, **more):
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 120}
    r = subprocess.run([PROGRAM, *map(str, arguments)], **{**options, **more})
    return r.returncode, (r.stdout or b"").decode(), (r.stderr or b"").decode()


def in_shell(command, **more):
    r = subprocess.run(["sh", "-c", command, "sh", PROGRAM], capture_output=True, timeout=120, **more)
    return r.returncode, r.stdout.decode(), r.stderr.decode()


def one_line(name, result, fragment):
    code, out, err = result
    claim(name, code == 1 and not out and err.count("\n") == 1 and fragment in err, result)


def writes(folder, **more):
    """Claims about one way of writing; the same must hold where O_TMPFILE does not exist."""
    at = lambda name: os.path.join(folder, name)
    logits = lambda path, **options: run("logits", "--ids", "1 2 3", "--out", path, **{**more, **options})
    mode = lambda name: stat.S_IMODE(os.stat(at(name)).st_mode)
    os.mkdir(folder)

    code, _, err = logits(at("new"), preexec_fn=lambda: os.umask(0o027))
    claim("a new file has the user's mode", code == 0 and mode("new") == 0o640, (err, oct(mode("new"))))
    whole = open(at("new"), "rb").read()
    os.chmod(at("new"), 0o600)
    logits(at("new"))
    claim("a file that is replaced keeps its mode", mode("new") == 0o600, oct(mode("new")))
    os.symlink("target", at("link"))
    for when in ("a link's target is made", "a link's target is replaced"):
        logits(at("link"))
        claim(when, os.path.islink(at("link")) and open(at("target"), "rb").read() == whole)

    def small_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then writing fails, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
    before = sorted(os.listdir(folder))
    for name in ("new", "never"):
        one_line("a full disk is one line", logits(at(name), preexec_fn=small_files, restore_signals=False), at(name))
    claim("a full disk leaves the old file, and nothing new", sorted(os.listdir(folder)) == before
          and open(at("new"), "rb").read() == whole, os.listdir(folder))
    shutil.rmtree(folder)


with tempfile.TemporaryDirectory() as folder:
    at = lambda name: os.path.join(folder, name)
    writes(at("anonymous"))
    if shutil.which("cc") and "debug" not in PROGRAM and sys.platform == "linux":
        with open(at("no_tmpfile.c"), "w") as f:
            f.write(NO_TMPFILE)
        subprocess.run(["cc", "-shared", "-fPIC", at("no_tmpfile.c"), "-o", at("no_tmpfile.so"), "-ldl"], check=True)
        writes(at("parts"), env={**os.environ, "LD_PRELOAD": at("no_tmpfile.so")})

    # --- killed ---
    os.mkdir(at("killed"))
    for delay in range(1, 30):
        p = subprocess.Popen([PROGRAM, "logits", "--ids", " ".join(["7"] * 3000), "--out", at("killed/l")],
                             stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(delay / 150)
        p.kill()
        p.wait()
        if os.listdir(at("killed")) not in ([], ["l"]):
            break
    claim("SIGKILL leaves nothing half-written", os.listdir(at("killed")) in ([], ["l"]), os.listdir(at("killed")))

    # --- pipes, descriptors, devices ---
    with open(at("ids"), "w") as f:
        f.write(" ".join(str(i % 90) for i in range(40)))
    table = ("perplexity", "--ids-file", at("ids"))
    run(*table, "--csv", at("csv"))
    csv = open(at("csv")).read()
    os.mkfifo(at("pipe"))
    read = []
    reader = threading.Thread(target=lambda: read.append(open(at("pipe")).read()), daemon=True)
    reader.start()
    code, _, err = run(*table, "--csv", at("pipe"))
    reader.join(20)
    claim("a pipe is written through", code == 0 and read == [csv] and stat.S_ISFIFO(os.stat(at("pipe")).st_mode), (read, err))
    code, out, err = run(*table, "--csv", "/dev/stdout")
    claim("--csv /dev/stdout follows what is printed", code == 0 and out.endswith(csv) and len(out) > len(csv), (out, err))
    with open(at("log"), "w") as f:
        f.write("kept\n")
    for name in ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"):
        before = open(at("log")).read()
        with open(at("log"), "a") as log:
            run(*table, "--csv", name, stdout=log)
        after = open(at("log")).read()
        claim(f"--csv {name} >>log goes on with the log", after.startswith(before) and after.endswith(csv), after)
    code, _, err = run("logits", "--ids", "1", "--out", "/dev/full")
    one_line("a full device is one line", (code, "", err), "No space left")

    # --- standard input and output that are closed, or folders ---
    command = '"$1" perplexity --text - '
    one_line("a closed standard input", in_shell(command + "<&-"), "standard input: Bad file descriptor")
    one_line("a folder as standard input", in_shell(command + "</"), "standard input: Is a directory")
    one_line("tokenize: a closed standard input", in_shell('"$1" tokenize <&-'), "cannot read: standard input")
    one_line("tokenize: a folder as standard input", in_shell('"$1" tokenize </'), "cannot read: standard input")
    code, _, err = in_shell(f'"$1" logits --ids "1 2" --out {at("alone")} >&- 2>&-')
    header = open(at("alone"), "rb").read()
    claim("an output is not written into by a closed standard output", code in (0, 1)
          and json.loads(header[8:8 + int.from_bytes(header[:8], "little")]), header[:80])
    one_line("a closed standard output", in_shell('"$1" info >&-'), "cannot write to standard output")

    # --- pipes as inputs ---
    def feed(text):
        with open(at("pipe"), "w") as f:
            f.write(text)
    threading.Thread(target=feed, args=(open(at("ids")).read(),), daemon=True).start()
    whole = run(*table)
    claim("a text may come out of a pipe", run("perplexity", "--ids-file", at("pipe")) == whole, whole)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        shutil.copytree(STORIES, at("model"))
        os.remove(at("model/" + name))
        os.mkfifo(at("model/" + name))
        one_line(f"a pipe as {name} is one line, at once", run("generate", "--model", at("model"), "--prompt", "x"), "found a pipe")
        shutil.rmtree(at("model"))
    for what, text in (("an empty file", ""), ("a Git LFS pointer", "version https://git-lfs.github.com/spec/v1\noid"),
                       ("a web page", "<html>")):
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            shutil.copytree(STORIES, at("model"))
            os.remove(at("model/" + name))
            with open(at("model/" + name), "w") as f:
                f.write(text)
            one_line(f"{what} as {name}", run("generate", "--model", at("model"), "--prompt", "x"), "found " + what)
            shutil.rmtree(at("model"))
    one_line("a pipe as a saved state", run("generate", "--load-state", at("pipe")), "found a pipe")

end(PROGRAM)

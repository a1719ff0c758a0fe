#!/usr/bin/env python3
"""weights/fetch.sh against a small Hugging Face Hub on this machine. Standard library only.

The hub answers on 127.0.0.1; large files are redirected to a second server under another
name (localhost) and port, as the Hub redirects to its CDN. Faults are knobs of the hub.
"""

import hashlib
import http.server
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

ROOT = os.environ.get("MAMBA_ROOT") or os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FETCH = os.path.join(ROOT, "weights", "fetch.sh")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_SecretSecretSecret"


def noise(name, size):
    return random.Random(name).randbytes(size)


CONFIG = b'{"model_type": "mamba2", "time_step_limit": [0.0, Infinity]}\n'
WEIGHTS = noise("weights", 300_000)
SHARDS = {f"model-0000{i}-of-00002.safetensors": noise(i, 50_000) for i in (1, 2)}
INDEX = json.dumps({"weight_map": {"a": list(SHARDS)[0], "b": list(SHARDS)[1],
                                   "c": list(SHARDS)[0]}}).encode()
MODELS = {
    "lab/hf": {"config.json": CONFIG, "model.safetensors": WEIGHTS, "README.md": b"no\n",
               "pytorch_model.bin": b"not wanted", "tokenizer.json": noise("t", 9_000),
               "generation_config.json": b"{}\n"},
    "lab/sharded": {"config.json": CONFIG, "model.safetensors.index.json": INDEX,
                    "tokenizer.json": b'{"model": 1}', **SHARDS},
    "lab/original": {"config.json": b'{"d_model": 8}', "pytorch_model.bin": WEIGHTS},
    "lab/hostile": {"config.json": CONFIG, "tokenizer.json": b"{}",
                    "model.safetensors.index.json":
                    b'{"weight_map": {"a": "../../evil.safetensors"}}'},
    "lab/empty": {"config.json": CONFIG},
    "EleutherAI/gpt-neox-20b": {"config.json": b"{}", "tokenizer.json": b'{"neox": 1}',
                                "model.safetensors": b"twenty billion"},
}


class Hub:
    """Both servers, what they were asked, and what goes wrong."""

    def __init__(self):
        self.requests = []       # (server, path, headers)
        self.arguments = ""      # command lines seen in /proc while a request was open
        self.status = {}         # name: HTTP statuses to answer with, first to last
        self.truncate = {}       # name: sizes to break off after, first to last
        self.replace = {}        # name: bytes sent instead of the file
        self.announce = {}       # name: fields of its entry in the listing
        self.ignore_range = False
        self.stall = None        # name whose transfer stops half-way until the client leaves
        self.stalled = threading.Event()
        self.endless = None      # name (or "api") whose body goes on until the client leaves
        self.sent = 0            # bytes of it
        self.revisions = []
        self.need_token = False
        self.servers = {}
        for server in ("hub", "cdn"):
            handler = type("Handler", (Handler,), {"hub": self, "server_name": server})
            self.servers[server] = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
            threading.Thread(target=self.servers[server].serve_forever, args=(0.05,),
                             daemon=True).start()
        self.url = f"http://127.0.0.1:{self.servers['hub'].server_port}"
        self.cdn_url = f"http://localhost:{self.servers['cdn'].server_port}"

    def close(self):
        for server in self.servers.values():
            server.shutdown()
            server.server_close()

    def entry(self, name, content):
        entry = {"rfilename": name, "size": len(content), "blobId": hashlib.sha1(
            b"blob %d\0" % len(content) + content).hexdigest()}
        if name.endswith((".safetensors", ".bin")):
            entry["lfs"] = {"size": len(content), "pointerSize": 134,
                            "sha256": hashlib.sha256(content).hexdigest()}
            entry["blobId"] = "f" * 40  # the pointer's, not the file's
        return {**entry, **self.announce.get(name, {})}

    def downloads(self, server="hub"):
        return [path.split("/")[-1] for where, path, _ in self.requests
                if where == server and "/api/" not in path]


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        hub, path = self.hub, self.path
        hub.requests.append((self.server_name, path, dict(self.headers)))
        if self.headers.get("Authorization"):
            hub.arguments += command_lines()
        if path.startswith("/api/models/"):
            return self.listing(*path[len("/api/models/"):].split("/revision/"))
        if path.startswith("/cache/"):
            repo, name = path[len("/cache/"):].rsplit("/", 1)
        else:
            repo, rest = path[1:].split("/resolve/")
            commit, name = rest.split("/", 1)
            assert commit == COMMIT, commit
        if self.fails(name) or self.unauthorized():
            return None
        content = MODELS[repo][name]
        if not path.startswith("/cache/"):  # large files to the CDN, small ones to a cache here
            big = "lfs" in hub.entry(name, content)
            self.send_response(302 if big else 307)
            self.send_header("Location", f"{hub.cdn_url if big else ''}/cache/{repo}/{name}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        return self.body(name, hub.replace.get(name, content))

    def listing(self, repo, query):
        revision, _, arguments = query.partition("?")
        assert arguments == "blobs=true", arguments
        self.hub.revisions.append(revision)
        if self.fails("api") or self.unauthorized():
            return
        if repo not in MODELS:
            return self.send_error(404 if self.headers.get("Authorization") else 401)
        files = [self.hub.entry(name, content) for name, content in MODELS[repo].items()]
        listing = json.dumps({"sha": COMMIT, "siblings": files}).encode()
        self.body("api", self.hub.replace.get("api", listing))

    def fails(self, name):
        if self.server_name == "cdn" or not self.hub.status.get(name):
            return False
        self.send_error(self.hub.status[name].pop(0))
        return True

    def unauthorized(self):
        if not self.hub.need_token or self.server_name == "cdn":
            return False
        if self.headers.get("Authorization") == "Bearer " + TOKEN:
            return False
        self.send_error(401)
        return True

    def body(self, name, content):
        hub, first = self.hub, 0
        if hub.endless == name:
            self.send_response(200)
            self.end_headers()
            try:
                for hub.sent in range(0, 100_000_000, 100_000):
                    self.wfile.write(bytes(100_000))
            except OSError:
                pass
            self.close_connection = True
            return None
        asked = self.headers.get("Range")
        if asked and not hub.ignore_range:
            first = int(asked[len("bytes="):].rstrip("-"))
            if first >= len(content):
                return self.send_error(416)
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range",
                             f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()
        if hub.truncate.get(name):
            content = content[: max(first, hub.truncate[name].pop(0))]
        if hub.stall == name:
            content = content[: len(content) // 2]
        self.wfile.write(content[first:])
        if hub.stall == name:
            self.wfile.flush()
            hub.stalled.set()
            self.connection.settimeout(20)
            self.connection.recv(1)
        self.close_connection = True


def command_lines():
    lines = []
    for pid in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else []):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                lines.append(file.read().decode(errors="replace"))
        except OSError:
            pass
    return "\n".join(lines)


class Case:
    """One test's hub, its empty home, and the folder that is fetched into."""

    def __init__(self, folder):
        self.hub, self.home, self.dir = Hub(), folder, os.path.join(folder, "model")

    def environment(self, **more):
        keep = {k: v for k, v in os.environ.items()
                if not k.startswith(("HF_", "HUGGING", "XDG_")) and "proxy" not in k.lower()}
        return {**keep, "HOME": self.home, "HF_ENDPOINT": self.hub.url, "FETCH_DELAY": "0",
                "FETCH_TRIES": "3", **more}

    def fetch(self, model, *, limit=None, arguments=None, **environment):
        def limit_file_size():
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        return subprocess.run(
            [FETCH, model, self.dir] if arguments is None else [FETCH, *arguments],
            env=self.environment(**environment), capture_output=True, text=True, timeout=60,
            preexec_fn=limit_file_size if limit else None,
            restore_signals=not limit)  # SIGXFSZ stays ignored: writing fails as on a full disk

    def fetched(self, model, **more):
        result = self.fetch(model, **more)
        assert result.returncode == 0, result.stderr
        assert result.stdout == self.dir + "\n", result.stdout
        return result

    def refused(self, model, *words, kept=(), code=1, **more):
        """Ends with code, the reason in the last line, and no file left but those kept."""
        result = self.fetch(model, **more)
        assert result.returncode == code, (result.returncode, result.stderr)
        assert result.stdout == "", result.stdout
        *progress, last = result.stderr.splitlines()
        assert last.startswith("fetch.sh: "), result.stderr
        assert all(word in last for word in words), (words, last)
        for line in progress:  # nothing but "name: N bytes" and its like
            assert line.startswith("fetch.sh: ") and "curl" not in line, line
        assert self.names() == sorted(kept), self.names()
        return result

    def names(self):
        return sorted(os.listdir(self.dir)) if os.path.isdir(self.dir) else []

    def read(self, name):
        with open(os.path.join(self.dir, name), "rb") as file:
            return file.read()

    def write(self, name, content):
        os.makedirs(self.dir, exist_ok=True)
        with open(os.path.join(self.dir, name), "wb") as file:
            file.write(content)

    def equals(self, model, names):
        assert self.names() == sorted(names), self.names()
        for name in names:
            source = MODELS[model].get(name, MODELS["EleutherAI/gpt-neox-20b"].get(name))
            assert self.read(name) == source, name


HF_NAMES = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
SMALL = [name for name in HF_NAMES if name != "model.safetensors"]
TESTS = []


def test(claim):
    return lambda function: TESTS.append((claim, function))


@test("a Hugging Face model arrives whole, and nothing besides")
def _(case):
    case.fetched("lab/hf")
    case.equals("lab/hf", HF_NAMES)
    assert set(case.hub.revisions) == {"main"}


@test("a sharded model arrives with its index, each shard once")
def _(case):
    case.fetched("lab/sharded")
    case.equals("lab/sharded", list(MODELS["lab/sharded"]))
    assert sorted(case.hub.downloads("cdn")) == sorted(SHARDS)


@test("an original model gets GPT-NeoX's tokenizer and none of its weights")
def _(case):
    case.fetched("lab/original")
    case.equals("lab/original", ["config.json", "pytorch_model.bin", "tokenizer.json"])


@test("a revision is asked for by its quoted name")
def _(case):
    case.fetched("lab/hf@refs/pr/1")
    assert case.hub.revisions == ["refs%2Fpr%2F1"], case.hub.revisions


@test("what is there and right is not downloaded again; what is wrong is")
def _(case):
    case.fetched("lab/hf")
    case.write("config.json", CONFIG.replace(b"2", b"3"))
    before = len(case.hub.downloads())
    assert case.fetched("lab/hf").stderr.count("already here") == 3
    assert set(case.hub.downloads()[before:]) == {"config.json"}
    case.equals("lab/hf", HF_NAMES)


@test("HF_TOKEN opens a model; it reaches neither the CDN, nor the output, nor ps")
def _(case):
    case.hub.need_token = True
    result = case.fetched("lab/hf", HF_TOKEN=TOKEN)
    case.equals("lab/hf", HF_NAMES)
    assert "model.safetensors" in case.hub.downloads("cdn")
    for server, path, headers in case.hub.requests:
        sent = headers.get("Authorization")
        assert sent == (f"Bearer {TOKEN}" if server == "hub" else None), (server, path, sent)
        assert server == "hub" or TOKEN not in str(headers)
    assert TOKEN not in result.stdout + result.stderr
    assert "curl" in case.hub.arguments or not os.path.isdir("/proc")
    assert TOKEN not in case.hub.arguments


@test("a token file is found where the Hub's tools keep it")
def _(case):
    case.hub.need_token = True
    places = {".cache/huggingface/token": {}, "x/huggingface/token": {"XDG_CACHE_HOME": "x"},
              "h/token": {"HF_HOME": "h"}, "mine": {"HF_TOKEN_PATH": "mine"}}
    for place, variables in places.items():
        path = os.path.join(case.home, place)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w") as file:
            file.write(TOKEN + "\n")
        case.fetched("lab/hf", **{k: os.path.join(case.home, v) for k, v in variables.items()})
        os.remove(path)
    case.refused("lab/hf", "HF_TOKEN", kept=HF_NAMES)


@test("a part of the file is continued, not loaded again")
def _(case):
    case.write("model.safetensors.part", WEIGHTS[:123_457])
    case.fetched("lab/hf")
    case.equals("lab/hf", HF_NAMES)
    ranges = [h.get("Range") for s, p, h in case.hub.requests if s == "cdn"]
    assert ranges == ["bytes=123457-"], ranges


@test("a part that is whole needs no download")
def _(case):
    case.write("model.safetensors.part", WEIGHTS)
    case.fetched("lab/hf")
    assert case.hub.downloads("cdn") == []
    case.equals("lab/hf", HF_NAMES)


@test("a part of something else, or one too long, is thrown away")
def _(case):
    for wrong in (b"something else", WEIGHTS + b"more", WEIGHTS[::-1]):
        shutil.rmtree(case.dir, ignore_errors=True)
        case.write("model.safetensors.part", wrong)
        case.fetched("lab/hf")
        case.equals("lab/hf", HF_NAMES)


@test("a server without ranges makes it start again")
def _(case):
    case.hub.ignore_range = True
    case.write("model.safetensors.part", WEIGHTS[:1000])
    case.fetched("lab/hf")
    case.equals("lab/hf", HF_NAMES)


@test("a broken transfer goes on where it broke, as often as it gets further")
def _(case):
    case.hub.truncate["model.safetensors"] = [50_000, 100_000, 150_000, 200_000, 250_000]
    case.fetched("lab/hf")
    case.equals("lab/hf", HF_NAMES)
    ranges = [h.get("Range") for s, p, h in case.hub.requests if s == "cdn"]
    assert ranges == [None] + [f"bytes={n}0000-" for n in (5, 10, 15, 20, 25)], ranges


@test("a body that stays truncated is refused and kept as a part")
def _(case):
    case.hub.truncate["model.safetensors"] = [1000] * 99
    case.refused("lab/hf", "model.safetensors", "expected 300000 bytes, found 1000",
                 kept=[*SMALL, "model.safetensors.part"])
    case.hub.truncate.clear()
    case.fetched("lab/hf")
    case.equals("lab/hf", HF_NAMES)


@test("a file that is shorter or longer on the server than listed is refused")
def _(case):
    case.hub.replace["model.safetensors"] = WEIGHTS[:-1]
    case.refused("lab/hf", "expected 300000 bytes", "299999",
                 kept=[*SMALL, "model.safetensors.part"])
    os.remove(os.path.join(case.dir, "model.safetensors.part"))
    for more in (1, 1000, 3_000_000):
        case.hub.replace["model.safetensors"] = WEIGHTS + bytes(more)
        case.refused("lab/hf", "model.safetensors: expected 300000 bytes, found more", kept=SMALL)


@test("a body without an end is cut off at the listed size")
def _(case):
    case.hub.endless = "model.safetensors"
    case.refused("lab/hf", "expected 300000 bytes, found more", kept=SMALL)
    assert case.hub.sent < 30_000_000, case.hub.sent  # some lie in the sockets' buffers
    case.hub.endless = "api"
    case.refused("lab/hf", "lab/hf", kept=SMALL)
    assert case.hub.sent < 50_000_000, case.hub.sent


@test("a server that sends a byte a connection, or nothing more, is given up in time")
def _(case):
    case.fetched("lab/hf")  # the small files stay: only the weights are under the short patience
    os.remove(os.path.join(case.dir, "model.safetensors"))
    case.hub.truncate["model.safetensors"] = list(range(1, 100_000))
    case.refused("lab/hf", "model.safetensors: too slow: expected 300000 bytes in 4 seconds",
                 kept=[*SMALL, "model.safetensors.part"], FETCH_PATIENCE="1")
    case.hub.truncate.clear()
    case.hub.stall = "model.safetensors"
    case.refused("lab/hf", "too slow", kept=[*SMALL, "model.safetensors.part"], FETCH_PATIENCE="0")


@test("a size that no file has is refused")
def _(case):
    for size in (2**63 - 1, 2**63, 2**64, 10**40, -1, 1.5, "", None):
        case.hub.announce["model.safetensors"] = {"lfs": {"size": size, "sha256": "0" * 64}}
        case.refused("lab/hf", "model.safetensors", "gives no size and checksum", kept=SMALL)


@test("a folder with the name of a file is refused, and stays as it is")
def _(case):
    for name in ("model.safetensors", "config.json"):
        shutil.rmtree(case.dir, ignore_errors=True)
        os.makedirs(os.path.join(case.dir, name))
        case.refused("lab/hf", name + ": expected a file or nothing, found a folder",
                     kept=[name] if name == "config.json" else HF_NAMES)
        assert os.listdir(os.path.join(case.dir, name)) == []


@test("a wrong SHA-256 is refused and leaves the old file as it was")
def _(case):
    case.hub.replace["model.safetensors"] = b"X" + WEIGHTS[1:]
    case.refused("lab/hf", "model.safetensors", "wrong sha256 checksum", kept=SMALL)
    case.write("model.safetensors", b"old")
    case.refused("lab/hf", "wrong sha256 checksum", kept=HF_NAMES)
    assert case.read("model.safetensors") == b"old"


@test("a wrong git id of a small file is refused")
def _(case):
    case.hub.replace["config.json"] = CONFIG.replace(b"2", b"3")
    case.refused("lab/hf", "config.json", "wrong git checksum")


@test("HTTP 500, 503 and 429 are tried again, the listing and the files")
def _(case):
    case.hub.status = {"api": [500, 503], "model.safetensors": [429, 500]}
    case.fetched("lab/hf")
    case.equals("lab/hf", HF_NAMES)


@test("HTTP 500 for ever is one line")
def _(case):
    case.hub.status = {"api": [500] * 3}
    case.refused("lab/hf", "lab/hf", "HTTP 500")
    case.hub.status = {"model.safetensors": [503] * 9}
    case.refused("lab/hf", "model.safetensors", "HTTP 503",
                 kept=[*SMALL, "model.safetensors.part"])


@test("401, 403 and 404 say what to do, at once")
def _(case):
    case.refused("lab/nothing", "lab/nothing", "set HF_TOKEN", "401")
    case.refused("lab/nothing", "not found", "404", HF_TOKEN=TOKEN)
    case.hub.status = {"api": [403]}
    case.refused("lab/hf", "accept its terms on", "/lab/hf: set HF_TOKEN", "403")
    case.hub.status = {"api": [401]}
    case.refused("lab/hf", "the token given does not open it", HF_TOKEN=TOKEN)
    case.hub.status = {"api": [404]}
    case.refused("lab/hf@v9", "lab/hf@v9: not found", "404")
    assert len(case.hub.requests) == 5
    case.hub.status = {"config.json": [403]}
    case.refused("lab/hf", "config.json", "HF_TOKEN", kept=["config.json.part"])


@test("a full disk is one line and leaves no file with the final name")
def _(case):
    case.refused("lab/hf", "model.safetensors.part", "disk full", limit=100_000,
                 kept=[*SMALL, "model.safetensors.part"])
    case.fetched("lab/hf")
    case.equals("lab/hf", HF_NAMES)


@test("a model larger than the disk is refused before it is downloaded")
def _(case):
    case.hub.announce["model.safetensors"] = {"lfs": {"size": 10**15, "sha256": "0" * 64}}
    case.refused("lab/hf", "no room for model.safetensors",
                 kept=[*SMALL, "model.safetensors.part"])
    assert case.hub.downloads("cdn") == []


@test("Ctrl-C keeps the part, and the next call continues it")
def _(case):
    case.hub.stall = "model.safetensors"
    process = subprocess.Popen([FETCH, "lab/hf", case.dir], env=case.environment(),
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               start_new_session=True,  # and not deaf to it, as in a "make &":
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    assert case.hub.stalled.wait(20)
    part = os.path.join(case.dir, "model.safetensors.part")
    for _ in range(200):
        if os.path.getsize(part) > 100_000:  # curl writes in blocks
            break
        time.sleep(0.05)
    kept = os.path.getsize(part)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(20) in (130, -signal.SIGINT), process.returncode
    assert case.names() == sorted([*SMALL, "model.safetensors.part"]), case.names()
    case.hub.stall = None
    case.fetched("lab/hf")
    case.equals("lab/hf", HF_NAMES)
    first = int(case.hub.requests[-1][2]["Range"][len("bytes="):-1])
    assert 100_000 < kept <= first <= 150_000, (kept, first)


@test("an index that names a file elsewhere is refused")
def _(case):
    case.refused("lab/hostile", "names a file that is not weights",
                 kept=["config.json", "model.safetensors.index.json", "tokenizer.json"])
    assert os.listdir(case.home) == ["model"]


@test("a model without weights, and a listing without checksums, are refused")
def _(case):
    case.refused("lab/empty", "neither model.safetensors nor pytorch_model.bin")
    case.hub.announce["config.json"] = {"blobId": None}
    case.refused("lab/hf", "config.json", "no size and checksum")


@test("a server that is not the Hub, or not there, is one line")
def _(case):
    for answer in (b"", b"<html>Welcome</html>", b"[]", b'{"sha": 1}', b'{"sha": "../x"}'):
        case.hub.replace["api"] = answer
        case.refused("lab/hf", "does not answer as the Hub does")
    case.refused("lab/hf", "no connection", HF_ENDPOINT="http://127.0.0.1:1")


@test("wrong usage ends with status 2")
def _(case):
    for arguments in ([], ["a", "b", "c"], ["mamba"], ["../x/y"], ["a/b/c"], ["a/b@"],
                      ["a/b", ""], ["a/b?c"], ["-a/b"]):
        case.refused("", "--help", arguments=arguments, code=2)
    case.refused("a/b", "HF_ENDPOINT", code=2, HF_ENDPOINT="ftp://x")
    case.refused("a/b", "HF_TOKEN: has characters", HF_TOKEN='x"\\y')
    assert case.hub.requests == []
    assert case.fetch("", arguments=["--help"]).stdout.startswith("usage: ")


@test("a missing jq is named, with the command that installs it")
def _(case):
    tools = os.path.join(case.home, "bin")
    os.mkdir(tools)
    for tool in ("bash", "env", "curl", "dirname", "cat", "sha256sum", "sha1sum"):
        os.symlink(shutil.which(tool), os.path.join(tools, tool))
    case.refused("lab/hf", "jq is missing: apt-get install jq", PATH=tools)


def main():
    """With an argument: only the claims that contain it."""
    chosen = [test for test in TESTS if len(sys.argv) < 2 or sys.argv[1] in test[0]]
    failed = 0
    for claim, function in chosen:
        with tempfile.TemporaryDirectory() as folder:
            case = Case(folder)
            try:
                function(case)
                print(f"ok    fetch: {claim}")
            except Exception as error:  # one failure must not hide the next
                failed += 1
                print(f"FAIL  fetch: {claim}\n      {type(error).__name__}: {error}")
            finally:
                case.hub.close()
    print(f"{len(chosen) - failed} passed, {failed} failed")
    return 0 if chosen and not failed else 1


if __name__ == "__main__":
    sys.exit(main())

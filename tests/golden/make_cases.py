"""Makes cases.json and cases/: small folders as people have them, and what must come of each.

    pip install torch transformers tokenizers safetensors && python3 tests/golden/make_cases.py

Each kind of file that people's reports describe, three times or more. Ids, texts and logits are
those of transformers, tokenizers and torch; lines of refusals are ours. tests/test_cases.py runs
them.
"""

import copy
import json
import pathlib
import re
import shutil

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import MambaConfig, MambaForCausalLM

HERE = pathlib.Path(__file__).resolve().parent
STORIES = HERE.parent.parent / "weights/stories"
FILES = HERE / "cases"
VOCAB, MOST = 20, 24  # tokens that config.json has; rows of the embedding
cases = []


# --- a model and tokenizers as small as can be ---

def tiny(vocab_size=VOCAB, seed=7):
    """The same random weights for every vocabulary, which takes the first rows."""
    torch.manual_seed(seed)
    config = MambaConfig(vocab_size=MOST, hidden_size=4, state_size=2, num_hidden_layers=1,
                         time_step_rank=1, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model = MambaForCausalLM(config).eval()
    state = {name: torch.nn.init.normal_(w) if w.dim() == 2 and "A_log" not in name else w
             for name, w in model.state_dict().items()}
    model = MambaForCausalLM(MambaConfig(**{**config.to_dict(), "vocab_size": vocab_size})).eval()
    for name in ("backbone.embeddings.weight", "lm_head.weight"):
        state[name] = state["backbone.embeddings.weight"][:vocab_size].clone()
    model.load_state_dict(state)
    return model


def config_of(model, **changes):
    keys = ("model_type", "hidden_size", "state_size", "num_hidden_layers", "time_step_rank",
            "intermediate_size", "expand", "conv_kernel", "vocab_size", "eos_token_id",
            "bos_token_id", "pad_token_id", "layer_norm_epsilon")
    whole = model.config.to_dict()
    return {**{key: whole[key] for key in keys}, **changes}


def weights_of(model):
    """The state dict without the tied head, which safetensors would refuse beside the embedding."""
    return {name: w.clone() for name, w in model.state_dict().items() if name != "lm_head.weight"}


def added(first_id, *contents, special=True):
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [{"id": first_id + i, "content": content, **flags, "special": special}
            for i, content in enumerate(contents)]


def tokenizer(*more, **changes):
    """Byte-level, 20 tokens; more added tokens behind them."""
    tokens = ["<|endoftext|>", *"abehirstuw", "Ġ", "Ċ", "hi", "us", "er", "user", "Ġhi", "he",
              "Ġthe"]
    assert len(tokens) == VOCAB
    merges = [["h", "i"], ["u", "s"], ["e", "r"], ["us", "er"], ["Ġ", "hi"], ["h", "e"]]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
             "use_regex": True}
    return {"version": "1.0", "normalizer": {"type": "NFC"}, "pre_tokenizer": level,
            "post_processor": None, "decoder": level,
            "added_tokens": added(0, "<|endoftext|>") + added(VOCAB, *more),
            "model": {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)},
                      "merges": merges}, **changes}


def fallback(**changes):
    """BPE with byte fallback, as Codestral's."""
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]
    tokens += ["▁", "h", "i", "hi", "▁hi", "\n"]
    replace = lambda a, b: {"type": "Replace", "pattern": {"String": a}, "content": b}
    return {"version": "1.0", "added_tokens": added(0, "<unk>", "<s>", "</s>"),
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": "▁"}, replace(" ", "▁")]},
            "pre_tokenizer": None, "post_processor": template(["<s>"], []),
            "decoder": {"type": "Sequence", "decoders": [
                replace("▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True,
                      "byte_fallback": True, "vocab": {t: i for i, t in enumerate(tokens)},
                      "merges": ["h i", "▁ hi"]}, **changes}


def template(before, after, ids={"<s>": 1, "</s>": 2, "<|endoftext|>": 0}):
    token = lambda name: {"SpecialToken": {"id": name, "type_id": 0}}
    return {"type": "TemplateProcessing", "pair": [],
            "single": [*map(token, before), {"Sequence": {"id": "A", "type_id": 0}},
                       *map(token, after)],
            "special_tokens": {name: {"id": name, "ids": [ids[name]], "tokens": [name]}
                               for name in (*before, *after)}}


# --- cases ---

def case(kind, name, files, arguments, stdin="", **expected):
    """files: name -> JSON, text, or the path of a file of the repository. In arguments, M is the
    folder and O a file or folder to write. Expected: status (0), stdout, logits of the last row
    in O; of stderr, said: a part of its one line, or warned: how a warning in it begins."""
    files = {n: str(f.relative_to(HERE.parent.parent)) if isinstance(f, pathlib.Path) else
             {"text": f} if isinstance(f, str) else {"json": f} for n, f in files.items()}
    cases.append({"kind": kind, "name": name, "files": files, "stdin": stdin,
                  "arguments": arguments if isinstance(arguments, list) else arguments.split(),
                  **expected})


def kept(name, content):
    """A file of its own, by its ending, for what is large or not text."""
    path = FILES / re.sub("[^a-z0-9_.]+", "-", name.lower())
    if path.suffix == ".json":
        path.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n")
    elif path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


def text(ids):
    return " ".join(map(str, ids))


def greedy(model, ids, n, **how):
    """What transformers appends; a prompt without end token among them."""
    with torch.no_grad():
        out = model.generate(torch.tensor([ids]), max_new_tokens=n, do_sample=False,
                             attention_mask=torch.ones(1, len(ids)), **how)
    return text(out[0].tolist())


def encode(file, prompt):
    return Tokenizer.from_str(json.dumps(file)).encode(prompt).ids


def stories_tokenizer():
    return Tokenizer.from_file(str(STORIES / "tokenizer.json"))


def end_tokens():
    model = MambaForCausalLM.from_pretrained(STORIES)
    plain = json.loads((STORIES / "config.json").read_text())
    words = stories_tokenizer()
    ids = words.encode("Once upon a time").ids
    tale = greedy(model, ids, 40, eos_token_id=None)
    first, second = map(int, (tale.split()[12], tale.split()[20]))
    for name, ends, config, more in (
            ("a list in config.json", [0, first], {"eos_token_id": [0, first]}, {}),
            ("a number in generation_config.json, null in config.json", [second],
             {"eos_token_id": None}, {"generation_config.json": {"eos_token_id": second}}),
            ("a list in generation_config.json", [4095, second], {},
             {"generation_config.json": {"eos_token_id": [4095, second], "pad_token_id": 0}}),
            ("a name in tokenizer_config.json", [first], {},
             {"tokenizer_config.json": {"eos_token": words.id_to_token(first)}}),
            ("three files, three end tokens", [0, first, second], {"eos_token_id": 0},
             {"generation_config.json": {"eos_token_id": second},
              "tokenizer_config.json": {"eos_token": {"content": words.id_to_token(first)}}})):
        case("end tokens", name,
             {"config.json": {**plain, **config}, **more,
              **{n: STORIES / n for n in ("model.safetensors", "tokenizer.json")}},
             ["generate", "--model", "M", "--prompt", "Once upon a time", "-n", "40",
              "--temperature", "0", "--ids"],
             stdout=greedy(model, ids, 40, eos_token_id=ends))


def padding_rows():
    chat = ("<|im_start|>", "<|im_end|>")
    wide, prompt = tiny(MOST, 14), "<|im_start|>user hi<|im_end|>"
    weights = kept("rows.safetensors", weights_of(wide))
    run = ["generate", "--model", "M", "--prompt", prompt, "-n", "12", "--temperature", "0",
           "--ids"]
    whole = tokenizer(*chat, "<a>", "<b>")
    assert "23" in greedy(wide, encode(whole, prompt), 12).split()[5:]
    for name, words, more in (
            ("ChatML's two tokens, two rows without any", tokenizer(*chat), {}),
            ("every row has its token", whole, {}),
            ("one of them ends the turn", whole, {"tokenizer_config.json": {"eos_token": "<b>"}}),
            ("the tokenizer has more tokens than rows",
             tokenizer(*chat, "<a>", "<b>", "<c>", "<d>"), {})):
        last = VOCAB + len(words["added_tokens"]) - 1
        how = {"suppress_tokens": list(range(last, MOST))} if last < MOST else {}
        case("padding rows", name,
             {"config.json": config_of(wide, vocab_size=VOCAB), "model.safetensors": weights,
              "tokenizer.json": words, **more}, run,
             stdout=greedy(wide, encode(words, prompt), 12, eos_token_id=[0, 23] if more else 0,
                           **how))


def no_tokenizer():
    model = tiny()
    weights = kept("tiny.safetensors", weights_of(model))
    base = {"config.json": config_of(model), "model.safetensors": weights}
    said = "EleutherAI/gpt-neox-20b"
    for name, more in (
            ("none", {}), ("its config alone", {"tokenizer_config.json": {"eos_token": "x"}}),
            ("vocab.json and merges.txt", {"vocab.json": {"a": 0}, "merges.txt": "a b"})):
        case("no tokenizer.json", name, {**base, **more}, "generate --model M --prompt hi -n 3",
             status=1, said=said)
        case("no tokenizer.json", name + ", ids", {**base, **more},
             ["generate", "--model", "M", "--prompt-ids", "3 7 1", "-n", "5", "--temperature", "0",
              "--ids"], stdout=greedy(model, [3, 7, 1], 5))


def tokenizers_of_prompts():
    model = tiny()
    base = {"config.json": config_of(model, vocab_size=300), "model.safetensors":
            kept("many_rows.safetensors", {**weights_of(model), "backbone.embeddings.weight":
                                             torch.zeros(300, 4)})}
    none = fallback(normalizer=None, pre_tokenizer={
        "type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False})
    end = template(["<|endoftext|>"], [])
    llama = tokenizer(post_processor={"type": "Sequence", "processors": [
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}, end]})
    bare = {key: value for key, value in tokenizer().items() if key != "decoder"}
    for kind, name, words in (
            ("byte fallback", "Prepend and Replace", fallback()),
            ("byte fallback", "Metaspace", none),
            ("byte fallback", "no post_processor", fallback(post_processor=None)),
            ("a post_processor", "in front", tokenizer(post_processor=end)),
            ("a post_processor", "around, twice", fallback(post_processor=template(
                ["<s>", "<s>"], ["</s>"]))),
            ("a post_processor", "in a Sequence", llama),
            ("decoder null", "byte-level", tokenizer(decoder=None)),
            ("decoder null", "byte fallback", fallback(decoder=None)),
            ("decoder null", "no such key", bare)):
        library = Tokenizer.from_str(json.dumps(words))
        files = {**base, "tokenizer.json": kept(f"{kind} {name}.json", words)}
        for prompt in ("hi the user", "hi \u00e9\u2713", " hi  hi\nhi"):
            encoded = library.encode(prompt)
            case(kind, f"{name}: {prompt!r}", files,
                 ["generate", "--model", "M", "--prompt", prompt, "-n", "0", "--ids"],
                 stdout=text(encoded.ids))
            case(kind, f"{name}: decoded {prompt!r}", files, "tokenize --model M --decode",
                 stdin=text(encoded.ids), stdout=library.decode(encoded.ids, False))


def pickles():
    """Attributes, wholes of training scripts, and prefixes: the same weights by many names."""
    model = tiny()
    ids = [3, 7, 1, 12]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1].tolist()

    def files(kind, name, content, config=config_of(model)):
        path = kept(f"{kind} {name}.bin", content)
        case(kind, name, {"config.json": config, "pytorch_model.bin": path},
             ["logits", "--model", "M", "--ids", text(ids), "--out", "O"], logits=logits)

    plain = weights_of(model)
    renamed = lambda change: {change(name): w for name, w in plain.items()}
    original = {"d_model": 4, "n_layer": 1, "vocab_size": VOCAB, "pad_vocab_size_multiple": 1,
                "ssm_cfg": {"d_state": 2, "dt_rank": 1}}

    marked = {name: torch.nn.Parameter(w) for name, w in plain.items()}
    for name in marked:
        if name.endswith(("A_log", ".D")):
            marked[name]._no_weight_decay = True
    files("attributes", "as Mamba marks them", marked)
    rich = {name: torch.nn.Parameter(w) for name, w in plain.items()}
    rich["backbone.norm_f.weight"]._optim = {"lr": 0.1, "betas": (0.9, 0.95), "names": ["a", None]}
    files("attributes", "a dict of settings", rich)
    tensors = {name: w.clone() for name, w in plain.items()}
    tensors["backbone.embeddings.weight"].source = "not a parameter"
    files("attributes", "tensors that are no parameters", tensors)

    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.tensor([ids])).logits.sum().backward()
    state = copy.deepcopy(plain)
    optimizer.step()
    other = {"optimizer": optimizer.state_dict(), "best_val_loss": torch.tensor(1.5), "iter_num": 9}
    files("wholes", "nanoGPT's", {"model": state, **other, "config": {"dtype": "bfloat16"}})
    files("wholes", "model_state_dict", {"epoch": 2, "model_state_dict": state, "scaler": {}})
    files("wholes", "state_dict in module", {"module": {"state_dict": state}, **other})
    files("wholes", "Lightning's", {"state_dict": renamed(lambda n: "model." + n), "hparams": None})

    files("prefixes", "module.", renamed(lambda n: "module." + n))
    files("prefixes", "_orig_mod.", renamed(lambda n: "_orig_mod." + n))
    files("prefixes", "both, inside of a model", renamed(lambda n: "model.module._orig_mod." + n))
    files("prefixes", "a missing backbone.", renamed(lambda n: n.replace("backbone.", "")))
    files("prefixes", "in the original layout", renamed(
        lambda n: "module." + n.replace("embeddings", "embedding")), original)
    short = {name: w for name, w in plain.items() if not name.endswith("A_log")}
    case("prefixes", "a name that is not there", {"config.json": config_of(model),
                                                  "pytorch_model.bin": kept("short.bin", short)},
         "logits --model M --ids 1 --out O", status=1,
         said="expected backbone.layers.0.mixer.A_log, found none; its 11 tensors begin with "
              "'backbone.embeddings.weight'")


def other_files():
    """What stands in a model's place, each refused in one line; no library reads these."""
    base = {"config.json": config_of(tiny()), "model.safetensors": FILES / "tiny.safetensors"}
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 4552\n" % ("a1" * 32)
    crlf, run = pointer.replace("\n", "\r\n"), "generate --model M --prompt hi -n 1"
    index = {"weight_map": {"x": "model-00001-of-00001.safetensors"}}
    config = {"config.json": base["config.json"]}
    for name, files in (
            ("model.safetensors", {**config, "model.safetensors": pointer}),
            ("pytorch_model.bin, Windows' line ends", {**config, "pytorch_model.bin": crlf}),
            ("a shard", {**config, "model.safetensors.index.json": index,
                         "model-00001-of-00001.safetensors": pointer}),
            ("config.json", {**base, "config.json": pointer}),
            ("tokenizer.json", {**base, "tokenizer.json": pointer})):
        case("Git LFS", name, files, run, status=1, said="Git LFS pointer")
    adapter = {"peft_type": "LORA", "r": 8, "target_modules": ["x_proj"]}
    for name, files in (
            ("safetensors", {"adapter_config.json": adapter, "adapter_model.safetensors": "x"}),
            (".bin and a tokenizer", {"adapter_config.json": adapter, "adapter_model.bin": "x",
                                      "tokenizer.json": STORIES / "tokenizer.json"}),
            ("config.json beside it", {**config, "adapter_config.json": adapter,
                                       "adapter_model.safetensors": "x"})):
        case("adapters", name, files, run, status=1, said="found an adapter (LoRA)")
    params = {"dim": 4, "n_layers": 1, "vocab_size": VOCAB, "model_type": "mamba"}
    for name, files in (("params.json", {"params.json": params, "consolidated.safetensors": "x"}),
                        ("an older one", {"params.json": params, "consolidated.00.pth": "x"}),
                        ("its weights alone", {**config, "consolidated.safetensors": "x"})):
        case("Mistral's layout", name, files, run, status=1, said="found Mistral's own layout")


def overflow():
    """Warnings with the tensor's name and how many values become infinite, as torch counts them."""
    model = tiny()
    for dtype, values, to, flag in (
            (torch.float32, [1e5, -7e4, 65519.0, 1.0], torch.float16, "f16"),
            (torch.bfloat16, [65536.0, -65504.0, 3e38, 1.0], torch.float16, "f16"),
            (torch.float32, [3.4e38, -3.4e38, 3.38e38, 1e38], torch.bfloat16, "bf16"),
            (torch.float64, [1e39, -1e300, 1e38, 1.0], torch.float32, "f32")):
        tensor = torch.tensor(values, dtype=dtype)
        weights = {name: w.to(dtype) for name, w in weights_of(model).items()}
        name = "backbone.layers.0.mixer.out_proj.weight"
        weights[name][0, :4] = tensor
        count = int(tensor.to(to).isinf().sum())
        said = f"'{name}': {count} of 32 values are too large for {flag.upper()}"
        files = {"config.json": config_of(model),
                 "model.safetensors": kept(f"overflow {dtype} {flag}.safetensors", weights)}
        for command in ("convert --model M", "logits --model M --ids 3"):
            case("overflow", f"{dtype} as {flag}: {command.split()[0]}", files,
                 f"{command} --dtype {flag} --out O", warned=said)


def texts():
    """Line ends and byte order marks are no part of a prompt."""
    model, words = MambaForCausalLM.from_pretrained(STORIES), stories_tokenizer()
    files = {name: STORIES / name for name in ("config.json", "model.safetensors",
                                               "tokenizer.json")}
    want = "\n".join(greedy(model, words.encode(p).ids, 4, eos_token_id=None)
                     for p in ("Lily had", "Tom"))
    for name, content in (("Windows' line ends", "Lily had\r\nTom\r\n"),
                          ("a byte order mark", "\ufeffLily had\nTom"),
                          ("both, and no newline at the end", "\ufeffLily had\r\nTom")):
        case("prompt files", name, {**files, "prompts": content},
             "generate --model M --prompt-file M/prompts -n 4 --temperature 0 --ignore-eos --ids",
             stdout=want)
    for end, more in (("\n", ""), ("\r\n", ""), ("", ""), ("\n\n", "\n")):
        case("standard input", repr(end), files, "generate --model M --prompt - -n 0 --ids",
             stdin="Lily had" + end, stdout=text(words.encode("Lily had" + more).ids))


def main():
    shutil.rmtree(FILES, ignore_errors=True)
    FILES.mkdir()
    for make in (end_tokens, padding_rows, no_tokenizer, tokenizers_of_prompts, pickles,
                 other_files, overflow, texts):
        make()
    with open(HERE / "cases.json", "w") as out:
        out.write("[\n%s\n]\n" % ",\n".join(json.dumps(c, separators=(",", ":")) for c in cases))


if __name__ == "__main__":
    main()

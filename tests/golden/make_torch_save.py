"""Makes torch_save/: small files as torch.save writes them, each with its tensors in
safetensors as the truth to compare with. Needs torch (2.0 or newer) and safetensors.

    python tests/golden/make_torch_save.py
"""

import os
from collections import OrderedDict

import torch
from safetensors.torch import save_file

OUT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "torch_save")


def ramp(*shape, dtype=torch.float32):
    """-3, -2.75, -2.5, ...: exact in every dtype."""
    n = int(torch.tensor(shape).prod()) if shape else 1
    values = torch.arange(n, dtype=torch.float64) * 0.25 - 3
    return values.reshape(shape).to(dtype)


def special(dtype):
    """Zeros, infinities, NaN, the largest, the smallest normal, a subnormal."""
    info = torch.finfo(dtype)
    numbers = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), info.max, info.tiny]
    return torch.tensor(numbers + [info.tiny / 2, -info.tiny / 4], dtype=dtype)


def all_kinds():
    base = ramp(6, 8)
    tensors = OrderedDict()
    for name in ["float64", "float32", "float16", "bfloat16"]:
        tensors[name] = ramp(3, 5, dtype=getattr(torch, name))
        tensors[name + "_special"] = special(getattr(torch, name))
    for name in ["int64", "int32", "int16", "int8", "uint8", "bool"]:
        tensors[name] = torch.arange(7).to(getattr(torch, name))
    tensors["scalar"] = torch.tensor(2.5)
    tensors["empty"] = torch.empty(0, 4)
    tensors["whole"] = base  # all below share its storage
    tensors["tied"] = base
    tensors["transposed"] = base.t()
    tensors["rows"] = base[2:4]
    tensors["columns"] = base[:, 3:5]
    tensors["every_other"] = base[1::2, ::3]
    tensors["permuted"] = base.reshape(2, 3, 8).permute(2, 0, 1)
    tensors["flipped_halves"] = base.as_strided((2, 4), (8, 2), 5)
    tensors["one"] = base[5:, 7:]
    tensors["repeated"] = base[0, :2].expand(3, 2)
    return tensors


def module():
    """A state dict with the _metadata of nn.Module, and parameters as they are."""
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3)).half()
    for parameter in net.parameters():
        parameter.data.copy_(ramp(*parameter.shape))
    return net.state_dict(keep_vars=True)


def attributes():
    """Parameters and a buffer that carry attributes, as Mamba marks A_log, D and dt_proj.bias."""
    A_log, bias = torch.nn.Parameter(ramp(4, 3)), torch.nn.Parameter(ramp(5, dtype=torch.bfloat16))
    A_log._no_weight_decay = True
    bias._no_reinit, bias._optim = True, {"lr": 0.1, "betas": (0.9, 0.95), "groups": [1, None]}
    plain, buffer = torch.nn.Parameter(ramp(2)), ramp(2, 6).t()
    buffer.source = "a buffer with an attribute"
    return {"A_log": A_log, "dt_proj.bias": bias, "plain": plain, "buffer": buffer}


def after_a_step():
    """A module's state dict and its optimizer's, which holds tensors and numbers of its own."""
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    return net.state_dict(), optimizer.state_dict(), scheduler.state_dict()


def training_scripts():
    """What training scripts save around a state dict: (name, tensors, the whole)."""
    torch.manual_seed(1)
    weights, optimizer, scheduler = after_a_step()
    compiled = {"_orig_mod." + name: tensor for name, tensor in weights.items()}
    yield "nanogpt", compiled, {
        "model": compiled, "optimizer": optimizer, "model_args": {"n_layer": 2, "bias": False},
        "iter_num": 2000, "best_val_loss": torch.tensor(1.25), "config": {"out_dir": "out"}}
    lightning = OrderedDict(("model." + name, tensor) for name, tensor in weights.items())
    yield "lightning", lightning, {
        "epoch": 1, "global_step": 20, "pytorch-lightning_version": "2.4.0", "loops": {"fit": {}},
        "state_dict": lightning, "callbacks": {}, "optimizer_states": [optimizer],
        "lr_schedulers": [scheduler], "hyper_parameters": {"lr": 1e-3, "model": {"d_model": 64}}}
    yield "tutorial", weights, {
        "epoch": 5, "model_state_dict": weights, "optimizer_state_dict": optimizer, "loss": 0.4}
    yield "deepspeed", weights, {
        "module": weights, "buffer_names": [], "optimizer": None, "lr_scheduler": scheduler,
        "global_steps": 7, "dp_world_size": 1, "rng": torch.get_rng_state()[:64].clone()}
    yield "nested", weights, {"model": {"step": 3, "state_dict": weights}, "model_state_dict": None}


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile-pickle-was-run",)


def write(name, tensors, wrap=None, **options):
    torch.save(tensors if wrap is None else wrap, os.path.join(OUT, name + ".bin"), **options)
    truth = {key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}
    save_file(truth, os.path.join(OUT, name + ".safetensors"))


if __name__ == "__main__":
    os.makedirs(OUT, exist_ok=True)
    write("zip", all_kinds())
    write("zip_protocol4", all_kinds(), pickle_protocol=4)
    write("module", module())
    write("attributes", attributes())
    for name, tensors, whole in training_scripts():
        write(name, tensors, wrap=whole)
    torch.save({"weight": ramp(2, 2)}, os.path.join(OUT, "before_1.6.bin"),
               _use_new_zipfile_serialization=False)
    write("untyped", {"u16": torch.arange(5).to(torch.uint16), "u32": torch.arange(3).to(torch.uint32)})
    small = {"weight": ramp(2, 2)}
    write("wrapped", small, wrap={"epoch": 3, "lr": 0.5, "state_dict": small, "done": None})
    write("wrapped_model", small, wrap={"model": small, "step": 2**40})
    torch.save({"weight": ramp(2, 2), "x": Hostile()}, os.path.join(OUT, "hostile.bin"))

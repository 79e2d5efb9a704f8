"""Golden files of the dynamical systems framework."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from brainalign_kernels.dynamics import (
    DSFAttention,
    linear_system,
    normalised_system,
    run_system,
    softmax_system,
)
from brainalign_kernels.dynamics import dsf_attention as attend
from brainalign_kernels.golden.check import FLOAT64, GRADIENT64, GoldenFile, Run

__all__ = ["dsf_attention"]


def _recurrence(q: Tensor, k: Tensor, v: Tensor, n: Tensor | None, kind: str) -> Tensor:
    if kind == "norm":
        assert n is not None
        system = normalised_system(q, k, n)
    else:
        system = linear_system(q, k) if kind == "linear" else softmax_system(q, k)
    return run_system(system, v, impl="reference")[0]


def dsf_attention(file: GoldenFile) -> Iterator[Run]:
    """Direct forms, and the recurrence."""
    meta = file.meta
    kind = meta["kind"]
    for impl in ("reference", "compiled", "recurrence"):
        inputs = {name: file.tensor(name, grad=True) for name in "qkv"}
        if "log_normaliser" in file:
            inputs["log_normaliser"] = file.tensor("log_normaliser", grad=True)
        q, k, v = (inputs[name].transpose(1, 2) for name in "qkv")
        n = inputs["log_normaliser"].transpose(1, 2) if kind == "norm" else None
        if impl == "recurrence":
            core = _recurrence(q, k, v, n, kind)
        else:
            core = attend(q, k, v, kind=kind, log_normaliser=n, chunk_size=4, impl=impl)
        core = core.transpose(1, 2)
        made = [file.compare("core_out", core, FLOAT64)]
        wanted = {f"grad_{name}": x for name, x in inputs.items()}
        made += file.gradients(core, "grad_core_out", wanted, GRADIENT64)
        if impl != "recurrence":
            heads = meta["num_heads"]
            module = DSFAttention(
                meta["d_model"], heads, kind, d_qk=heads * meta["head_dim_qk"],
                d_v=heads * meta["head_dim_v"], bias=meta["bias"],
                out_bias="param.out_proj.bias" in file, impl=impl,
            ).double()  # fmt: skip
            module.load_state_dict(file.parameters())
            x = file.tensor("x", torch.float64, grad=True)
            out = module(x)
            made.append(file.compare("out", out, FLOAT64))
            wanted = {"grad_x": x}
            wanted |= {f"grad_param.{name}": p for name, p in module.named_parameters()}
            made += file.gradients(out, "grad_out", wanted, GRADIENT64)
        yield Run(impl, made)

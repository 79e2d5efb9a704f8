"""Golden files of LightNet."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from brainalign_kernels import LightNetAttention, lightnet_attention
from brainalign_kernels._dispatch import triton_missing
from brainalign_kernels.golden.check import (
    FLOAT32,
    FLOAT64,
    GRADIENT64,
    Comparison,
    GoldenFile,
    Run,
)

__all__ = ["lightnet_additive_recurrence", "lightnet_fla", "lightnet_xmixers"]

PATHS = ("reference", "compiled")
#: xmixers' numbers of its position encodings.
LRPE = {1: "rotate", 4: "cosine"}


def lightnet_additive_recurrence(file: GoldenFile) -> Iterator[Run]:
    """Check `lightnet_attention`: their g is its k, their k its modulation."""
    for impl in PATHS:
        comparisons = []
        for dtype, name, tolerance in (
            (torch.float64, "out_float64", FLOAT64), (torch.float32, "out", FLOAT32)
        ):  # fmt: skip
            x = {n: file.tensor(n, dtype, grad=True) for n in ("q", "k", "v", "g")}
            out = lightnet_attention(x["q"], x["g"], x["v"], modulation=x["k"], impl=impl)
            assert isinstance(out, Tensor)
            comparisons.append(file.compare(name, out, tolerance))
            if dtype == torch.float64:
                inputs = {f"grad_{n}": t for n, t in x.items()}
                comparisons += file.gradients(out, "grad_out", inputs, GRADIENT64)
        yield Run(impl, comparisons)
    if not triton_missing(file.tensor("q")):
        x = {n: file.tensor(n, torch.float32, grad=True) for n in ("q", "k", "v", "g")}
        out = lightnet_attention(x["q"], x["g"], x["v"], modulation=x["k"], impl="triton")
        assert isinstance(out, Tensor)
        inputs = {f"grad_{n}": t for n, t in x.items()}
        found = file.gradients(out, "grad_out", inputs, FLOAT32)
        yield Run("triton", [file.compare("out", out, FLOAT32), *found])


def lightnet_fla(file: GoldenFile) -> Iterator[Run]:
    """Check `LightNetAttention` as in flash-linear-attention."""
    meta = file.meta
    names = {"g_norm": "norm", "g_proj": "gate"}
    options = {
        "key_dim": meta["expand_ratio"] * meta["num_heads"],
        "gate_dim": meta["gate_low_rank_dim"],
        "scale": meta["query_scale"],
        "norm_eps": meta["norm_eps"],
    }
    yield from _layer(file, meta["hidden_size"], names, options, values_masked=True)


def lightnet_xmixers(file: GoldenFile) -> Iterator[Run]:
    """Check `LightNetAttention` as in xmixers."""
    meta, parameters = file.meta, file.parameters()
    names = {"output_gate": "gate"}
    options = {
        "zero_start": True,
        "bias": meta["bias"],
        "gate": meta["gate_act"] if meta["use_output_gate"] else None,
        "gate_pos": meta["gate_pos"],
        "norm": meta["token_mixer_norm_type"],
        "norm_eps": meta["norm_eps"],
        "eps_on": "sum",
        "q_activation": meta["q_activation"],
        "k_activation": meta["k_activation"],
        "scalar_decay": meta["scalar_decay"],
        "input_gate": meta["scalar_decay"] and meta["use_input_gate"],
        "base": meta["base"],
        "key_dim": parameters["q_proj.weight"].shape[0],
    }
    if meta["use_lrpe"]:
        options["lrpe"] = LRPE[meta["lrpe_type"]]
        options["shared_angles"] = parameters["lrpe.theta"].shape[0] == 1
    if meta["use_output_gate"]:
        options["gate_dim"] = parameters["output_gate.0.weight"].shape[0]
        options["gate_bias"] = "output_gate.1.bias" in parameters
    yield from _layer(file, meta["embed_dim"], names, options, values_masked=False)


def _layer(
    file: GoldenFile,
    dim: int,
    names: dict[str, str],
    options: dict[str, Any],
    *,
    values_masked: bool,
) -> Iterator[Run]:
    """Check a layer whose parameters are called differently upstream: `names`, theirs to ours."""
    ours = {}
    for name in file.parameters():
        first, _, rest = name.partition(".")
        ours[name] = f"{names.get(first, first)}.{rest}"
    mask = _mask(file)
    for impl in PATHS:
        comparisons = []
        for dtype in (torch.float64, torch.float32):
            module = LightNetAttention(dim, file.meta["num_heads"], impl=impl, **options).to(dtype)
            given = file.parameters(dtype)
            module.load_state_dict({ours[name]: p for name, p in given.items()})
            x = file.tensor("x", dtype, grad=True)
            out = module(x, mask=mask)
            if dtype == torch.float32:
                comparisons.append(file.compare("out", out, FLOAT32))
                continue
            comparisons.append(file.compare("out_float64", out, FLOAT64))
            comparisons += _core(file, module, x, mask, values_masked=values_masked)
            mine = dict(module.named_parameters())
            inputs = {f"grad_param.{name}": mine[ours[name]] for name in given}
            if "grad_out" in file:
                comparisons += file.gradients(out, "grad_out", {"grad_x": x, **inputs}, GRADIENT64)
        yield Run(impl, comparisons)


def _mask(file: GoldenFile) -> Tensor | None:
    if "attention_mask" in file:
        return file.tensor("attention_mask")
    padding = file.meta.get("left_padding")
    if padding is None:
        return None
    place = torch.arange(file.tensor("x").shape[1])
    return place >= torch.tensor(padding)[:, None]


def _core(
    file: GoldenFile,
    module: LightNetAttention,
    x: Tensor,
    mask: Tensor | None,
    *,
    values_masked: bool,
) -> list[Comparison]:
    """Compare what enters and leaves the recurrence."""
    core = module.core(x, mask=mask)
    v = core.v
    if values_masked and mask is not None:
        v = v * mask[:, None, :, None]
    made = {"q": core.q, "k": core.kappa, "v": v, "core": core.out}
    decay = core.log_decay
    if module.scalar_decay:
        made["ld"] = decay
    else:
        made |= {"ldk": decay, "log_decay": decay}
    made = {name: t.transpose(1, 2) for name, t in made.items()}
    if module.scalar_decay:
        made["ld"] = made["ld"][..., 0]
    made["state"] = core.state[0]
    return [
        file.compare(f"core.{name}", t, FLOAT64)
        for name, t in made.items()
        if f"core.{name}" in file
    ]

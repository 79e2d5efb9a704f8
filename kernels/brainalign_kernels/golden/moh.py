"""Golden files of mixture-of-head attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from brainalign_kernels.golden.check import (
    FLOAT32,
    FLOAT64,
    GRADIENT64,
    Comparison,
    GoldenFile,
    Run,
)
from brainalign_kernels.moh import (
    MoHAggregatedAttention,
    MoHAttention,
    MoHViTAttention,
    load_balance_loss,
    moh_attention,
)
from brainalign_kernels.moh.module import PositionMLP

__all__ = ["moh_dit", "moh_vit", "moh_vit_aggregated"]

#: The original counts the selection in single precision.
LOSS = 1e-6
IMPLS = ("reference", "compiled")


def _options(file: GoldenFile, impl: str) -> dict[str, Any]:
    names = ("shared_head", "routed_head", "head_dim", "qkv_bias")
    return {name: file.meta[name] for name in names} | {"impl": impl}


def _gradients(file: GoldenFile, module: nn.Module, x: Tensor, out: Tensor) -> list[Comparison]:
    wanted = {"grad_x": x}
    wanted |= {f"grad_param.{name}": p for name, p in module.named_parameters()}
    made = file.gradients(out, "grad_out", wanted, GRADIENT64)
    unused = [f"grad_param.{name}" for name in _unused(file, module)]
    known = {name: torch.zeros_like(file.tensor(name)) for name in unused if name in file}
    return made + file.compare_gradients(known, GRADIENT64)


def _unused(file: GoldenFile, module: nn.Module) -> set[str]:
    """Name stored routers without a say, as that of a single shared head: the module has none."""
    return {n for n in file.parameters().keys() - module.state_dict().keys() if n.startswith("wg")}


def _load(module: nn.Module, file: GoldenFile) -> list[Comparison]:
    """Load parameters and coordinates; compare what the module has made of the grid itself."""
    made = []
    if isinstance(module, PositionMLP):
        for name in ("relative_coords_table", "relative_pos_index"):
            made.append(file.compare(name, getattr(module, name), FLOAT32))
        for name in ("seq_length_scale", "padding_mask"):
            if f"param.{name}" in file:
                made.append(file.compare(f"param.{name}", getattr(module, name), FLOAT32))
    module.double()
    unused = _unused(file, module)
    stored = {name: p for name, p in file.parameters().items() if name not in unused}
    module.load_state_dict(stored)
    if isinstance(module, PositionMLP):
        module.relative_coords_table = file.tensor("relative_coords_table", torch.float64)
        module.relative_pos_index = file.tensor("relative_pos_index")
        # A buffer holds what its type can: the stored value is the official one.
        module.seq_length_scale = stored.get("seq_length_scale", module.seq_length_scale)
    return made


def moh_dit(file: GoldenFile) -> Iterator[Run]:
    """DiT form."""
    meta = file.meta
    for impl in IMPLS:
        module = MoHAttention(
            meta["dim"], meta["num_heads"], qk_norm=meta["qk_norm"], **_options(file, impl)
        )
        made = _load(module, file)
        x = file.tensor("x", torch.float64, grad=True)
        out, routing = module(x)
        q, k, v = module.heads(x)
        made += [file.compare(n, y, FLOAT64) for n, y in zip("qkv", (q, k, v), strict=True)]
        gated = moh_attention(q, k, v, routing.gates, selected=routing.selected, impl=impl)
        made.append(file.compare("gated_heads", gated.transpose(1, 2), FLOAT64))
        made.append(file.compare("gates", routing.gates, FLOAT64))
        if "routed_indices" in file:
            made.append(file.compare("routed_indices", routing.indices, 0.0))
        made.append(file.compare("out", out, FLOAT64))
        made += _gradients(file, module, x, out)
        if "load_balancing_loss" in file:
            loss = load_balance_loss(routing)
            made.append(file.compare("load_balancing_loss", loss, LOSS))
            if "grad_load_balancing_wrt_x" in file:
                slope = torch.autograd.grad(loss, x)[0]
                made.append(file.compare("grad_load_balancing_wrt_x", slope, LOSS))
        yield Run(impl, made)


def moh_vit(file: GoldenFile) -> Iterator[Run]:
    """ViT form, full attention."""
    meta = file.meta
    for impl in IMPLS:
        module = MoHViTAttention(
            meta["dim"], meta["num_heads"], (meta["H"], meta["W"]),
            cpb_hidden=meta["cpb_hidden"], **_options(file, impl),
        )  # fmt: skip
        made = _load(module, file)
        x = file.tensor("x", torch.float64, grad=True)
        out, routing = module(x)
        bias = module.position_bias()
        gated = moh_attention(
            *module.heads(x), routing.gates, selected=routing.selected, mask=bias[None],
            scale=1.0, impl=impl,
        )  # fmt: skip
        made.append(file.compare("rel_bias", bias, FLOAT64))
        made.append(file.compare("gated_heads", gated.transpose(1, 2), FLOAT64))
        made.append(file.compare("gates", routing.gates, FLOAT64))
        made.append(file.compare("out", out, FLOAT64))
        made += _gradients(file, module, x, out)
        yield Run(impl, made)


def moh_vit_aggregated(file: GoldenFile) -> Iterator[Run]:
    """ViT form, window and pooled tokens."""
    meta = file.meta
    for impl in IMPLS:
        module = MoHAggregatedAttention(
            meta["dim"], meta["num_heads"], (meta["H"], meta["W"]),
            (meta["pool_H"], meta["pool_W"]), window_size=meta["window_size"],
            cpb_hidden=meta["cpb_hidden"], **_options(file, impl),
        )  # fmt: skip
        made = _load(module, file)
        x = file.tensor("x", torch.float64, grad=True)
        out, routing = module(x)
        made.append(file.compare("gates", routing.gates, FLOAT64))
        made.append(file.compare("out", out, FLOAT64))
        made += _gradients(file, module, x, out)
        yield Run(impl, made)

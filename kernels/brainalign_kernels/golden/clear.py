"""CLEAR: its masks, the core and the module."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from brainalign_kernels.clear import ClearAttention
from brainalign_kernels.clear import clear_attention as attend
from brainalign_kernels.clear import clear_mask as make_mask
from brainalign_kernels.clear.flex import visible
from brainalign_kernels.golden.check import (
    FLOAT32,
    FLOAT64,
    GRADIENT64,
    Comparison,
    GoldenFile,
    Run,
)

PATHS = ("reference", "compiled")


def clear_mask(file: GoldenFile) -> Iterator[Run]:
    """Compare the dense mask, and the function that FlexAttention gets, with the stored one."""
    shape, n_text = (file.meta["height"], file.meta["width"]), file.meta["text_length"]
    radius = file.meta["window_size"]
    mask = make_mask(shape, n_text, radius, n_pooled=_pooled(file))
    yield Run("reference", [file.compare("mask", mask, 0.0)])
    queries, keys = (torch.arange(n) for n in mask.shape)
    seen = visible(shape, n_text, radius)(None, None, queries[:, None], keys[None, :])
    yield Run("compiled", [file.compare("mask", seen, 0.0)])


def _pooled(file: GoldenFile) -> int:
    down = file.meta["down_factor"]
    return (file.meta["height"] // down) * (file.meta["width"] // down) if down else 0


def clear_attention(file: GoldenFile) -> Iterator[Run]:
    """Compare the module, its projections and its mask; and the core where it is stored."""
    meta = file.meta
    shape, n_text = (meta["height"], meta["width"]), meta["text_length"]
    for impl in PATHS:
        block = ClearAttention(
            meta["C"], meta["H"], meta["window_size"], down_factor=meta["down_factor"],
            encoder_stream=meta["encoder_stream"], bias="param.to_q.bias" in file,
            proportional_attention=meta["proportional_attention"], impl=impl,
        ).to(torch.float64)  # fmt: skip
        block.load_state_dict(file.parameters())
        states = [file.tensor("hidden_states", torch.float64)]
        if meta["encoder_stream"]:
            states.append(file.tensor("encoder_hidden_states", torch.float64))
        made = block(states[0], shape, *states[1:])
        outs = made if isinstance(made, tuple) else (made,)
        names = ("out", "out_encoder")
        compared = [file.compare(n, x, FLOAT32) for n, x in zip(names, outs, strict=False)]
        derived = dict(zip("qkv", block.project(*states), strict=True))
        compared += [file.compare(n, x, FLOAT32) for n, x in derived.items() if n in file]
        mask = make_mask(shape, n_text, meta["window_size"], n_pooled=_pooled(file))
        compared.append(file.compare("mask_packed", _packed(mask), 0.0))
        if "core_out" in file:
            compared += _core(file, impl)
        yield Run(impl, compared)


def _core(file: GoldenFile, impl: str) -> list[Comparison]:
    meta = file.meta
    q, k, v = (file.tensor(n, torch.float64, grad=True) for n in "qkv")
    out = attend(
        q, k, v, shape=(meta["height"], meta["width"]), n_text=meta["text_length"],
        radius=meta["window_size"], scale=meta["scale"], impl=impl,
    )  # fmt: skip
    inputs = {"grad_q": q, "grad_k": k, "grad_v": v}
    return [
        file.compare("core_out", out, FLOAT32),
        file.compare("core_out_float64", out, FLOAT64),
        *file.gradients(out, "grad_core_out", inputs, GRADIENT64),
    ]


def _packed(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(mask.numpy(), axis=-1))

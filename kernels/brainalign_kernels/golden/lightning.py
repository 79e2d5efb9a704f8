"""Golden files of lightning attention and of linear attention with gates."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from brainalign_kernels import gated_linear, lightning
from brainalign_kernels._dispatch import triton_missing
from brainalign_kernels.golden.check import (
    FLOAT32,
    FLOAT64,
    GRADIENT64,
    Comparison,
    GoldenFile,
    Run,
)

__all__ = [
    "decay_linear_attention",
    "gla_naive",
    "lightning_attention",
    "lightning_attention_recurrent",
]

#: From arrays by name, an implementation and a chunk size: output and final state, as stored.
Compute = Callable[[dict[str, Tensor], str, int], tuple[Tensor, Tensor]]


def lightning_attention(file: GoldenFile) -> Iterator[Run]:
    """Check the parallel form; arrays (B, H, N, channels)."""

    def compute(x: dict[str, Tensor], impl: str, chunk: int) -> tuple[Tensor, Tensor]:
        rates = -file.tensor("slopes", x["q"].dtype) if "slopes" in file else None
        return lightning.lightning_attention(
            x["q"], x["k"], x["v"], rates, return_state=True, chunk_size=chunk, impl=impl
        )

    yield from _runs(file, ("q", "k", "v"), compute)


def lightning_attention_recurrent(file: GoldenFile) -> Iterator[Run]:
    """Check the recurrent form, with states and packed sequences; arrays (B, N, H, channels)."""

    def compute(x: dict[str, Tensor], impl: str, chunk: int) -> tuple[Tensor, Tensor]:
        out, state = lightning.lightning_attention(
            *_qkv(x),
            x.get("log_decay"),
            state=x.get("initial_state"),
            cu_seqlens=file.tensor("cu_seqlens") if "cu_seqlens" in file else None,
            return_state=True,
            chunk_size=chunk,
            impl=impl,
        )
        return out.transpose(1, 2), state

    names = ("q", "k", "v", "log_decay", "initial_state")
    yield from _runs(file, names, compute)


def decay_linear_attention(file: GoldenFile) -> Iterator[Run]:
    """Check decays by token, per head or per channel; arrays (B, N, H, channels)."""

    def compute(x: dict[str, Tensor], impl: str, chunk: int) -> tuple[Tensor, Tensor]:
        rates = x["log_decay"] if file.meta["kind"] == "scalar" else x["log_decay_key"]
        k = 1 - rates.exp() if file.meta["key_from_decay"] else x["k"]
        by_value = x.get("log_decay_value")
        out, state = gated_linear.gated_linear_attention(
            *_qkv({**x, "k": k}),
            rates.transpose(1, 2),
            log_decay_value=None if by_value is None else by_value.transpose(1, 2),
            state=x.get("initial_state"),
            return_state=True,
            chunk_size=chunk,
            impl=impl,
        )
        return out.transpose(1, 2), state

    names = ("q", "k", "v", "log_decay", "log_decay_key", "log_decay_value", "initial_state")
    yield from _runs(file, names, compute)


def gla_naive(file: GoldenFile) -> Iterator[Run]:
    """Check decays by token and key channel; arrays (B, N, H, channels)."""

    def compute(x: dict[str, Tensor], impl: str, chunk: int) -> tuple[Tensor, Tensor]:
        out, state = gated_linear.gated_linear_attention(
            *_qkv(x),
            x["log_decay"].transpose(1, 2),
            state=x.get("initial_state"),
            scale=file.meta["scale"],
            return_state=True,
            chunk_size=chunk,
            impl=impl,
        )
        return out.transpose(1, 2), state

    names = ("q", "k", "v", "log_decay", "initial_state")
    yield from _runs(file, names, compute)


def _runs(file: GoldenFile, names: tuple[str, ...], compute: Compute) -> Iterator[Run]:
    names = tuple(name for name in names if name in file)
    # The files are short: small chunks make several of them.
    for label, impl, chunk in (
        ("reference", "reference", 64),
        ("compiled", "compiled", 64),
        ("compiled in chunks of 8", "compiled", 8),
    ):
        leaves = {name: file.tensor(name, torch.float64, grad=True) for name in names}
        out, state = compute(leaves, impl, chunk)
        found = [file.compare("out_float64", out, FLOAT64)]
        if "state_float64" in file:
            found.append(file.compare("state_float64", state, FLOAT64))
        gradients = {f"grad_{name}": leaf for name, leaf in leaves.items()}
        found += file.gradients(out, "grad_out", gradients, GRADIENT64)
        leaves = {name: file.tensor(name, torch.float32) for name in names}
        found += _in_float32(file, *compute(leaves, impl, chunk))
        yield Run(label, found)
    decay = "log_decay" if "log_decay" in file else "log_decay_key"
    by_channel = decay in file and file.tensor(decay).ndim == 4
    if not by_channel and not triton_missing(file.tensor("q")):
        leaves = {name: file.tensor(name, torch.float32, grad=True) for name in names}
        out, state = compute(leaves, "triton", 64)
        gradients = {f"grad_{name}": leaf for name, leaf in leaves.items()}
        found = _in_float32(file, out, state)
        yield Run("triton", found + file.gradients(out, "grad_out", gradients, FLOAT32))


def _in_float32(file: GoldenFile, out: Tensor, state: Tensor) -> list[Comparison]:
    found = [file.compare("out", out, FLOAT32)]
    return found + ([file.compare("state", state, FLOAT32)] if "state" in file else [])


def _qkv(x: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Heads first."""
    return x["q"].transpose(1, 2), x["k"].transpose(1, 2), x["v"].transpose(1, 2)

"""Agent attention: the core and the four published blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from brainalign_kernels.agent import (
    AgentAttentionCSWin,
    AgentAttentionDeiT,
    AgentAttentionPVT,
    AgentAttentionSwin,
    agent_attention,
)
from brainalign_kernels.agent.module import _AgentBlock
from brainalign_kernels.golden.check import FLOAT64, GRADIENT64, GoldenFile, Run

PATHS = ("reference", "compiled")


def agent_attention_core(file: GoldenFile) -> Iterator[Run]:
    """Two softmaxes with explicit agents and biases."""
    names = ("q", "k", "v", "agent_tokens", "position_bias", "agent_bias")
    for impl in PATHS:
        x = {n: file.tensor(n, grad=True) for n in names}
        out, values = agent_attention(
            x["q"], x["k"], x["v"], x["agent_tokens"], position_bias=x["position_bias"],
            agent_bias=x["agent_bias"], scale=file.meta["scale"], return_agent_values=True,
            impl=impl,
        )  # fmt: skip
        made = [
            file.compare("agent_v", values, FLOAT64),
            file.compare("core_out", out, FLOAT64),
        ]
        inputs = {f"grad_{n}": t for n, t in x.items()}
        yield Run(impl, made + file.gradients(out, "grad_core_out", inputs, GRADIENT64))


def agent_attention_swin(file: GoldenFile) -> Iterator[Run]:
    """Agent attention inside a window."""
    meta = file.meta
    for impl in PATHS:
        block = AgentAttentionSwin(
            meta["dim"], meta["num_heads"], tuple(meta["window_size"]), meta["agent_num"],
            qkv_bias=meta["qkv_bias"], impl=impl,
        )  # fmt: skip
        yield _run(file, block, impl, "x", lambda b, x: b.qkv(x)[..., : b.dim])


def agent_attention_deit(file: GoldenFile) -> Iterator[Run]:
    """Agent attention with a class token."""
    meta = file.meta
    for impl in PATHS:
        block = AgentAttentionDeiT(
            meta["dim"], meta["num_heads"], meta["window"], meta["agent_num"],
            qkv_bias=meta["qkv_bias"], impl=impl,
        )  # fmt: skip
        yield _run(file, block, impl, "x", lambda b, x: b.qkv(x)[:, 1:, : b.dim])


def agent_attention_pvt(file: GoldenFile) -> Iterator[Run]:
    """Agent attention with spatial reduction."""
    meta = file.meta
    for impl in PATHS:
        block = AgentAttentionPVT(
            meta["dim"], meta["num_heads"], (meta["H"], meta["W"]), meta["agent_num"],
            sr_ratio=meta["sr_ratio"], qkv_bias=meta["qkv_bias"], impl=impl,
        )  # fmt: skip
        yield _run(file, block, impl, "x", lambda b, x: b.q(x))


def agent_attention_cswin(file: GoldenFile) -> Iterator[Run]:
    """Agent attention on stripes."""
    meta = file.meta
    for impl in PATHS:
        block = AgentAttentionCSWin(
            meta["dim"], meta["num_heads"], meta["resolution"], (meta["H_sp"], meta["W_sp"]),
            meta["agent_num"], impl=impl,
        )  # fmt: skip
        yield _run(file, block, impl, "qkv", lambda b, x: b._stripes(x[0]))


def _run(
    file: GoldenFile,
    block: _AgentBlock,
    impl: str,
    name: str,
    queries: Callable[[Any, Tensor], Tensor],
) -> Run:
    block = block.to(torch.float64)
    block.load_state_dict(file.parameters())
    x = file.tensor(name, grad=True)
    out = block(x)
    derived = {
        "position_bias": block.position_bias(),
        "agent_bias": block.agent_bias(),
        "agent_tokens": block.agent_tokens(queries(block, x)),
    }
    made = [file.compare("out", out, FLOAT64)]
    made += [file.compare(n, t, FLOAT64) for n, t in derived.items() if n in file]
    inputs = {f"grad_{name}": x}
    inputs |= {f"grad_param.{n}": p for n, p in block.named_parameters()}
    return Run(impl, made + file.gradients(out, "grad_out", inputs, GRADIENT64))
